"""What decides an embedding besides the text: the key of an embedding store."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.encoding_kernels import dtype_name
from embedding_finetune.model.int8 import products_digest
from embedding_finetune.model.module_configs import DropoutConfig, module_name
from embedding_finetune.model.tokens import TextKind


def store_settings(
    model: BiEncoder, tokenizer: PreTrainedTokenizerBase, kind: TextKind, *, weights_digest: str
) -> dict[str, Any]:
    """The settings that texts of a kind are encoded with; two runs may share embeddings where these are equal."""
    config, described = model.embedding_config, model.backbone.config.to_diff_dict()
    described.pop("architectures", None)  # the class that was saved last: a head may have been left out since
    code = _digest_of_own_code(type(model.backbone))
    return {
        **({} if code is None else {"code": code}),
        "weights": weights_digest,
        "architecture": _digest(described),
        "tokenizer": _tokenizer_digest(tokenizer),
        "pooling": config.pooling,
        "include_prompt": config.include_prompt,
        "truncate_dim": config.truncate_dim,
        "dense": [module_name(module) for module in config.modules if not isinstance(module, DropoutConfig)],
        "normalized": config.normalized,
        "lower_case": config.lower_case,
        "dtype": _dtype(model.backbone),
        "instruction": kind.instruction,
        "max_length": kind.max_length,
    }


def _dtype(backbone: PreTrainedModel) -> str:
    name, digest = dtype_name(backbone.dtype), products_digest(backbone)
    return name if digest is None else f"int8 of {digest}, and {name}"


def _digest_of_own_code(backbone: type) -> str | None:
    """A digest of the code that comes with a model; None where it is transformers' own."""
    if not backbone.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        return None
    folder = Path(inspect.getfile(backbone)).parent  # the files that it imports were copied there too
    return _digest({path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides token ids: a fast tokenizer's own description, else vocabulary and settings."""
    if tokenizer.is_fast:
        description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        description.update(padding=None, truncation=None)  # each call sets them
    else:
        description = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), **tokenizer.init_kwargs}
    sides = [tokenizer.padding_side, tokenizer.truncation_side]
    return _digest([description, *sides, getattr(tokenizer, "split_special_tokens", False)])
