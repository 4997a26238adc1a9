"""Exact top-k retrieval over a stream of passage blocks.

Shapes: Q queries, n passages in a block, H dimensions, k results per query.

faiss finds the nearest passages of a block. The last bit of its scores depends on the shape of the matrix product, so
equal vectors may get unequal scores. The final scores are therefore computed pair by pair in float64 and rounded to
float32, and ties are decided by position.

A result, which is a score and a position, is one 64-bit integer: the smaller, the better. Lists of results are merged
by sorting.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import faiss
import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.progress import Progress

logger = logging.getLogger(__name__)

Ties = Literal["first", "last"]

_SPARE_RESULTS = 8
"""Results that faiss gives beyond k, so that most ties at the k-th place are settled in one search."""
_RESULTS_PER_SEARCH = 2**20
_VALUES_PER_CHUNK = 2**23
_QUERIES_PER_RANGE_SEARCH = 1024
_FUSION_OFFSET = 60
_FAISS_GPU_MAX_K = 2048
_NO_RESULT = np.iinfo(np.int64).max
_LOW_BITS = 2**32 - 1


class Ranking(NamedTuple):
    """The best passages of every query, best first.

    positions: (Q, k) int64, -1 past the end. scores: (Q, k) float32, -inf past the end.
    """

    positions: np.ndarray
    scores: np.ndarray


class TopK:
    """The k best passages of every query, updated with each block of passages that is added.

    ties: which of two passages with equal scores ranks higher, the one that comes "first" or "last". gpus: the numbers
    of the GPUs to search on, none for the CPU. A corpus may hold 2^32 - 1 passages. Raises UserError when the results
    do not fit into memory.
    """

    def __init__(self, queries: np.ndarray, top_k: int, *, ties: Ties = "first", gpus: Sequence[int] = ()) -> None:
        self.queries = queries
        self.ties: Ties = ties
        self.gpus = gpus
        try:
            self.best = np.full((len(queries), top_k), _NO_RESULT, dtype=np.int64)  # (Q, k), ascending
        except MemoryError as error:
            raise UserError(
                f"the {top_k} best passages of {len(queries)} queries do not fit into memory: lower the end of "
                "--range_for_sampling (mine_hard_neg.py) or --cutoffs (evaluate.py)"
            ) from error

    def ranking(self) -> Ranking:
        """The best passages of the blocks added so far."""
        return Ranking(positions_of(self.best, self.ties), scores_of(self.best))

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        if not len(block) or not len(self.queries):
            return
        index = _Index(block, self.gpus)
        tolerance = _rounding_error(self.queries, block)  # (Q,)
        width = min(self.best.shape[1] + _SPARE_RESULTS, len(block))
        pending = np.arange(len(self.queries))
        while len(pending):
            unsettled = []
            rows_at_once = max(_RESULTS_PER_SEARCH // width, 1)
            starts = range(0, len(pending), rows_at_once)
            with Progress(len(starts), "Searching", "batch", leave=False, disable=len(starts) == 1) as progress:
                for first in starts:
                    rows = pending[first : first + rows_at_once]
                    best, settled = self._with_best_of(index, rows, width, start, tolerance[rows])
                    self.best[rows[settled]] = best[settled]
                    unsettled.append(rows[~settled])
                    progress.update(1)
            pending, width = np.concatenate(unsettled), min(width * 4, len(block))

    def _with_best_of(
        self, index: "_Index", rows: np.ndarray, width: int, start: int, tolerance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Merge a block into the results of some queries: results (q, k), and which queries are settled (q,).

        A query is not settled when a passage that faiss left out, beyond `width`, may belong to its results.
        """
        queries, best = self.queries[rows], self.best[rows]
        faiss_scores, nearest = index.search(queries, width)  # (q, width)
        upper_bound = faiss_scores + tolerance[:, None]
        # Only passages that may be among the k best are scored exactly: after a few blocks there are hardly any.
        row, column = np.nonzero(upper_bound >= scores_of(best[:, -1:]))
        results = np.full(nearest.shape, _NO_RESULT, dtype=np.int64)
        positions = nearest[row, column]
        results[row, column] = as_results(
            exact_scores(queries, row, index.block, positions), positions + start, self.ties
        )
        best = self.merged([best, results])
        settled = (upper_bound[:, -1] < scores_of(best[:, -1])) | (width == len(index.block))
        return best, settled

    def merged(self, lists: Sequence[np.ndarray]) -> np.ndarray:
        """The k best of several lists of results (Q, any) for the same queries: (Q, k)."""
        return np.sort(np.concatenate(lists, axis=1), axis=1)[:, : self.best.shape[1]]


def as_results(scores: np.ndarray, positions: np.ndarray, ties: Ties) -> np.ndarray:
    """Scores and positions, of the same shape, as integers whose ascending order is best first.

    The high 32 bits hold the score, the low ones the position, so that the better of two ties is the smaller integer.
    """
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # adding 0 makes one of the two zeros
    ascending = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in IEEE 754 negative numbers sort backwards
    low = positions if ties == "first" else _LOW_BITS - positions
    return (~ascending << 32) | low


def scores_of(results: np.ndarray) -> np.ndarray:
    """The float32 scores of results; -inf where there is no result."""
    ascending = ~(results >> 32)
    bits = np.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).astype(np.int32)
    return np.where(results == _NO_RESULT, np.float32(-np.inf), bits.view(np.float32))


def positions_of(results: np.ndarray, ties: Ties) -> np.ndarray:
    """The positions of results; -1 where there is no result."""
    low = results & _LOW_BITS
    return np.where(results == _NO_RESULT, -1, low if ties == "first" else _LOW_BITS - low)


class PairScores:
    """The scores of given (query, passage) pairs, filled in as blocks of passages are added.

    query_rows, positions: (P,) each. `scores` (P,) is NaN for passages that were not added yet.
    """

    def __init__(self, queries: np.ndarray, query_rows: np.ndarray, positions: np.ndarray) -> None:
        self.queries = queries
        self.query_rows = np.asarray(query_rows, dtype=np.int64)
        self.positions = np.asarray(positions, dtype=np.int64)
        self.scores = np.full(len(self.positions), np.nan, dtype=np.float32)

    def add(self, start: int, block: np.ndarray) -> None:
        """Score the pairs with one of the passages start .. start + n - 1, whose embeddings are block (n, H)."""
        here = np.flatnonzero((self.positions >= start) & (self.positions < start + len(block)))
        self.scores[here] = exact_scores(self.queries, self.query_rows[here], block, self.positions[here] - start)


class NearDuplicates:
    """Pairs of a given text and a passage with a cosine of at least `threshold`, found as blocks of passages are added.

    embeddings: (P, H), of the given texts, none of length 0. `pairs`: (n, 2) int64, a row of embeddings and a passage's
    position.
    """

    def __init__(self, embeddings: np.ndarray, threshold: float) -> None:
        self.embeddings = _unit(embeddings)
        self.threshold = threshold
        self.pairs = np.empty((0, 2), dtype=np.int64)

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        block = _unit(block)
        index = faiss.IndexFlatIP(block.shape[1])
        index.add(block)
        slack = float(_rounding_error(self.embeddings, block).max(initial=0))
        pairs = [self.pairs]
        for first in range(0, len(self.embeddings), _QUERIES_PER_RANGE_SEARCH):
            queries = self.embeddings[first : first + _QUERIES_PER_RANGE_SEARCH]
            ends, _, passages = index.range_search(queries, self.threshold - slack)
            rows = np.repeat(np.arange(len(queries)), np.diff(ends).astype(np.int64))
            near = exact_scores(queries, rows, block, passages) >= self.threshold
            pairs.append(np.stack([rows[near] + first, passages[near] + start], axis=1))
        self.pairs = np.concatenate(pairs)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def fuse(rankings: Sequence[np.ndarray]) -> np.ndarray:
    """Reciprocal-rank fusion (Cormack et al., SIGIR 2009): rank by the sum over rankings of 1 / (60 + rank from 1).

    rankings: positions (Q, k) each, best first, -1 past the end. Returns positions (Q, k); ties go by position.
    """
    fused = np.full_like(rankings[0], -1)
    credit = np.concatenate([1 / (_FUSION_OFFSET + np.arange(1, r.shape[1] + 1)) for r in rankings])
    for row in range(len(fused)):
        positions, places = np.unique(np.concatenate([ranking[row] for ranking in rankings]), return_inverse=True)
        # Rounding makes sums of the same terms in another order equal.
        scores = np.bincount(places, weights=credit).round(12)
        scores[positions < 0] = -1
        best = np.lexsort((positions, -scores))[: fused.shape[1]]
        fused[row, : len(best)] = np.where(scores[best] > 0, positions[best], -1)
    return fused


def exact_scores(
    queries: np.ndarray, query_rows: np.ndarray, passages: np.ndarray, passage_rows: np.ndarray
) -> np.ndarray:
    """Inner products of pairs of rows of queries (Q, H) and passages (n, H), summed in float64: (P,) float32.

    query_rows, passage_rows: (P,).
    """
    scores = np.empty(len(query_rows), dtype=np.float32)
    step = max(_VALUES_PER_CHUNK // queries.shape[1], 1)
    for first in range(0, len(scores), step):
        part = slice(first, first + step)
        pairs = queries[query_rows[part]].astype(np.float64), passages[passage_rows[part]].astype(np.float64)
        scores[part] = np.einsum("ph,ph->p", *pairs)
    return scores


def gpus_to_search_on(own_gpu: int | None = None) -> list[int]:
    """The numbers of all GPUs, or only of the process's own GPU if it has one.

    Raises UserError unless the installed faiss can search on a GPU of this machine.
    """
    if not hasattr(faiss, "StandardGpuResources"):
        raise UserError(
            "--use_gpu_for_searching: the installed faiss has no GPU support; "
            "pip uninstall faiss-cpu, then pip install -r requirements_cuda.txt, or drop the flag"
        )
    count = faiss.get_num_gpus()
    if count == 0:
        raise UserError("--use_gpu_for_searching: faiss finds no GPU on this machine; drop the flag")
    return list(range(count)) if own_gpu is None else [own_gpu % count]


class _Index:
    """A block of passages (n, H) to search: on the GPUs, or on the CPU for widths that faiss-gpu does not take."""

    def __init__(self, block: np.ndarray, gpus: Sequence[int]) -> None:
        self.block = np.ascontiguousarray(block, dtype=np.float32)
        self._gpus = gpus
        self._indices: dict[bool, faiss.Index] = {}

    def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the `width` best passages, best first: (q, width) each."""
        on_gpu = bool(self._gpus) and width <= _FAISS_GPU_MAX_K
        if self._gpus and not on_gpu:
            _warn_that_the_cpu_searches()
        if on_gpu not in self._indices:
            self._indices[on_gpu] = self._build(on_gpu)
        return self._indices[on_gpu].search(np.ascontiguousarray(queries, dtype=np.float32), width)

    def _build(self, on_gpu: bool) -> faiss.Index:
        index: faiss.Index = faiss.IndexFlatIP(self.block.shape[1])
        if on_gpu:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            index = faiss.index_cpu_to_gpus_list(index, options, list(self._gpus))
        index.add(self.block)
        return index


@functools.cache  # warn once
def _warn_that_the_cpu_searches() -> None:
    logger.warning(
        "warning: faiss-gpu gives at most %d results, and more are needed: searching on the CPU", _FAISS_GPU_MAX_K
    )


def _rounding_error(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """A generous bound on the float32 rounding of an inner product of H terms, for each query: (Q,)."""
    longest = np.sqrt(np.einsum("nh,nh->n", block, block).max())
    return 4 * np.finfo(np.float32).eps * np.sqrt(block.shape[1]) * longest * np.linalg.norm(queries, axis=1)
