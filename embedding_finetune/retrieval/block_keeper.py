"""Keeping the embeddings of a block while it is encoded: a run that is killed loses some seconds of work at most.

Shapes: N texts of a block, D different ones among them, H dimensions.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedding_finetune.retrieval.store import EmbeddingStore

SECONDS_BETWEEN_KEEPING = 5.0
"""A block takes up to half an hour on a CPU. Writing what 5 s make, about a megabyte, takes some milliseconds."""


@dataclass
class _Part:
    """A segment with some of the block's texts: those that were done in so many intervals."""

    path: Path
    rows: np.ndarray
    intervals: int


class BlockKeeper:
    """Keeps a block's embeddings: every few seconds those that are done, and in the end all as one segment.

    Parts of the block are merged like the digits of a binary counter, two of n intervals into one of 2n: half an hour
    has 9 parts at most, and each embedding is written 10 times at most. In the end the parts are removed.

    digests: raw_digests of the texts, (N,). different: which of the D different texts each one is, (N,).
    """

    def __init__(
        self,
        store: EmbeddingStore,
        digests: np.ndarray,
        different: np.ndarray,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._digests, self._different = store, digests, different
        self._is_done = np.zeros(len(digests), dtype=bool)  # of the different texts, D of them used
        self._is_kept = np.zeros(len(digests), dtype=bool)  # (N,)
        self._parts: list[_Part] = []
        self._clock, self._last = clock, clock()

    def done(self, batch: np.ndarray, embeddings: np.ndarray) -> None:
        """Take note that these of the different texts have their row of embeddings (D, H), and keep them if it is time.

        What has no direction is not kept: the run will end when its block is checked.
        """
        self._is_done[batch] = True
        if not self._store.outlives_the_run or self._clock() - self._last < SECONDS_BETWEEN_KEEPING:
            return
        rows = np.flatnonzero(self._is_done[self._different] & ~self._is_kept)
        self._add(rows[has_direction(embeddings[self._different[rows]])], embeddings)
        self._last = self._clock()

    def finish(self, embeddings: np.ndarray) -> None:
        """Keep the whole block, whose different texts have these embeddings (D, H)."""
        path = self._store.keep(self._digests, embeddings[self._different])
        self._remove(self._parts, path)

    def _add(self, rows: np.ndarray, embeddings: np.ndarray) -> None:
        if not len(rows):
            return
        self._is_kept[rows] = True
        intervals, merged = 1, []
        while self._parts and self._parts[-1].intervals == intervals:
            merged.append(self._parts.pop())
            intervals *= 2
        rows = np.sort(np.concatenate([rows, *(part.rows for part in merged)]))
        path = self._store.keep(self._digests[rows], embeddings[self._different[rows]])
        if path is not None:
            self._parts.append(_Part(path, rows, intervals))
            self._remove(merged, path)

    def _remove(self, parts: list[_Part], instead: Path | None) -> None:
        """Remove parts whose texts are in the segment that was just written."""
        for part in parts:
            if part.path != instead:  # a block that was kept as it is in one part
                self._store.remove(part.path, len(part.rows))


_SMALLEST_SQUARE, _LARGEST_SQUARE = 1e-30, 1e30
"""Of lengths: beyond them a score, or the bound on its rounding, would leave float32."""


def has_direction(embeddings: np.ndarray) -> np.ndarray:
    """Which embeddings (N, H) can be compared: finite, and of a length that products in float32 can be of. (N,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nh,nh->n", embeddings, embeddings)  # (N,); NaN is in no range
    return (squares > _SMALLEST_SQUARE) & (squares < _LARGEST_SQUARE)
