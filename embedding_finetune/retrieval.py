"""Exact top-k retrieval over a stream of passage blocks.

Shapes: Q queries, n passages in a block, H dimensions, k results per query.

faiss finds the nearest passages of a block. Its scores depend, in the last bit, on the shape of the
matrix product, so equal vectors may get unequal scores; the final scores are therefore computed
pair by pair in float64 and rounded to float32, and ties are decided by position.
"""

from typing import Literal

import faiss
import numpy as np
from tqdm import tqdm

from embedding_finetune.command_line import UserError

Ties = Literal["first", "last"]

_SPARE = 8
"""Passages asked of faiss beyond k, so that ties at the k-th place are mostly seen at once."""
_QUERIES_PER_SEARCH = 1024
_VALUES_PER_CHUNK = 2**23
_FAISS_GPU_MAX_K = 2048


class TopK:
    """The k best passages of every query, kept up to date as blocks of passages come by.

    ties: which of two equal scores ranks higher, the passage that comes "first" or "last".
    """

    def __init__(self, queries: np.ndarray, top_k: int, *, ties: Ties = "first", use_gpu: bool = False):
        self.queries = queries
        self.ties: Ties = ties
        self.use_gpu = use_gpu
        self.scores = np.full((len(queries), top_k), -np.inf, dtype=np.float32)  # (Q, k)
        self.positions = np.full((len(queries), top_k), -1, dtype=np.int64)  # (Q, k), -1 past the end

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        if not len(block) or not len(self.queries):
            return
        index = _flat_index(block, use_gpu=self.use_gpu)
        starts = range(0, len(self.queries), _QUERIES_PER_SEARCH)
        for first in tqdm(starts, desc="Searching", unit="batch", leave=False):
            part = slice(first, first + _QUERIES_PER_SEARCH)
            scores, positions = _search_block(index, block, self.queries[part], self.scores.shape[1], self.ties)
            self.merge(scores, positions + start, part)

    def merge(self, scores: np.ndarray, positions: np.ndarray, part: slice = slice(None)) -> None:
        """Take in results (Q, any) of another search of the same queries, or of those in `part`."""
        scores = np.concatenate([self.scores[part], scores], axis=1)
        positions = np.concatenate([self.positions[part], positions], axis=1)
        order = _best_first(scores, positions, self.ties)[:, : self.scores.shape[1]]
        self.scores[part] = np.take_along_axis(scores, order, axis=1)
        self.positions[part] = np.take_along_axis(positions, order, axis=1)


class PairScores:
    """The scores of given (query, passage) pairs, filled in as blocks of passages come by.

    query_rows, positions: (P,) each. `scores` (P,) is NaN where the passage has not come by yet.
    """

    def __init__(self, queries: np.ndarray, query_rows: np.ndarray, positions: np.ndarray):
        self.queries = queries
        self.query_rows = np.asarray(query_rows, dtype=np.int64)
        self.positions = np.asarray(positions, dtype=np.int64)
        self.scores = np.full(len(self.positions), np.nan, dtype=np.float32)

    def add(self, start: int, block: np.ndarray) -> None:
        """Score the pairs whose passage is one of start .. start + n - 1; block: (n, H)."""
        here = np.flatnonzero((self.positions >= start) & (self.positions < start + len(block)))
        for first in range(0, len(here), max(_VALUES_PER_CHUNK // max(block.shape[1], 1), 1)):
            pairs = here[first : first + max(_VALUES_PER_CHUNK // block.shape[1], 1)]
            queries = self.queries[self.query_rows[pairs]]
            self.scores[pairs] = exact_scores(queries, block[self.positions[pairs] - start][:, None])[:, 0]


def exact_scores(queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """Inner products of queries (Q, H) with each one's passages (Q, k, H): (Q, k), summed in float64."""
    scores = np.matmul(passages.astype(np.float64), queries.astype(np.float64)[:, :, None])  # (Q, k, 1)
    return scores[:, :, 0].astype(np.float32)


def require_gpu() -> None:
    """Raise UserError unless the installed faiss can search on a GPU of this machine."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise UserError(
            "--use_gpu_for_searching: the installed faiss has no GPU support; "
            "pip uninstall faiss-cpu, then pip install -r requirements_cuda.txt, or drop the flag"
        )
    if faiss.get_num_gpus() == 0:
        raise UserError("--use_gpu_for_searching: faiss finds no GPU on this machine; drop the flag")


def _flat_index(block: np.ndarray, *, use_gpu: bool) -> faiss.Index:
    index = faiss.IndexFlatIP(block.shape[1])
    if use_gpu:
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        index = faiss.index_cpu_to_all_gpus(index, options)
    index.add(np.ascontiguousarray(block, dtype=np.float32))
    return index


def _search_block(
    index: faiss.Index, block: np.ndarray, queries: np.ndarray, top_k: int, ties: Ties
) -> tuple[np.ndarray, np.ndarray]:
    """The exact top k of one block: (Q, k') scores and positions within the block, k' = min(k, n)."""
    top_k = min(top_k, len(block))
    scores = np.empty((len(queries), top_k), dtype=np.float32)
    positions = np.empty((len(queries), top_k), dtype=np.int64)
    tolerance = _rounding_error(queries, block)  # (Q,)
    pending, width = np.arange(len(queries)), min(top_k + _SPARE, len(block))
    while len(pending):
        unsettled = []
        rows_at_once = max(_VALUES_PER_CHUNK // (width * block.shape[1]), 1)
        for first in range(0, len(pending), rows_at_once):
            rows = pending[first : first + rows_at_once]
            found_scores, found = index.search(np.ascontiguousarray(queries[rows]), width)  # (q, width)
            exact = exact_scores(queries[rows], block[found])  # (q, width)
            order = _best_first(exact, found, ties)[:, :top_k]
            scores[rows] = np.take_along_axis(exact, order, axis=1)
            positions[rows] = np.take_along_axis(found, order, axis=1)
            # A passage that faiss left out scores at most its last one; is that clearly below our k-th?
            settled = found_scores[:, -1] + tolerance[rows] < scores[rows, -1]
            unsettled.append(rows[~settled])
        pending = np.concatenate(unsettled) if width < len(block) else np.empty(0, dtype=np.int64)
        width = min(width * 4, len(block))
    return scores, positions


def _rounding_error(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """A generous bound on float32 rounding in an inner product of H terms, per query: (Q,)."""
    longest = np.sqrt(np.einsum("nh,nh->n", block, block).max())
    return 4 * np.finfo(np.float32).eps * np.sqrt(block.shape[1]) * longest * np.linalg.norm(queries, axis=1)


def _best_first(scores: np.ndarray, positions: np.ndarray, ties: Ties) -> np.ndarray:
    """The order of each row by score descending, then by position as `ties` says: (Q, n)."""
    return np.lexsort((positions if ties == "first" else -positions, -scores), axis=1)
