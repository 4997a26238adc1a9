"""Weights as a run compares and restores them."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def weights_hash(model: nn.Module) -> str:
    """What tells the weights of a model from another's: a hash of the names and bits of all of them."""
    hashes = {name: _hash_of(tensor) for name, tensor in model.state_dict().items()}
    return hashlib.blake2b(repr(sorted(hashes.items())).encode(), digest_size=16).hexdigest()


def trained_weight_hashes(model: nn.Module) -> dict[str, str]:
    """A hash of each parameter that is trained, by its name."""
    return {name: _hash_of(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _hash_of(tensor: torch.Tensor) -> str:
    """Of all bits in their order. torch.hash_tensor is faster, but equal changes of two elements cancel out in it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).hexdigest()


def saved_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The backbone's weights of a checkpoint, which large models have in several files."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
