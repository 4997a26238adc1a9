"""Low-rank adapters (LoRA, arXiv:2106.09685) on a backbone, through peft, and weights mixed with those of the base.

peft is imported where it is used: it is optional.
"""

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from embedding_finetune.command_line import UserError
from embedding_finetune.files import AnyPath
from embedding_finetune.model.checkpoint import find_file
from embedding_finetune.model.revisions import at_revision
from embedding_finetune.model.side_files import TEXT, SideFile, read_json

_FOLDER = "adapter"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "adapter_base.json"
"""What an adapter says of the model that it belongs to."""


class AdapterBase(NamedTuple):
    """The model that an adapter belongs to: its hub name or absolute path, and weights_digest of its backbone."""

    name: str
    weights_sha256: str | None


def add_adapters(backbone: PreTrainedModel, rank: int, *, seed: int) -> nn.Module:
    """The backbone with an adapter of this rank, alpha twice that, on every linear layer; nothing else is trained.

    The factors that do not start at zero are drawn with the seed.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(backbone, config)


def has_adapters(backbone: nn.Module) -> bool:
    """Whether add_adapters made this backbone."""
    return hasattr(backbone, "peft_config")


def merged(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone as a plain transformers model, what its adapters learned in its weights; itself without adapters.

    It is made on the CPU: a GPU that trains may have no memory left for a second model.
    """
    if not has_adapters(backbone):
        return backbone
    # deepcopy takes for a tensor what its memo has.
    weights = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in backbone.parameters()}
    buffers = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in backbone.buffers()}
    return copy.deepcopy(backbone, {**weights, **buffers}).merge_and_unload()


def save_adapter(backbone: PreTrainedModel, folder: str | Path, *, base: AdapterBase, alone: bool) -> None:
    """Write the adapter as peft does: into the folder itself when it is all that is saved, else into `adapter`.

    base: the model that it belongs to.
    """
    target = Path(folder) if alone else Path(folder) / _FOLDER
    # No linear layer is an embedding. To find that out by itself peft asks the hub, and waits where there is none.
    backbone.save_pretrained(target, save_embedding_layers=False)
    config = json.loads((target / _CONFIG).read_text(encoding="utf-8"))
    name, revision = at_revision(base.name)
    config |= {"base_model_name_or_path": name, **revision}
    (target / _BASE).write_text(json.dumps(base._asdict(), indent=2) + "\n", encoding="utf-8")
    config["target_modules"].sort()  # a set in peft: its order would change from run to run
    (target / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (target / "README.md").unlink(missing_ok=True)  # peft's model card, a form that nobody filled in


def adapter_rank(folder: AnyPath) -> int | None:
    """The rank of the adapter that save_adapter wrote into a folder; None where there is none."""
    try:
        return json.loads((_adapter_folder(folder) / _CONFIG).read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_adapter(backbone: nn.Module, folder: AnyPath) -> None:
    """Take the weights of the adapter that save_adapter wrote."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(backbone, load_file(_adapter_folder(folder) / _WEIGHTS))


def find_adapter(name_or_path: str, *, cache_dir: str | None = None) -> AdapterBase | None:
    """The base of a folder or hub model that is an adapter alone; None for a whole model.

    weights_sha256 is None where peft alone wrote the adapter. Raises UserError for a file that says something else.
    """
    config = find_file(name_or_path, _CONFIG, cache_dir)
    if config is None or find_file(name_or_path, "config.json", cache_dir) is not None:
        return None
    base = find_file(name_or_path, _BASE, cache_dir)
    if base is not None:
        described = SideFile(base, read_json(base))
        return AdapterBase(described.field("name", TEXT), described.field("weights_sha256", TEXT))
    return AdapterBase(SideFile(config, read_json(config)).field("base_model_name_or_path", TEXT), None)


def check_peft(flag: str) -> None:
    """Raise UserError where the package is missing. flag: what needs it."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{flag} needs the package peft: pip install peft")


def merged_into(backbone: PreTrainedModel, name_or_path: str, *, cache_dir: str | None = None) -> PreTrainedModel:
    """The backbone with the adapter of a folder or hub model in its weights, which can all be trained."""
    from peft import PeftModel

    name, revision = at_revision(name_or_path)
    whole = PeftModel.from_pretrained(backbone, name, cache_dir=cache_dir, **revision).merge_and_unload()
    return whole.requires_grad_(True)  # peft has frozen the base


def as_base(name_or_path: str, weights_sha256: str) -> AdapterBase:
    """What an adapter of a model says of it: a folder by its absolute path."""
    return AdapterBase(os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path, weights_sha256)


def _adapter_folder(folder: AnyPath) -> Path:
    return Path(folder) if (Path(folder) / _CONFIG).exists() else Path(folder) / _FOLDER


@torch.no_grad()
def mix_with(tuned: nn.Module, base: nn.Module, share: float) -> None:
    """Set the weights of `tuned` to share * tuned + (1 - share) * base (LM-Cocktail, arXiv:2311.13534)."""
    others = base.state_dict()
    for name, tensor in tuned.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(share).add_(others[name], alpha=1 - share)
