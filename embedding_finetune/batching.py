"""Texts -> token ids -> padded batches of bounded size.

Shapes: N texts, T tokens of the longest text in a batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    instruction: str,
    max_length: int,
    lower_case: bool = False,
) -> tuple[list[list[int]], int]:
    """Token ids of `instruction + text`, special tokens included, not padded, and how many texts had to be cut.

    A text is cut to `max_length` tokens.
    """
    texts = [instruction + text for text in texts]
    if lower_case:
        texts = [text.lower() for text in texts]
    if not texts:
        return [], 0
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    token_ids = encoded["input_ids"]
    full = [row for row, ids in enumerate(token_ids) if len(ids) == max_length]
    if encoded.encodings is not None:
        return token_ids, sum(bool(encoded.encodings[row].overflowing) for row in full)
    return token_ids, sum(len(tokenizer(texts[row], verbose=False)["input_ids"]) > max_length for row in full)


def prompt_length(tokenizer: PreTrainedTokenizerBase, instruction: str, *, lower_case: bool = False) -> int:
    """How many tokens at the beginning of an encoded text are its instruction's, special ones before it included.

    A special token that ends the instruction alone does not follow it in a text, and is not counted.
    """
    if not instruction:
        return 0
    ids = tokenizer(instruction.lower() if lower_case else instruction)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


LENGTH_STEP = 8
"""Padded lengths are multiples of this: kernels are compiled anew for each shape, and few shapes fill caches less."""


def padded_length(longest: int, limit: int) -> int:
    """`longest` rounded up to a multiple of LENGTH_STEP, but at most `limit` where longest is not beyond it."""
    return max(longest, min(-(-longest // LENGTH_STEP) * LENGTH_STEP, limit))


def pad(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int]], *, limit: int
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (N, T) int64, padded on the tokenizer's own side.

    limit: the most tokens that the model takes, which rounding the length up does not pass.
    """
    longest = padded_length(max(map(len, token_ids)), limit)
    input_ids = np.full((len(token_ids), longest), tokenizer.pad_token_id or 0, dtype=np.int64)
    attention_mask = np.zeros((len(token_ids), longest), dtype=np.int64)
    for row, ids in enumerate(token_ids):
        filled = slice(longest - len(ids), None) if tokenizer.padding_side == "left" else slice(0, len(ids))
        input_ids[row, filled] = ids
        attention_mask[row, filled] = 1
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}


def batches_of_one_length(
    lengths: Sequence[int] | np.ndarray, tokens_per_batch: int, *, limit: int
) -> list[np.ndarray]:
    """Split rows into batches whose texts are padded to the same length, the longest first.

    What a text is computed with so never depends on its neighbours, nor do the last bits of its embedding. Arrays
    of row numbers with rows * padded length <= tokens_per_batch; a text longer than that is a batch of its own.
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

    Yields arrays of row numbers with rows * longest <= tokens_per_batch; a single text longer than
    that is a batch of its own. Lengths count as rounded up to multiples of LENGTH_STEP. Ties keep their order, so
    the split is a function of the lengths.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = padded_length(max(int(lengths[order[start]]), 1), limit=tokens_per_batch)
        rows = order[start : start + max(tokens_per_batch // longest, 1)]
        yield rows
        start += len(rows)
