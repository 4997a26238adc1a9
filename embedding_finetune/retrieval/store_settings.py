"""What decides an embedding besides the text: the key of an embedding store."""

import hashlib
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from embedding_finetune.command_line import scratch_error, scratch_folder
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.encoding_kernels import dtype_name
from embedding_finetune.model.int8 import products_digest
from embedding_finetune.model.module_configs import DropoutConfig, module_name
from embedding_finetune.model.tokens import TextKind

_ABOUT_LOADING = {"name_or_path", "tokenizer_file", "is_local", "local_files_only", "auto_map"}
"""Settings of a tokenizer that say where it came from."""


def model_settings(
    model: BiEncoder, tokenizer: PreTrainedTokenizerBase, *, weights_digest: str, compiled: bool
) -> dict[str, Any]:
    """The settings that a model encodes with; two runs may share embeddings where these and kind_settings are equal.

    The device is not among them: a machine without a GPU may use what one with a GPU has encoded.
    """
    config, described = model.embedding_config, model.backbone.config.to_diff_dict()
    described.pop("architectures", None)  # the class that was saved last: a head may have been left out since
    code = [_own_code(type(model.backbone)), _own_code(type(tokenizer))]
    return {
        **({"code": _digest(code)} if any(code) else {}),
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
    }


def kind_settings(kind: TextKind) -> dict[str, Any]:
    """The settings that texts of a kind are encoded with."""
    return {"instruction": kind.instruction, "max_length": kind.max_length}


def _dtype(backbone: PreTrainedModel) -> str:
    name, digest = dtype_name(backbone.dtype), products_digest(backbone)
    return name if digest is None else f"int8 of {digest}, and {name}"


def _own_code(part: type) -> dict[str, str]:
    """The files of the code that comes with a backbone or a tokenizer; empty where it is transformers' own."""
    if not part.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        return {}
    file = inspect.getfile(part)
    return {os.path.basename(path): _content(path) for path in (file, *get_relative_import_files(file))}


def _digest(value: object) -> str:
    # The repr of a token has its flags, such as lstrip, its str has not.
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
        if name not in (*_ABOUT_LOADING, *tokenizer.vocab_files_names)
    }
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    files = _files_of(tokenizer)
    return {**settings, "class": type(tokenizer).__name__, "vocabulary": vocabulary, "added": added, "files": files}


def _files_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the files hold that a tokenizer was made of: a vocabulary, and merges for instance."""
    try:
        with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
            return [_content(file) for file in tokenizer.save_vocabulary(folder) or ()]
    except OSError as error:
        raise scratch_error(error, "a tokenizer's vocabulary") from error
    except NotImplementedError:  # one that comes with code of its own may have none
        return []
