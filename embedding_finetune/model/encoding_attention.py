"""Attention for encoding on a CPU, in bfloat16.

Shapes: n texts, t tokens, h heads, d dimensions of a head.
"""

import torch
from torch import Tensor, nn

from embedding_finetune.model.attention import (
    attention_by_sdpa,
    attention_scores,
    is_causal_attention,
    is_plain_attention,
    register_attention,
    weighted_values,
)

BATCHED_PRODUCTS = "batched_products"
_MOST_SCORES = 2**27
"""The most attention scores held at once: 256 MiB in bfloat16. A text that has more by itself is left to sdpa."""
_SMALLEST_SUM, _LARGEST_SUM = 1e-30, 1e30
"""Within these neither the exponentials nor what they weigh leave the numbers of bfloat16."""


def attention_in_batched_products(
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

    query, key, value: (n, h, t, d); attention_mask: (n, 1, t, t) bool. In bfloat16 on a CPU two batched products and
    exponentials take a quarter to a half of the time of torch's sdpa, at head sizes of 32 to 64. Everything else is
    left to sdpa: in float32 they gained nothing.

    Unless torch compiles it, which kernel a text takes does not depend on how many others are in the batch: its
    embedding would depend on them.
    """
    n, h, t, _ = query.shape
    if attention_mask is None and key.shape[2] == t and is_causal_attention(module, kwargs):
        # transformers leaves the mask out where no text of a batch is padded. Other kernels would take over then.
        attention_mask = query.new_ones(t, t, dtype=torch.bool).tril()[None, None]
    if (
        query.dtype != torch.bfloat16
        or not is_plain_attention(module, query, key, value, attention_mask, kwargs)
        or (attention_mask is not None and attention_mask.dtype != torch.bool)
        or (n if torch.compiler.is_compiling() else 1) * h * t * t > _MOST_SCORES
    ):
        return attention_by_sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if torch.compiler.is_compiling():
        return weighted_values(_masked_scores(query, key, attention_mask, scaling).softmax(dim=-1), value), None
    texts_at_once, parts = _MOST_SCORES // (h * t * t), []
    for first in range(0, n, texts_at_once):
        part = slice(first, first + texts_at_once)
        visible = attention_mask if attention_mask is None or len(attention_mask) == 1 else attention_mask[part]
        parts.append(_attention(query[part], key[part], value[part], visible, scaling))
    return parts[0] if len(parts) == 1 else torch.cat(parts), None


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float | None) -> Tensor:
    """Softmax attention of query, key and value (n, h, t, d) where visible (n or 1, 1, t, t): (n, t, h, d)."""
    n, h, t, _ = query.shape
    scores = _masked_scores(query, key, visible, scaling)  # (n*h, t, t)
    weights = scores.exp_()
    sums = weights.sum(dim=-1, keepdim=True)  # (n*h, t, 1)
    if not _all_fit(sums):
        _use_softmax_where_needed(weights, sums, query, key, visible, scaling)
    return weighted_values(weights, value).div_(sums.view(n, h, t, 1).transpose(1, 2))


def _use_softmax_where_needed(
    weights: Tensor, sums: Tensor, query: Tensor, key: Tensor, visible: Tensor | None, scaling: float | None
) -> None:
    """Replace exponentials that are too large or too small by the softmax, and their sums by 1, head by head.

    Without a shift by the largest score they take half the time of a softmax, and hardly any head needs one. A head is
    looked at alone: so a text's embedding does not depend on its neighbours.
    """
    n, h, t, _ = query.shape
    if visible is not None:  # the token of padding that sees nothing, not even itself, has a sum of 0
        sums.view(n, h, t).masked_fill_(~visible.any(dim=-1), 1)
    heads = (~_fit(sums)).flatten(start_dim=1).any(dim=1).nonzero()[:, 0]
    if len(heads):
        # The product of all: one of a few heads may take another kernel, with other last bits.
        weights[heads] = _masked_scores(query, key, visible, scaling)[heads].softmax(dim=-1)
        sums[heads] = 1


def _all_fit(sums: Tensor) -> bool:
    smallest, largest = sums.aminmax()
    return bool(smallest > _SMALLEST_SUM and largest < _LARGEST_SUM)


def _fit(sums: Tensor) -> Tensor:
    return (sums > _SMALLEST_SUM) & (sums < _LARGEST_SUM)


def _masked_scores(query: Tensor, key: Tensor, visible: Tensor | None, scaling: float | None) -> Tensor:
    """The scores (n*h, t, t) of query and key (n, h, t, d), the lowest value where visible (n, 1, t, t) is False."""
    n, h, t, _ = query.shape
    scores = attention_scores(query, key, scaling)
    if visible is not None:
        _mask(scores.view(n, h, t, t), visible)
    return scores


def _mask(scores: Tensor, visible: Tensor) -> None:
    """Set the scores (n, h, t, t) to the lowest value where visible (n, 1, t, t) is False, in place."""
    lowest = torch.finfo(scores.dtype).min
    if torch.compiler.is_compiling():  # the compiler fuses this with the softmax
        scores.masked_fill_(~visible, lowest)
        return
    # Only columns with a masked token are written: those of padding, a few at the end. Reducing bytes is faster than
    # reducing bools.
    columns = (visible.view(torch.uint8).amin(dim=(0, 1)).amin(dim=0) == 0).nonzero()
    if len(columns):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        scores[..., part].masked_fill_(~visible[..., part], lowest)


register_attention(BATCHED_PRODUCTS, attention_in_batched_products)
