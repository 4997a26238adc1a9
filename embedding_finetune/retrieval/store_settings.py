"""What decides an embedding besides the text: the key of an embedding store."""

import hashlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from embedding_finetune.command_line import scratch_folder
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.encoding_kernels import dtype_name
from embedding_finetune.model.int8 import products_digest
from embedding_finetune.model.module_configs import DropoutConfig, module_name
from embedding_finetune.model.tokens import TextKind


def store_settings(
    model: BiEncoder, tokenizer: PreTrainedTokenizerBase, kind: TextKind, *, weights_digest: str, compiled: bool
) -> dict[str, Any]:
    """The settings that texts of a kind are encoded with; two runs may share embeddings where these are equal.

    The device is not among them: a machine without a GPU may use what one with a GPU has encoded.
    """
    config, described = model.embedding_config, model.backbone.config.to_diff_dict()
    described.pop("architectures", None)  # the class that was saved last: a head may have been left out since
    code = _own_code(type(model.backbone)) | _own_code(type(tokenizer))
    return {
        **({"code": _digest(code)} if code else {}),
        **({"compiled": True} if compiled else {}),
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


def _own_code(part: type) -> dict[str, str]:
    """The files of the code that comes with a backbone or a tokenizer; empty where it is transformers' own."""
    if not part.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        return {}
    folder = Path(inspect.getfile(part)).parent  # the files that it imports were copied there too
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides token ids, and which of them pooling takes for a prompt."""
    if tokenizer.is_fast:
        description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        description.update(padding=None, truncation=None)  # each call sets them
    else:
        description = _described(tokenizer)
    sides = [tokenizer.padding_side, tokenizer.truncation_side]
    splits = getattr(tokenizer, "split_special_tokens", False)
    return _digest([description, *sides, splits, sorted(tokenizer.all_special_ids)])


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A tokenizer that is written in Python: its settings, and what its files hold, wherever they lie."""
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if name not in (*tokenizer.vocab_files_names, "name_or_path")
    }
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        files = tokenizer.save_vocabulary(folder) or ()  # some have none
        contents = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    return {**settings, "class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "files": contents}
