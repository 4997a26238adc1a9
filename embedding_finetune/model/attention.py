"""What the kinds of attention share: products, transformers' registers, and its masks.

Attention that needs anything more is left to transformers' sdpa.

Shapes: n texts, t tokens, h heads, d dimensions of a head.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from embedding_finetune.process import put_back

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
"""Learned logits that join the softmax. The classes that have them declare that they do not work with sdpa."""
_SDPA_LIKE = {"sdpa"}
"""sdpa, and what may stand in its place: attentions with its results."""


def register_attention(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Let transformers' models use an attention function; it gets the masks that sdpa gets."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _mask_without_wait)
    _SDPA_LIKE.add(name)


def _mask_without_wait(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """transformers' sdpa_mask. To find out that it can be left out, an accelerator would have to be waited for."""
    if attention_mask is not None and attention_mask.device.type != "cpu":
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **options)
    return mask


def leave_out_cudnn_attention() -> None:
    """Keep torch from choosing cuDNN's attention until the run ends: it plans anew, for 50 ms, for each new shape."""
    put_back.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
    torch.backends.cuda.enable_cudnn_sdp(False)


def replace_sdpa(backbone: PreTrainedModel, name: str) -> None:
    """Switch the backbone from sdpa to the attention registered under this name; leave any other attention alone."""
    if backbone.config._attn_implementation in _SDPA_LIKE:
        backbone.set_attn_implementation(name)


def attends_like_sdpa(backbone: PreTrainedModel) -> bool:
    """Whether a backbone's attention is sdpa, or one of ours in its place."""
    return backbone.config._attn_implementation in _SDPA_LIKE


def is_plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    keywords: Mapping[str, object],
) -> bool:
    """Whether this attention is softmax(query @ key + mask) @ value with heads of one size, and nothing else.

    It is not when it has a keyword that may change the result, such as a position_bias.
    """
    if changes_attention(keywords.keys() - _IN_THE_MASK, keywords) or not query.shape == key.shape == value.shape:
        return False
    return attention_mask is not None or not is_causal_attention(module, keywords)


def changes_attention(names: Iterable[str], keywords: Mapping[str, object]) -> bool:
    """Whether one of these keywords of an attention is given and may change its result."""
    given = {name for name in names if keywords[name] is not None and keywords[name] is not False}
    return bool(given - _WITHOUT_EFFECT)


def is_causal_attention(module: nn.Module, keywords: Mapping[str, object]) -> bool:
    """Whether a token attends to those before it only, where no mask says it; as sdpa_attention_forward decides."""
    causal = keywords.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def attention_by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **keywords: object,
) -> tuple[Tensor, None]:
    """transformers' sdpa_attention_forward. Raises ValueError for a keyword that it would silently drop."""
    for name in _DROPPED_BY_SDPA & keywords.keys():
        if keywords[name] is not None:
            raise ValueError(f"sdpa attention does not apply {name}")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)


def attention_scores(query: Tensor, key: Tensor, scaling: float | None, bias: Tensor | None = None) -> Tensor:
    """query @ key * scaling + bias: (n*h, t, t). A scaling of None means d^-0.5.

    query, key: (n, h, t, d). bias: any shape that broadcasts to (n, h, t, t).
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
    """weights (n*h, t, t) @ value (n, h, t, d), in the layout of transformers' attention functions: (n, t, h, d)."""
    n, h, t, d = value.shape
    return torch.bmm(weights, value.reshape(n * h, t, d)).view(n, h, t, d).transpose(1, 2).contiguous()
