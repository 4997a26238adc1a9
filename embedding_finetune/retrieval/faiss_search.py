"""Exact search by faiss: on the CPU, or with faiss-gpu on the GPUs.

faiss is imported when the first search needs it: a machine whose GPU searches by torch does without.

Shapes: Q queries, q of them in a search, n passages in a block, H dimensions, k results per query.
"""

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.process import uninterrupted
from embedding_finetune.progress import Progress
from embedding_finetune.retrieval.results import (
    NO_RESULT,
    SPARE_RESULTS,
    Ties,
    as_results,
    best_of,
    exact_scores,
    longest,
    rounding_error,
    scores_of,
)

logger = logging.getLogger(__name__)

_RESULTS_PER_SEARCH = 2**20
_PASSAGES_PER_SEARCH = 2**15
"""A block may be a whole corpus, and faiss copies what it searches."""
_PAIRS_PER_SEARCH = 2**23
"""Of queries and passages: where all are above the bound, faiss gives as many results, of 12 bytes."""
_MOST_QUERIES = 4096
"""A search copies its queries, and the last block may be tiny."""
_QUERIES_PER_RANGE_SEARCH = 1024
_FAISS_GPU_MAX_K = 2048


def import_faiss() -> Any:
    """The module faiss. Raises UserError where it is missing, or was built for a CUDA that the machine lacks."""
    try:
        with uninterrupted():
            import faiss

            if sys.platform == "darwin":
                faiss.omp_set_num_threads(1)  # beside torch's, a second OpenMP with several threads may crash there
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"searching needs faiss, which cannot be imported ({first_line(error)}): pip install faiss-cpu"
        ) from error
    return faiss


def all_gpus() -> list[int]:
    """The numbers of the GPUs that faiss can search on. Raises UserError where there is none."""
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise UserError(
            "--use_gpu_for_searching: the installed faiss has no GPU support; "
            "pip uninstall faiss-cpu, then pip install faiss-gpu, see requirements_cuda.txt, or drop the flag"
        )
    count = faiss.get_num_gpus()
    if count == 0:
        raise UserError("--use_gpu_for_searching: faiss finds no GPU on this machine; drop the flag")
    return list(range(count))


class FaissSearch:
    """The k best passages of queries (Q, H) among the blocks that were added, as results (Q, k) in `best`.

    gpus: the numbers of the GPUs to search on, none for the CPU.

    Two searches of a block give the same results. That for the nearest passages gives k of them however good they are,
    and those are ranked. That above a bound gives only passages that may be among the k best, which costs little more
    than the products where they are few: so it is after the first blocks, but not where each block is better than all
    before. Queries are searched as those before them would have been best.
    """

    def __init__(self, queries: np.ndarray, top_k: int, *, ties: Ties, gpus: Sequence[int] = ()) -> None:
        import_faiss()  # to fail before passages are encoded
        self.queries = queries
        self.ties: Ties = ties
        self.gpus = gpus
        self.best = np.full((len(queries), top_k), NO_RESULT, dtype=np.int64)  # ascending
        self._lengths = np.linalg.norm(queries, axis=1)  # (Q,)
        self._few_enter = False  # of a block, into the results of the queries that were searched last

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        for first in range(0, len(block), _PASSAGES_PER_SEARCH):
            self._add(start + first, block[first : first + _PASSAGES_PER_SEARCH])

    def _add(self, start: int, block: np.ndarray) -> None:
        index = _Index(block, self.gpus)
        width = min(self.best.shape[1] + SPARE_RESULTS, len(block))
        pending = np.arange(len(self.queries))
        while len(pending):
            unsettled = []
            rows_at_once = max(min(_RESULTS_PER_SEARCH // width, index.most_queries), 1)
            starts = range(0, len(pending), rows_at_once)
            with Progress(len(starts), "Searching", "batch", leave=False, disable=len(starts) == 1) as progress:
                for first in starts:
                    rows = pending[first : first + rows_at_once]
                    unsettled.append(rows[~self._merge(index, rows, width, start)])
                    progress.update(1)
            pending, width = np.concatenate(unsettled), min(width * 4, len(block))

    def results(self, rows: slice) -> np.ndarray:
        """The results of some queries: (q, k)."""
        return self.best[rows]

    def replace(self, rows: slice, results: np.ndarray) -> None:
        """Let some queries have these results (q, k)."""
        self.best[rows] = results

    def _merge(self, index: "_Index", rows: np.ndarray, width: int, start: int) -> np.ndarray:
        """Merge a block into the results of some queries, and say which queries are settled: (q,).

        A query is not settled when a passage that faiss left out, beyond `width`, may belong to its results.
        """
        queries, best = self.queries[rows], self.best[rows]
        bounds = scores_of(best[:, -1])  # (q,)
        if self._few_enter and index.can_search_above and best[:, -1].max() < NO_RESULT:
            found = index.above(queries, bounds, self._lengths[rows], best.shape[1])
        else:
            found = index.nearest(queries, bounds, self._lengths[rows], width)
        self._few_enter = 2 * found.seen < len(rows) * width
        scores = exact_scores(queries, found.rows, index.block, found.passages)
        counts = np.bincount(found.rows, minlength=len(rows))
        entered = np.flatnonzero(counts)  # after a few blocks hardly any query
        places = np.arange(len(scores)) - np.repeat(np.cumsum(counts) - counts, counts)
        results = np.full((len(rows), counts.max()), NO_RESULT, dtype=np.int64)
        results[found.rows, places] = as_results(scores, found.passages + start, self.ties)
        best[entered] = best_of([best[entered], results[entered]], best.shape[1])
        settled = (found.left_out < scores_of(best[:, -1])) | np.isneginf(found.left_out)
        self.best[rows[settled]] = best[settled]
        return settled


def near_pairs(queries: np.ndarray, block: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs of rows of queries (Q, H) and block (n, H) whose inner product is at least `threshold`: (P, 2)."""
    index = import_faiss().IndexFlatIP(block.shape[1])
    index.add(block)
    slack = rounding_error(block.shape[1]) * longest(block) * longest(queries)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for first in range(0, len(queries), _QUERIES_PER_RANGE_SEARCH):
        part = queries[first : first + _QUERIES_PER_RANGE_SEARCH]
        ends, _, passages = index.range_search(part, threshold - slack)
        rows = np.repeat(np.arange(len(part)), np.diff(ends).astype(np.int64))
        near = exact_scores(part, rows, block, passages) >= threshold
        pairs.append(np.stack([rows[near] + first, passages[near]], axis=1))
    return np.concatenate(pairs)


class _Found(NamedTuple):
    """Passages of a block that may be among the k best of some queries.

    rows, passages: (P,) each, of queries and of the block; rows ascend. seen: how many the search found, before some
    were cut. left_out: (q,), no passage that the search left out scores higher; -inf where none can be among the best.
    """

    rows: np.ndarray
    passages: np.ndarray
    seen: int
    left_out: np.ndarray


class _Index:
    """A block of passages (n, H) to search: on the GPUs, or on the CPU for what faiss-gpu does not take.

    bounds, lengths: of queries, (q,), the score that is needed, and the length.
    """

    def __init__(self, block: np.ndarray, gpus: Sequence[int]) -> None:
        self.block = np.ascontiguousarray(block, dtype=np.float32)
        self._gpus = gpus
        self._longest = longest(self.block)
        self._indices: dict[str, Any] = {}

    @property
    def most_queries(self) -> int:
        """How many queries to search for at once."""
        return sys.maxsize if self._gpus else min(_PAIRS_PER_SEARCH // len(self.block), _MOST_QUERIES)

    @property
    def can_search_above(self) -> bool:
        """Whether `above` can be called: faiss-gpu has no such search, and it needs a length."""
        return not self._gpus and self._longest > 0

    def nearest(self, queries: np.ndarray, bounds: np.ndarray, lengths: np.ndarray, width: int) -> _Found:
        """Those of the `width` best passages that may have the needed score."""
        scores, passages = self.search(queries, width)  # (q, width), best first
        scores += (rounding_error(self.block.shape[1]) * self._longest * lengths)[:, None]
        rows, columns = np.nonzero(scores >= bounds[:, None])
        left_out = scores[:, -1] if width < len(self.block) else np.full(len(queries), -np.inf)
        return _Found(rows, passages[rows, columns], len(rows), left_out)

    def above(self, queries: np.ndarray, bounds: np.ndarray, lengths: np.ndarray, top_k: int) -> _Found:
        """All passages that may have the needed score, which is finite; of many, those that may be the top_k best.

        faiss takes one threshold for all queries. So the passages have one more dimension, as long as the longest of
        them, and the queries have their bounds there: what is above 0 is above its query's bound.
        """
        error = rounding_error(self.block.shape[1] + 1)
        tolerance = error * np.sqrt(2) * np.hypot(self._longest * lengths.astype(np.float64), bounds)  # (q,)
        # Beyond float32 nothing is above, or all: as at its limits.
        limits = np.finfo(np.float32)
        needed = np.clip((bounds - tolerance) / self._longest, limits.min, limits.max)
        above_zero = -limits.tiny  # what equals 0 counts: faiss takes what is greater than this
        ends, scores, passages = self._with_a_bound().range_search(_beside(queries, -needed), above_zero)
        counts = np.diff(ends).astype(np.int64)
        kept = np.ones(len(scores), dtype=bool)
        for row in np.flatnonzero(counts > top_k + SPARE_RESULTS):
            part = slice(int(ends[row]), int(ends[row + 1]))
            # top_k passages have exact scores of at least the last of the best less the tolerance.
            kept[part] = scores[part] >= np.partition(scores[part], -top_k)[-top_k] - 2 * tolerance[row]
        rows = np.repeat(np.arange(len(queries)), counts)
        return _Found(rows[kept], passages[kept], len(scores), np.full(len(queries), -np.inf))

    def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the `width` best passages, best first: (q, width) each."""
        on_gpu = bool(self._gpus) and width <= _FAISS_GPU_MAX_K
        if self._gpus and not on_gpu:
            _warn_that_the_cpu_searches()
        name = "on GPUs" if on_gpu else "on the CPU"
        if name not in self._indices:
            self._indices[name] = self._build(on_gpu)
        return self._indices[name].search(np.ascontiguousarray(queries, dtype=np.float32), width)

    def _with_a_bound(self) -> Any:
        if "with a bound" not in self._indices:
            index = import_faiss().IndexFlatIP(self.block.shape[1] + 1)
            index.add(_beside(self.block, self._longest))
            self._indices["with a bound"] = index
        return self._indices["with a bound"]

    def _build(self, on_gpu: bool) -> Any:
        faiss = import_faiss()
        index = faiss.IndexFlatIP(self.block.shape[1])
        if on_gpu:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            resources = [_gpu_resources(gpu) for gpu in self._gpus]
            index = faiss.index_cpu_to_gpu_multiple_py(resources, index, options, list(self._gpus))
        index.add(self.block)
        return index


def _beside(vectors: np.ndarray, last: np.ndarray | float) -> np.ndarray:
    """Vectors (n, H) with one more dimension: (n, H + 1)."""
    longer = np.empty((len(vectors), vectors.shape[1] + 1), dtype=np.float32)
    longer[:, :-1], longer[:, -1] = vectors, last
    return longer


@functools.cache
def _gpu_resources(gpu: int) -> Any:
    """faiss's memory and streams on a GPU, once in the process: to make them takes longer than to search a block."""
    return import_faiss().StandardGpuResources()


@functools.cache  # warn once
def _warn_that_the_cpu_searches() -> None:
    logger.warning(
        "warning: faiss-gpu gives at most %d results, and more are needed: searching on the CPU", _FAISS_GPU_MAX_K
    )
