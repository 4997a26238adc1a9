"""What becomes of token states, as sentence-transformers' modules have it: pooling, Dense, LayerNorm, Dropout.

Shapes: N texts, T tokens, H dimensions; of packed texts S tokens in all.
"""

import os
from collections.abc import Sequence
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.model.checkpoint import EmbeddingConfig, find_file
from embedding_finetune.model.module_configs import DenseConfig, DropoutConfig, LayerNormConfig, ModuleConfig
from embedding_finetune.model.packing import Packed


def pool(states: Tensor, attention_mask: Tensor, method: str, prompt_lengths: Tensor | None = None) -> Tensor:
    """Token states (N, T, H) to one vector per text: (N, H) for each of the methods of pooling.POOLING_METHODS.

    method: one of them, or several joined by a `+`, whose vectors are concatenated. prompt_lengths: (N,), how many
    tokens at the beginning of each text are left out; None for none. They count in the places of `weightedmean`.
    """
    kept = attention_mask
    if prompt_lengths is not None:
        kept = attention_mask * (attention_mask.cumsum(dim=1) > prompt_lengths[:, None])
    parts = [_pooled(states, attention_mask, kept, kind) for kind in method.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pooled(states: Tensor, attention_mask: Tensor, kept: Tensor, kind: str) -> Tensor:
    rows = torch.arange(len(states), device=states.device)
    if kind == "cls":
        padding = (kept.cumsum(dim=1) == 0).sum(dim=1)  # before the first token; not every device's argmax
        return states[rows, padding % states.shape[1]]  # finds the first of equal ones
    if kind == "lasttoken":
        positions = torch.arange(states.shape[1], device=states.device)
        return states[rows, (kept * positions).argmax(dim=1)]
    if kind == "max":
        return states.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
    weights = kept.unsqueeze(-1).to(states.dtype)  # (N, T, 1)
    if kind == "weightedmean":
        weights = weights * attention_mask.cumsum(dim=1).unsqueeze(-1)
    return (states * weights).sum(dim=1) / _divisor(kind, weights.sum(dim=1))


def pool_packed(states: Tensor, texts: Packed, method: str, prompt_lengths: Tensor | None = None) -> Tensor:
    """Token states (S, H) to one vector per text, as `pool` does it for padded ones. prompt_lengths: (n,) or None."""
    starts, ends = texts.boundaries[:-1], texts.boundaries[1:]
    lengths = ends - starts
    places = torch.arange(len(states), device=states.device)
    places -= torch.repeat_interleave(starts, lengths, output_size=len(states))  # (S,), from 0 in each text
    kept = None
    if prompt_lengths is not None:
        kept = places >= torch.repeat_interleave(prompt_lengths, lengths, output_size=len(states))  # (S,)
    offsets = texts.boundaries.long()

    def summed(values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True)

    def pooled(kind: str) -> Tensor:
        if kind == "lasttoken":
            return states[ends - 1]
        if kind == "cls":
            return states[starts if prompt_lengths is None else torch.minimum(starts + prompt_lengths, ends - 1)]
        if kind == "max":
            values = states if kept is None else states.masked_fill(~kept[:, None], float("-inf"))
            return torch.segment_reduce(values, "max", offsets=offsets, axis=0, unsafe=True)
        weights = torch.ones_like(states[:, :1]) if kept is None else kept[:, None].to(states.dtype)  # (S, 1)
        if kind == "weightedmean":
            weights = weights * (places + 1)[:, None]
        return summed(states * weights) / _divisor(kind, summed(weights))

    parts = [pooled(kind) for kind in method.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _divisor(kind: str, weights: Tensor) -> Tensor:
    """What the weighted sum of states is divided by. weights: (N, 1), the sum of the weights."""
    if kind in ("mean", "weightedmean"):
        return weights.clamp(min=1)
    if kind == "mean_sqrt_len_tokens":
        return weights.clamp(min=1).sqrt()
    raise ValueError(f"unknown pooling method {kind!r}")


class Dense(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
        self.activation = {"tanh": nn.Tanh(), "identity": nn.Identity()}[config.activation]

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return self.activation(self.linear(embeddings))


class LayerNorm(nn.Module):
    """Layer normalisation of embeddings (Ba et al., arXiv:1607.06450)."""

    def __init__(self, config: LayerNormConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dimension)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N, H) -> (N, H)."""
        return self.norm(embeddings)


def make_modules(configs: Sequence[ModuleConfig]) -> nn.Sequential:
    """The modules after pooling, with random weights."""
    return nn.Sequential(*map(_module, configs))


def _module(config: ModuleConfig) -> nn.Module:
    if isinstance(config, DenseConfig):
        return Dense(config)
    if isinstance(config, LayerNormConfig):
        return LayerNorm(config)
    if isinstance(config, DropoutConfig):
        return nn.Dropout(config.dropout)
    raise TypeError(f"no module for a {type(config).__name__}")


def load_projection(name_or_path: str, config: EmbeddingConfig, *, cache_dir: str | None = None) -> nn.Sequential:
    """The modules that config.modules describes, with their weights as float32; empty without such modules.

    Raises UserError when weights are missing or do not fit the described modules.
    """
    modules = make_modules(config.modules)
    for module, described in zip(modules, config.modules):
        if not module.state_dict():
            continue
        try:
            module.load_state_dict(_module_weights(name_or_path, described.folder, cache_dir))
        except (RuntimeError, SafetensorError, UnpicklingError) as error:
            kind = type(module).__name__
            raise UserError(
                f"{name_or_path}: {described.folder}: {first_line(error)}; these are not the weights of a {kind} module"
            ) from error
    return modules.float()


def _module_weights(name_or_path: str, folder: str, cache_dir: str | None) -> dict[str, torch.Tensor]:
    """The weights of a module in a folder of the checkpoint. Raises UserError where there are none."""
    path = find_file(name_or_path, os.path.join(folder, SAFE_WEIGHTS_NAME), cache_dir)
    if path is not None:
        return load_file(path)
    path = find_file(name_or_path, os.path.join(folder, WEIGHTS_NAME), cache_dir)
    if path is None:
        name = os.path.join(folder, SAFE_WEIGHTS_NAME)
        raise UserError(f"{name_or_path}: {name} is missing, though modules.json names its module")
    return torch.load(path, map_location="cpu", weights_only=True)
