"""Texts laid end to end instead of padded, with attention that stays within each text.

On a GPU of Ampere's kind or newer torch has a kernel for it, in half precision and without dropout. Then no padding is
computed, and texts of many lengths are launched at once. Elsewhere the same attention goes text by text, which is slow
and serves to try a model, and to test.

Shapes: n texts of S tokens in all, h heads, d dimensions of a head, H dimensions of a state.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.model.attention import (
    attends_like_sdpa,
    changes_attention,
    is_causal_attention,
    replace_sdpa,
)

_ATTENTION = "packed"
_OF_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"}
_HALF = (torch.bfloat16, torch.float16)
_AMPERE = (8, 0)
_TOLERANCE = 1e-4
"""Of the difference of states to their length, in float32."""
_TRIED_SHORT = (9, 5)
_TRIED_BY_DEFAULT, _SMALL_LIMIT, _LARGEST_WINDOW = 160, 512, 1024
"""Tokens of the longest text of the trial: this many; the limit of a model with a small one, whose table of positions
all texts together exceed; a little more than a window that is not too large to be tried."""
_LARGEST_HEAD = 256


class Packed(NamedTuple):
    """Where texts lie that stand end to end.

    position_ids: (S,), of each token in its text, as the model counts them. boundaries: (n + 1,) int32, where each text
    begins, and where the last one ends. longest: the tokens of the longest text.
    """

    position_ids: Tensor
    boundaries: Tensor
    longest: int

    def keywords(self) -> dict[str, object]:
        """What a backbone of transformers is called with beside its (1, S) inputs."""
        return {
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.boundaries,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "use_cache": False,  # of keys and values, which decoders would fill
        }


def places_of(lengths: Sequence[int] | np.ndarray, first_position: int) -> tuple[np.ndarray, np.ndarray]:
    """position_ids (S,) int64 and boundaries (n + 1,) int32 of texts of these lengths."""
    boundaries = np.append(0, np.cumsum(lengths, dtype=np.int32))
    return np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths) + first_position, boundaries.astype(np.int32)


def kernel_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has the kernel for a device and a precision."""
    if device.type != "cuda" or dtype not in _HALF or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _AMPERE and torch.backends.cuda.is_flash_attention_available()


def pack_if_possible(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    *,
    first_position: int,
    limit: int,
) -> bool:
    """Prepare a backbone for packed texts, if device, tokenizer and model allow it; whether they do.

    dtype: what it computes in. The backbone is still in float32 on the CPU; there it is tried. first_position: the
    position id of a text's first token. limit: the most tokens that the model takes.
    """
    # Without special tokens a text may have no token at all, and no place in a pack.
    if not kernel_serves(device, dtype) or not tokenizer.num_special_tokens_to_add():
        return False
    if not attends_like_sdpa(backbone) or not takes_packed(backbone, first_position=first_position, limit=limit):
        return False
    replace_sdpa(backbone, _ATTENTION)
    return True


_tried: dict[tuple[str, str, int, int], bool] = {}
"""What takes_packed found out, by architecture: a run loads models of the same one again and again."""


def takes_packed(backbone: PreTrainedModel, *, first_position: int, limit: int) -> bool:
    """Whether texts that lie end to end get the states that each gets alone: tried in float32 on the CPU."""
    config = json.dumps(backbone.config.to_diff_dict(), sort_keys=True, default=str)
    key = type(backbone).__name__, config, first_position, limit
    if key not in _tried:
        _tried[key] = _try_packed(backbone, first_position, limit)
    return _tried[key]


@torch.no_grad()
def _try_packed(backbone: PreTrainedModel, first_position: int, limit: int) -> bool:
    window = getattr(backbone.config, "sliding_window", None) or 0
    if _LARGEST_WINDOW < window < limit:
        return False
    modes = {module: module.training for module in backbone.modules()}
    own_attention = backbone.config._attn_implementation
    backbone.eval()
    try:
        texts = _texts_to_try(backbone, limit, window)
        alone = torch.cat([backbone(input_ids=ids[None]).last_hidden_state[0] for ids in texts])
        backbone.set_attn_implementation(_ATTENTION)
        lengths = [len(ids) for ids in texts]
        position_ids, boundaries = map(torch.from_numpy, places_of(lengths, first_position))
        keywords = Packed(position_ids, boundaries, max(lengths)).keywords()
        ids = torch.cat(texts)[None]
        ways = ({"input_ids": ids}, {"inputs_embeds": backbone.get_input_embeddings()(ids)})  # encoding, training
        packed = [backbone(**inputs, **keywords).last_hidden_state[0] for inputs in ways]
        return all(bool((states - alone).norm() <= _TOLERANCE * alone.norm()) for states in packed)
    except Exception:  # whatever a model says that was not made for it
        return False
    finally:
        backbone.set_attn_implementation(own_attention)
        for module, training in modes.items():
            module.training = training


def _texts_to_try(backbone: PreTrainedModel, limit: int, window: int) -> list[Tensor]:
    """Three texts, the first of them long."""
    longest = _TRIED_BY_DEFAULT
    if limit <= _SMALL_LIMIT:
        longest = limit
    elif window < limit:
        longest = max(longest, window + 32)
    known = min(getattr(backbone.get_input_embeddings(), "num_embeddings", 2), 1000)
    ids = 1 + torch.arange(min(longest, limit)) * 7 % (known - 1)
    ids = torch.where(ids == (backbone.config.pad_token_id or 0), ids - 1, ids)
    return [ids, *(ids[-min(length, limit) :] for length in _TRIED_SHORT)]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **keywords: object,
) -> tuple[Tensor, None]:
    """Softmax attention within each text, with the results of transformers' attention functions: (1, S, h, d), None.

    query: (1, h, S, d). key, value: the same, or with fewer heads. Raises ValueError for what it does not do.
    """
    if dropout or attention_mask is not None or changes_attention(keywords.keys() - _OF_PACKING, keywords):
        raise ValueError(f"packed attention takes no dropout, no mask, and not all of {sorted(keywords)}")
    size = query.shape[-1]
    if size % 8 or size > _LARGEST_HEAD or size != value.shape[-1]:
        raise ValueError(f"the kernel takes no heads of {size} and {value.shape[-1]} dimensions")
    back = -1 if sliding_window is None else sliding_window - 1
    window = (back, 0 if is_causal_attention(module, keywords) else back)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (S, h, d)
    attend = _by_kernel if query.device.type == "cuda" else text_by_text
    return attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, window)[None], None


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    dtype = value.dtype
    if dtype not in _HALF:  # autocast does not reach this operator
        value = value.to(torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.bfloat16)
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary positions may have made them float32
    attended = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scaling, window_size=window
    )
    assert isinstance(attended, Tensor)  # return_aux was not given: no sums of the softmax
    return attended.to(dtype)


def text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    """Attention of states (S, h, d) within each text: (S, h, d). window: how far back and ahead, -1 for any distance.

    longest: not needed here.
    """
    parts = []
    for first, stop in pairwise(boundaries.tolist()):
        own_query, own_key, own_value = (tensor[first:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        place = torch.arange(stop - first, device=query.device)
        distance = place[None, :] - place[:, None]  # of key from query
        back, ahead = window
        visible = torch.ones_like(distance, dtype=torch.bool)
        if back >= 0:
            visible &= distance >= -back
        if ahead >= 0:
            visible &= distance <= ahead
        attended = F.scaled_dot_product_attention(own_query, own_key, own_value, attn_mask=visible, scale=scaling)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


AttentionInterface.register(_ATTENTION, packed_attention)
"""Without a function that makes masks: transformers then makes none."""
