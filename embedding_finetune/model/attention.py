"""Which attention may be computed by the batched products of our own; all other is left to transformers' sdpa."""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
