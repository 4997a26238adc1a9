"""Token ids -> padded batches of bounded size.

Shapes: N texts, T tokens of the longest text in a batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

LENGTH_STEP = 8
"""Padded lengths are multiples of this: kernels are compiled for each shape, and fewer shapes take less memory."""


def padded_length(longest: int, limit: int) -> int:
    """`longest` rounded up to a multiple of LENGTH_STEP, but to no more than `limit`. Never less than `longest`."""
    return max(longest, min(-(-longest // LENGTH_STEP) * LENGTH_STEP, limit))


def pad(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int] | np.ndarray], *, limit: int
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (N, T) int64, padded on the tokenizer's own side.

    limit: the most tokens that the model takes; rounding the length up does not exceed it.
    """
    lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
    longest = padded_length(int(lengths.max()), limit)
    places = np.arange(longest)[::-1] if tokenizer.padding_side == "left" else np.arange(longest)
    is_token = places < lengths[:, None]  # (N, T)
    input_ids = np.full(is_token.shape, tokenizer.pad_token_id or 0, dtype=np.int64)
    input_ids[is_token] = np.concatenate(token_ids)
    attention_mask = is_token.astype(np.int64)
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}


def batches_of_one_length(
    lengths: Sequence[int] | np.ndarray, tokens_per_batch: int, *, limit: int
) -> list[np.ndarray]:
    """Split rows into batches whose texts are padded to the same length, the longest first.

    So the shape that a text is computed in, and the last bits of its embedding, do not depend on its neighbours.
    Returns arrays of row numbers with rows * padded length <= tokens_per_batch; a longer text is a batch of its own.
    """
    padded = np.array([padded_length(max(int(length), 1), limit) for length in lengths], dtype=np.int64)
    batches = []
    for length in np.unique(padded)[::-1]:
        rows = np.flatnonzero(padded == length)
        step = max(tokens_per_batch // int(length), 1)
        batches += [rows[first : first + step] for first in range(0, len(rows), step)]
    return batches


def batches_by_length(lengths: Sequence[int] | np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Split rows into batches of similar length, the longest first.

    Yields arrays of row numbers with rows * longest <= tokens_per_batch, where lengths are rounded up to multiples of
    LENGTH_STEP. A longer text is a batch of its own. Ties keep their order, so the lengths decide the split.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = padded_length(max(int(lengths[order[start]]), 1), limit=tokens_per_batch)
        rows = order[start : start + max(tokens_per_batch // longest, 1)]
        yield rows
        start += len(rows)
