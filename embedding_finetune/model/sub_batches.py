"""A batch's distinct texts, laid out for a training forward in sub-batches of texts of similar length.

All that decides about shapes is computed here, on the host and where batches are made: a forward that asked an
accelerator for lengths would have to wait for it. The distinct tokens of the batch are numbered, because their
embeddings are looked up once: the gradient of a lookup in the backbone's table is as large as that table.

Shapes: D texts, T tokens of the longest, S tokens in all, V distinct tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from embedding_finetune.model.packing import places_of
from embedding_finetune.model.padding import batches_by_length, pad, padded_length
from embedding_finetune.model.tokens import Tokens

_TOKENS_PER_SUB_BATCH = {"cpu": 1024, "mps": 8192}
"""Tokens per sub-batch where --tokens_per_sub_batch does not say, by kind of device; see benchmarks/README.md."""
_TOKENS_ON_A_GPU = 2**14
_TOKENS_END_TO_END = 2**16
"""Larger: where activations are kept anyway, a larger sub-batch without padding costs no memory."""
_LAUNCH = 2**32
"""Launching the kernels of one more sub-batch takes as long as computing 2^32 / H^2 tokens with H-dimensional states.

Measured on an H200 (benchmarks/README.md): 26 to 31 ms with bge-base, as 8,000 tokens take; H is 768 there.
"""


class Texts(TypedDict):
    """The longest text comes first, and sub-batches follow each other.

    token_ids: (V,). Padded texts have positions (D, T), which of token_ids each token is, attention_mask (D, T), and
    sub_batches (first row, end, first column, end). Packed ones have positions (S,), position_ids (S,), boundaries
    (D + 1,), and sub_batches (first text, end, first token, end, tokens of its longest text). prompt_lengths: (D,), how
    many tokens at the beginning of each text pooling leaves out.
    """

    token_ids: Tensor
    positions: Tensor
    sub_batches: Sequence[tuple[int, ...]]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    boundaries: NotRequired[Tensor]
    prompt_lengths: NotRequired[Tensor]


class Layout(Protocol):
    """How texts are laid out."""

    def __call__(self, texts: Sequence[Tokens]) -> tuple[np.ndarray, Texts]:
        """Where each text has come to stand (D,), and the texts."""
        ...


@dataclass(frozen=True)
class PaddedLayout:
    """Sub-batches are padded, each to its own longest text.

    limit: the most tokens that the model takes. tokens_per_sub_batch: the most padded tokens of one, if it holds more
    than one text. cost_of_a_sub_batch: in tokens, weighed against padding; None to fill sub-batches as far as they go.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    tokens_per_sub_batch: int
    cost_of_a_sub_batch: int | None = None

    def __call__(self, texts: Sequence[Tokens]) -> tuple[np.ndarray, Texts]:
        """As Layout says it."""
        lengths = np.array([len(tokens.ids) for tokens in texts])
        order = np.argsort(-lengths, kind="stable")
        batch = pad(self.tokenizer, [texts[row].ids for row in order], limit=self.limit)
        cuts = self._cuts(lengths[order])
        left = self.tokenizer.padding_side == "left"
        laid_out = padded_texts(**batch, ends=cuts, left=left, lengths=lengths[order], limit=self.limit)
        return _with_prompts(laid_out, texts, order)

    def _cuts(self, lengths: np.ndarray) -> list[int]:
        """Where sub-batches end, for lengths from the longest to the shortest."""
        if self.cost_of_a_sub_batch is None:
            return np.cumsum([len(rows) for rows in batches_by_length(lengths, self.tokens_per_sub_batch)]).tolist()
        padded = np.array([padded_length(max(int(length), 1), self.limit) for length in lengths])
        return cheapest_cuts(padded, self.tokens_per_sub_batch, self.cost_of_a_sub_batch)


@dataclass(frozen=True)
class PackedLayout:
    """Texts lie end to end.

    first_position: the position id of a text's first token. tokens_per_sub_batch: the most tokens of a sub-batch, if it
    holds more than one text.
    """

    first_position: int
    tokens_per_sub_batch: int

    def __call__(self, texts: Sequence[Tokens]) -> tuple[np.ndarray, Texts]:
        """As Layout says it."""
        lengths = np.array([len(tokens.ids) for tokens in texts])
        order = np.argsort(-lengths, kind="stable")
        lengths = lengths[order]
        token_ids, positions = np.unique(np.concatenate([texts[row].ids for row in order]), return_inverse=True)
        position_ids, boundaries = places_of(lengths, self.first_position)
        ends = cuts_of_sums(lengths, self.tokens_per_sub_batch)
        laid_out: Texts = {
            "token_ids": torch.from_numpy(token_ids.astype(np.int64)),
            "positions": torch.from_numpy(positions),
            "position_ids": torch.from_numpy(position_ids),
            "boundaries": torch.from_numpy(boundaries),
            "sub_batches": [
                (first, end, int(boundaries[first]), int(boundaries[end]), int(lengths[first]))
                for first, end in zip([0, *ends], ends)
            ],
        }
        return _with_prompts(laid_out, texts, order)


def layout_for(
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    tokens_per_sub_batch: int | None = None,
    hidden_size: int,
    recompute: bool = False,
    packed_from: int | None = None,
) -> Layout:
    """The layout that suits a device and a backbone with states of hidden_size dimensions.

    tokens_per_sub_batch: None for the device's default. recompute: whether activations are kept of one sub-batch only.
    packed_from: the position id of a text's first token, for a backbone that takes packed texts.
    """
    if packed_from is not None:
        by_default = _TOKENS_ON_A_GPU if recompute else _TOKENS_END_TO_END
        return PackedLayout(packed_from, tokens_per_sub_batch or by_default)
    most = tokens_per_sub_batch or _TOKENS_PER_SUB_BATCH.get(device.type, _TOKENS_ON_A_GPU)
    return PaddedLayout(tokenizer, limit, most, _LAUNCH // hidden_size**2 if device.type == "cuda" else None)


def padded_texts(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    ends: Sequence[int] | None = None,
    left: bool = False,
    lengths: np.ndarray | None = None,
    limit: int | None = None,
) -> Texts:
    """Padded texts (D, T), the longest first, cut into sub-batches that end at these rows: by default into one."""
    rows, width = input_ids.shape
    ends = [rows] if ends is None else ends
    token_ids, positions = np.unique(input_ids.numpy(), return_inverse=True)
    sub_batches = []
    for first, end in zip([0, *ends], ends):
        used = width if lengths is None else padded_length(int(lengths[first]), limit=min(limit or width, width))
        sub_batches.append((first, end, width - used, width) if left else (first, end, 0, used))
    return {
        "token_ids": torch.from_numpy(token_ids),
        "positions": torch.from_numpy(positions.reshape(rows, width)),
        "attention_mask": attention_mask,
        "sub_batches": sub_batches,
    }


def _with_prompts(laid_out: Texts, texts: Sequence[Tokens], order: np.ndarray) -> tuple[np.ndarray, Texts]:
    if any(tokens.prompt_length for tokens in texts):
        laid_out["prompt_lengths"] = torch.tensor([texts[row].prompt_length for row in order])
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return places, laid_out


def cheapest_cuts(lengths: np.ndarray, most_tokens: int, cost: int) -> list[int]:
    """Where sub-batches end so that their padded tokens, and `cost` tokens for each of them, are fewest.

    lengths: of texts, padded, from the longest to the shortest. A sub-batch has at most most_tokens padded tokens, or
    one text. For instance 8 texts of 96 tokens and 8 of 16, at a cost of 500: together 16 * 96 + 500 = 2036, apart
    8 * 96 + 8 * 16 + 2 * 500 = 1896. Cuts lie between lengths, and where a stretch of texts does not fit: it is cut
    into equal parts. Dynamic programming over the distinct lengths; texts have few of them.
    """
    begins = np.flatnonzero(np.diff(lengths, prepend=-1))  # of each distinct length
    ends = np.append(begins[1:], len(lengths))
    widths = lengths[begins]
    most_rows = np.maximum(most_tokens // widths, 1)
    best = np.zeros(len(begins) + 1)  # of the texts before each distinct length
    came_from = np.zeros(len(begins), dtype=np.int64)
    for last, end in enumerate(ends):
        rows = end - begins[: last + 1]
        parts = -(-rows // most_rows[: last + 1])
        costs = best[: last + 1] + rows * widths[: last + 1] + cost * parts
        came_from[last] = int(np.argmin(costs))
        best[last + 1] = costs[came_from[last]]
    cuts: list[int] = []
    last = len(begins) - 1
    while last >= 0:
        first = int(came_from[last])
        rows = ends[last] - begins[first]
        parts = -(-rows // most_rows[first])
        cuts += [int(begins[first] + rows * part // parts) for part in range(parts, 0, -1)]
        last = first - 1
    return cuts[::-1]


def cuts_of_sums(lengths: np.ndarray, most_tokens: int) -> list[int]:
    """Where sub-batches end whose texts have at most most_tokens together, or are one; they are about equally large."""
    total = np.cumsum(lengths)
    parts = max(-(-int(total[-1]) // most_tokens), 1)
    while True:
        aims = total[-1] * np.arange(1, parts + 1) / parts
        ends = np.unique(np.maximum(np.searchsorted(total, aims, side="right"), 1))
        ends[-1] = len(lengths)
        sums = np.diff(np.append(0, total[ends - 1]))
        texts = np.diff(np.append(0, ends))
        if ((sums <= most_tokens) | (texts == 1)).all():
            return [int(end) for end in ends]
        parts += 1
