"""Weights as a run compares and restores them."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def weights_hash(model: nn.Module) -> str:
    """What tells the weights of a model from another's: a hash of all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {torch.hash_tensor(tensor.detach().cpu()).numpy()}".encode())
    return digest.hexdigest()


def trained_weight_hashes(model: nn.Module) -> dict[str, str]:
    """A hash of each parameter that is trained."""
    return {
        name: str(torch.hash_tensor(parameter.detach().cpu()).numpy())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def saved_weights(folder: str) -> dict[str, torch.Tensor]:
    """The backbone's weights of a checkpoint, which large models have in several files."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
