"""A model's folder or hub name -> weights, tokenizer and config, as transformers reads them.

Every error names the model, and the flag that it was given with.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.model.checkpoint import find_file
from embedding_finetune.model.checks import check_tokenizer
from embedding_finetune.model.revisions import at_revision

logger = logging.getLogger(__name__)

_SAFETENSORS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_PICKLES = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ENTRIES = ("config.json", "modules.json", "adapter_config.json")
"""A model has one of these."""


def check_models_are_there(names: Sequence[str], *, flag: str, cache_dir: str | None = None) -> None:
    """Raise UserError for a name that is neither a model's folder nor a hub name: for models that are loaded later."""
    for name in names:
        log_hub_lookup(name, flag)
        try:
            found = [file for file in _ENTRIES if find_file(name, file, cache_dir) is not None]
        except (OSError, ValueError) as error:  # neither a folder nor a hub name
            found, reason = [], f": {first_line(error)}"
        else:
            reason = " with config.json" if os.path.isdir(name) else ", and the hub has none or cannot be reached"
        if not found:
            raise UserError(
                f"{flag} {name}: there is no such model{reason}; give a folder with config.json, model.safetensors and "
                "tokenizer files, or a hub name (with HF_HUB_OFFLINE=1 the hub is not asked)"
            )


def log_hub_lookup(name: str, flag: str) -> None:
    """Log a name that is looked up on the hub: it may be a misspelt folder, and without a network it takes minutes."""
    if not os.path.isdir(name):
        logger.info("%s %s: there is no such folder; looking for it on the hub", flag, name)


def load_pretrained(
    auto_class: Any,
    name_or_path: str,
    *,
    flag: str,
    remedy: str,
    may_lack: str | None = None,
    subfolder: str = "",
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a folder's or hub model's weights, as float32, with one of transformers' Auto classes, and its tokenizer.

    flag: what the user gave the name with. remedy: what to give where the weights do not fill the model. may_lack: a
    part of the names of tensors that need not be there, and are 0 then. Raises UserError when something cannot be
    loaded, the weights do not fill the model, or the tokenizer is not the model's.
    """
    what = f"{flag} {name_or_path}"
    hub: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    with errors_name_the_model(name_or_path, flag=flag, **hub):
        name, revision = at_revision(name_or_path)
        pickled = _only_pickled(name_or_path, subfolder, cache_dir)
        if pickled is not None:
            logger.info("%s: its weights are a pickle; it is read as weights alone, and runs no code", pickled)
        model, loading = auto_class.from_pretrained(
            name,
            config=load_config(config_name, **hub) if config_name else None,
            dtype=torch.float32,
            use_safetensors=pickled is None,
            output_loading_info=True,
            subfolder=subfolder,
            **revision,
            **hub,
        )
        name, revision = at_revision(tokenizer_name or name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(
            name, subfolder="" if tokenizer_name else subfolder, **revision, **hub
        )
    missing = sorted(name for name in loading["missing_keys"] if may_lack is None or may_lack not in name)
    weights = model.state_dict()
    for name in weights.keys() & set(loading["missing_keys"]) - set(missing):
        weights[name].zero_()  # transformers draws random ones: the model would be another each time
    if missing:
        raise UserError(
            f"{what}: the weights do not fill a {type(model).__name__}: "
            f"{len(missing)} tensors are missing, {missing[0]} among them; {remedy}"
        )
    check_tokenizer(tokenizer, model, f"--tokenizer_name {tokenizer_name}" if tokenizer_name else what)
    return model, tokenizer


def _only_pickled(name_or_path: str, subfolder: str, cache_dir: str | None) -> str | None:
    """The file of a model's weights, where they exist only as a pickle."""

    def first(names: Sequence[str]) -> str | None:
        found = (find_file(name_or_path, os.path.join(subfolder, name), cache_dir) for name in names)
        return next((path for path in found if path is not None), None)

    return None if first(_SAFETENSORS) is not None else first(_PICKLES)


def load_config(
    name_or_path: str, *, subfolder: str = "", cache_dir: str | None, trust_remote_code: bool
) -> PretrainedConfig:
    """The config.json of a folder or hub model, as transformers reads it."""
    name, revision = at_revision(name_or_path)
    hub: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    return AutoConfig.from_pretrained(name, subfolder=subfolder, **revision, **hub)


@contextmanager
def errors_name_the_model(
    name_or_path: str, *, flag: str, cache_dir: str | None, trust_remote_code: bool
) -> Iterator[None]:
    """Raise UserError, with flag, name and remedy, for any error while files of a model are loaded."""
    what, is_folder = f"{flag} {name_or_path}", os.path.isdir(name_or_path)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # errors of transformers, tokenizers and safetensors share no class
        if isinstance(error, UnpicklingError) or "Weights only load failed" in str(error):
            raise UserError(
                f"{what}: its weights are a pickle that asks for more than weights, which could run any code; it is "
                "not loaded. Give a model with model.safetensors"
            ) from error
        if "custom code" in str(error) and not trust_remote_code:
            raise UserError(
                f"{what}: the model comes with code of its own; read it, and give "
                "--trust_remote_code True if you trust it"
            ) from error
        kind = "" if is_folder else " (there is no such folder; tried as a hub name)"
        raise UserError(
            f"{what}{kind}: cannot be loaded: {first_line(error)} "
            "Give a folder with config.json, model.safetensors and tokenizer files, or a hub name."
        ) from error


def weights_digest(*modules: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and contents of all weights. It identifies a model, whatever its name is."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
