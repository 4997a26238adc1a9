"""Exact search by faiss: on the CPU, or with faiss-gpu on the GPUs.

faiss is imported when the first search needs it: a machine whose GPU searches by torch does without.

Shapes: Q queries, q of them in a search, n passages in a block, H dimensions, k results per query.
"""

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

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
    """

    def __init__(self, queries: np.ndarray, top_k: int, *, ties: Ties, gpus: Sequence[int] = ()) -> None:
        import_faiss()  # to fail before passages are encoded
        self.queries = queries
        self.ties: Ties = ties
        self.gpus = gpus
        self.best = np.full((len(queries), top_k), NO_RESULT, dtype=np.int64)  # ascending
        self._lengths = np.linalg.norm(queries, axis=1)  # (Q,)

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        index = _Index(block, self.gpus)
        tolerance = rounding_error(block.shape[1]) * longest(block) * self._lengths  # (Q,)
        width = min(self.best.shape[1] + SPARE_RESULTS, len(block))
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

    def results(self, rows: slice) -> np.ndarray:
        """The results of some queries: (q, k)."""
        return self.best[rows]

    def replace(self, rows: slice, results: np.ndarray) -> None:
        """Let some queries have these results (q, k)."""
        self.best[rows] = results

    def _with_best_of(
        self, index: "_Index", rows: np.ndarray, width: int, start: int, tolerance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Merge a block into the results of some queries: results (q, k), and which queries are settled (q,).

        A query is not settled when a passage that faiss left out, beyond `width`, may belong to its results.
        """
        queries, best = self.queries[rows], self.best[rows]
        faiss_scores, nearest = index.search(queries, width)  # (q, width), best first
        upper_bound = faiss_scores + tolerance[:, None]
        # Only passages that may be among the k best are scored exactly: after a few blocks there are hardly any.
        row, column = np.nonzero(upper_bound >= scores_of(best[:, -1:]))
        results = np.full((len(rows), column.max(initial=-1) + 1), NO_RESULT, dtype=np.int64)
        positions = nearest[row, column]
        results[row, column] = as_results(
            exact_scores(queries, row, index.block, positions), positions + start, self.ties
        )
        best = best_of([best, results], best.shape[1])
        settled = (upper_bound[:, -1] < scores_of(best[:, -1])) | (width == len(index.block))
        return best, settled


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


class _Index:
    """A block of passages (n, H) to search: on the GPUs, or on the CPU for widths that faiss-gpu does not take."""

    def __init__(self, block: np.ndarray, gpus: Sequence[int]) -> None:
        self.block = np.ascontiguousarray(block, dtype=np.float32)
        self._gpus = gpus
        self._indices: dict[bool, Any] = {}

    def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the `width` best passages, best first: (q, width) each."""
        on_gpu = bool(self._gpus) and width <= _FAISS_GPU_MAX_K
        if self._gpus and not on_gpu:
            _warn_that_the_cpu_searches()
        if on_gpu not in self._indices:
            self._indices[on_gpu] = self._build(on_gpu)
        return self._indices[on_gpu].search(np.ascontiguousarray(queries, dtype=np.float32), width)

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


@functools.cache
def _gpu_resources(gpu: int) -> Any:
    """faiss's memory and streams on a GPU, once in the process: to make them takes longer than to search a block."""
    return import_faiss().StandardGpuResources()


@functools.cache  # warn once
def _warn_that_the_cpu_searches() -> None:
    logger.warning(
        "warning: faiss-gpu gives at most %d results, and more are needed: searching on the CPU", _FAISS_GPU_MAX_K
    )
