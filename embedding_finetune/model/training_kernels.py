"""Faster training steps on a CPU: cheaper dropout masks, and attention in plain matrix products.

torch draws the random numbers of a dropout mask one by one, which took a fifth of a training step. Dropout of attention
weights forces torch onto a slow path that copies them several times. Here one 64-bit draw of numpy's SFC64 serves four
elements, 16 bits each, so a probability is exact to 2^-17. Every mask's generator is seeded from torch's: seeds,
resumed runs and activation checkpointing work as they do with torch's own dropout.

Shapes: n texts, t tokens, h heads, d dimensions of a head.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedding_finetune.model.attention import (
    attention_by_sdpa,
    attention_scores,
    is_plain_attention,
    register_attention,
    replace_sdpa,
    weighted_values,
)

_ATTENTION = "cheap_dropout"


class CheapDropout(nn.Dropout):
    """nn.Dropout with the same probability and scaling, and masks that are cheap on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """The input, in training with a dropout mask on it; any shape."""
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        return input * scaled_keep_mask(input, self.p)


def set_dropout(backbone: PreTrainedModel, probability: float) -> None:
    """Let every dropout of a backbone have this probability: its modules', and those that its attentions pass on.

    Its config, which is saved with it, stays as it is.
    """
    for module, name in _dropouts(backbone):
        setattr(module, name, probability)


def has_dropout(backbone: PreTrainedModel) -> bool:
    """Whether any dropout of a backbone has a probability above 0."""
    return any(getattr(module, name) > 0 for module, name in _dropouts(backbone))


def _dropouts(backbone: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """The modules of a backbone that hold a dropout's probability, and the attribute that does."""
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
                yield module, name


def use_cheap_dropout(backbone: PreTrainedModel) -> None:
    """Replace every nn.Dropout of a backbone, and sdpa attention with its dropout."""
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CheapDropout(child.p))
    replace_sdpa(backbone, _ATTENTION)


def scaled_keep_mask(like: Tensor, probability: float) -> Tensor:
    """A tensor of the shape and dtype of `like`: 0 with the given probability, else 1 / (1 - probability)."""
    dropped = round(probability * 2**16)  # of the 2^16 values that 16 bits take
    if dropped >= 2**16:
        return torch.zeros_like(like)
    seed = int(torch.randint(2**62, ()))
    draws = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    bits = torch.from_numpy(draws.view(np.int16))[: like.numel()].view(like.shape)
    return (bits >= dropped - 2**15).to(like.dtype).mul_(2**16 / (2**16 - dropped))


def attention_with_cheap_dropout(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Softmax attention, with the results of transformers' attention functions: (n, t, h, d), None.

    query, key, value: (n, h, t, d). In training on a CPU plain products are faster than torch's sdpa, with or without
    dropout. Everything else, inference included, is left to sdpa.
    """
    plain = is_plain_attention(module, query, key, value, attention_mask, kwargs)
    if not torch.is_grad_enabled() or query.device.type != "cpu" or not plain:
        return attention_by_sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    bias = query.new_zeros(())
    if attention_mask is not None:
        bias = attention_mask
        if bias.dtype == torch.bool:
            bias = query.new_zeros(bias.shape).masked_fill_(~bias, torch.finfo(query.dtype).min)
    weights = attention_scores(query, key, scaling, bias).softmax(dim=-1)  # (n*h, t, t)
    if dropout > 0:
        weights = weights * scaled_keep_mask(weights, dropout)
    return weighted_values(weights, value), None


register_attention(_ATTENTION, attention_with_cheap_dropout)
