"""Exact search by torch, on the GPU that encodes: products, exact scores, and merging. Results stay there until asked.

Shapes: Q queries, q of them in a chunk, n passages in a block, H dimensions, P pairs, k results per query.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from embedding_finetune.retrieval.results import (
    LOW_BITS,
    NO_RESULT,
    SIGNLESS_BITS,
    SPARE_RESULTS,
    Ties,
    rounding_error,
)

_SCORES_PER_CHUNK = 2**26
"""The float32 scores of queries and passages held at once: 256 MiB."""
_VALUES_PER_CHUNK = 2**24
"""The float64 products of pairs held at once: 128 MiB."""


def searches_on(device: torch.device) -> bool:
    """Whether torch searches on this device: it has float64, and is faster than faiss on the CPU."""
    return device.type == "cuda"


class DeviceSearch:
    """The k best passages of queries (Q, H) among the blocks that were added, as results (Q, k) in `best`."""

    def __init__(self, queries: np.ndarray, top_k: int, *, ties: Ties, device: torch.device) -> None:
        self.ties: Ties = ties
        self.best = torch.full((len(queries), top_k), NO_RESULT, device=device)  # int64, ascending
        self._queries = _on(device, queries)
        self._lengths = self._queries.norm(dim=1, keepdim=True)  # (Q, 1)
        self._scores_per_chunk = _SCORES_PER_CHUNK  # less after the GPU ran out of memory

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        with _full_float32(self.best.device):
            passages = _on(self.best.device, block)
            tolerance = rounding_error(block.shape[1]) * _longest(passages) * self._lengths  # (Q, 1)
            first = 0
            while first < len(self.best):
                rows = slice(first, first + max(self._scores_per_chunk // len(block), 1))
                try:
                    self.best[rows] = self._with_best_of(passages, rows, start, tolerance[rows])
                    first = rows.stop
                except torch.OutOfMemoryError:
                    if self._scores_per_chunk < len(block):  # a single query
                        raise
                    self._scores_per_chunk //= 2

    def results(self, rows: slice) -> np.ndarray:
        """The results of some queries: (q, k)."""
        return self.best[rows].cpu().numpy()

    def replace(self, rows: slice, results: np.ndarray) -> None:
        """Let some queries have these results (q, k)."""
        self.best[rows] = torch.from_numpy(results).to(self.best.device)

    def _with_best_of(self, passages: Tensor, rows: slice, start: int, tolerance: Tensor) -> Tensor:
        """Merge a block into the results of some queries: (q, k)."""
        queries, best = self._queries[rows], self.best[rows]
        near, counts, most = _candidates(queries @ passages.T, best, tolerance)
        if not most:
            return best
        row, column = near.nonzero(as_tuple=True)  # (P,) each, row by row
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        results = best.new_full((len(best), most), NO_RESULT)
        results[row, place] = as_results(_exact_scores(queries, row, passages, column), column + start, self.ties)
        return torch.cat([best, results], dim=1).sort(dim=1).values[:, : best.shape[1]]


def near_pairs(queries: Tensor, block: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs of rows of queries (Q, H) and block (n, H) whose inner product is at least `threshold`: (P, 2)."""
    pairs = [torch.empty((0, 2), dtype=torch.int64, device=queries.device)]
    with _full_float32(queries.device):
        passages = _on(queries.device, block)
        tolerance = rounding_error(block.shape[1]) * _longest(passages) * queries.norm(dim=1, keepdim=True)  # (Q, 1)
        step = max(_SCORES_PER_CHUNK // max(len(block), 1), 1)
        for first in range(0, len(queries), step):
            part = queries[first : first + step]
            found = (part @ passages.T >= threshold - tolerance[first : first + step]).nonzero()  # (P, 2)
            near = _exact_scores(part, found[:, 0], passages, found[:, 1]) >= np.float32(threshold).item()
            found[:, 0] += first
            pairs.append(found[near])
    return torch.cat(pairs).cpu().numpy()


def as_results(scores: Tensor, positions: Tensor, ties: Ties) -> Tensor:
    """What results.as_results gives, as a tensor."""
    bits = (scores + 0.0).view(torch.int32).long()
    ascending = torch.where(bits < 0, bits ^ SIGNLESS_BITS, bits)
    return (~ascending << 32) | (positions if ties == "first" else LOW_BITS - positions)


def scores_of(results: Tensor) -> Tensor:
    """What results.scores_of gives, as a tensor."""
    ascending = ~(results >> 32)
    bits = torch.where(ascending < 0, ascending ^ SIGNLESS_BITS, ascending).int()
    return bits.view(torch.float32).masked_fill(results == NO_RESULT, -torch.inf)


def _candidates(scores: Tensor, best: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor, int]:
    """The passages of a block that may be among the k best: (q, n) bool, their number (q,), and the largest number.

    scores: (q, n), each within `tolerance` (q, 1) of the exact one. best: the results so far (q, k).

    All of them are taken, also where equal scores make them many: nothing depends on which of these topk would choose.
    """
    top_k = best.shape[1]
    bound = scores_of(best[:, -1:]) - tolerance
    near, counts, most = _at_least(bound, scores)
    if most > top_k + SPARE_RESULTS:
        # k passages of the block have exact scores of at least the k-th score less the tolerance.
        kth = scores.topk(top_k, dim=1).values[:, -1:]
        near, counts, most = _at_least(torch.maximum(bound, kth - 2 * tolerance), scores)
    return near, counts, most


def _at_least(bound: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, int]:
    near = scores >= bound
    counts = near.sum(dim=1)
    return near, counts, int(counts.max())


def _exact_scores(queries: Tensor, query_rows: Tensor, passages: Tensor, passage_rows: Tensor) -> Tensor:
    """Inner products of pairs of rows of queries (Q, H) and passages (n, H), summed in float64: (P,) float32."""
    step = max(_VALUES_PER_CHUNK // queries.shape[1], 1)
    parts = zip(query_rows.split(step), passage_rows.split(step))
    return torch.cat([_row_sums(queries[rows].double().mul_(passages[others])).float() for rows, others in parts])


def _row_sums(values: Tensor) -> Tensor:
    """The sums of rows (P, H): (P,). Overwrites `values`.

    By halves, in an order that only H decides: torch's own sum takes an order that P decides too.
    """
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:]
        values = values[:, :half]
    return values[:, 0]


def _longest(vectors: Tensor) -> Tensor:
    """The length of the longest of vectors (n, H), n > 0: ()."""
    return vectors.norm(dim=1).max()


def _on(device: torch.device, vectors: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)).to(device)


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32: no TF32 and no autocast, whatever the process has switched on."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
