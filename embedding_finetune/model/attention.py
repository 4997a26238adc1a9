"""What training_kernels and encoding_kernels share: attention as two batched products, and its place in transformers.

Attention that is anything more than that is left to transformers' sdpa.

Shapes: n texts, t tokens, h heads, d dimensions of a head.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_IN_THE_MASK = {"sliding_window", "position_ids"}
_WITHOUT_EFFECT = {
    "is_causal",  # see is_plain_attention
    "use_cache",
    "past_key_values",  # the model has put it into key and value
    "cache_position",
    "deterministic",  # of flash attention
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
}
_DROPPED_BY_SDPA = {"s_aux", "sinks"}
"""Learned logits that join the softmax. The classes that have them say that they do not work with sdpa."""


def register_attention(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Let transformers' models compute attention with a function that takes the masks of sdpa."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def replace_sdpa(backbone: PreTrainedModel, name: str) -> None:
    """Use the attention that was registered under this name, if the backbone uses sdpa; another one is left alone."""
    if backbone.config._attn_implementation == "sdpa":
        backbone.set_attn_implementation(name)


def is_plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    keywords: Mapping[str, object],
) -> bool:
    """Whether it is softmax(query @ key + mask) @ value with heads of one size, and nothing else.

    A keyword that is not known to change nothing, such as a position_bias, makes it another.
    """
    given = {name for name, argument in keywords.items() if argument is not None and argument is not False}
    if given - _IN_THE_MASK - _WITHOUT_EFFECT or not query.shape == key.shape == value.shape:
        return False
    causal = keywords.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)  # as sdpa_attention_forward has it
    return attention_mask is not None or not causal


def attention_by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **keywords: object,
) -> tuple[Tensor, None]:
    """transformers' sdpa_attention_forward; ValueError for a keyword that it would drop without a word."""
    for name in _DROPPED_BY_SDPA & keywords.keys():
        if keywords[name] is not None:
            raise ValueError(f"sdpa attention does not apply {name}")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)


def attention_scores(query: Tensor, key: Tensor, scaling: float | None, bias: Tensor | None = None) -> Tensor:
    """query @ key * scaling + bias, with d^-0.5 for a scaling of None: (n*h, t, t).

    query, key: (n, h, t, d); bias: whatever broadcasts to (n, h, t, t).
    """
    n, h, t, d = query.shape
    return torch.baddbmm(
        query.new_empty(1, 1, 1) if bias is None else bias.expand(n, h, t, t).reshape(n * h, t, t),
        query.reshape(n * h, t, d),
        key.reshape(n * h, t, d).transpose(1, 2),
        beta=0 if bias is None else 1,
        alpha=d**-0.5 if scaling is None else scaling,
    )


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """weights (n*h, t, t) @ value (n, h, t, d), as transformers' attention functions give it: (n, t, h, d)."""
    n, h, t, d = value.shape
    return torch.bmm(weights, value.reshape(n * h, t, d)).view(n, h, t, d).transpose(1, 2).contiguous()
