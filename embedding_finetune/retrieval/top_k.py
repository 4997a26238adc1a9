"""Exact top-k retrieval over a stream of passage blocks.

Where a GPU encodes, torch searches there (device_search.py); elsewhere, and for --use_gpu_for_searching, faiss does
(faiss_search.py). Both give the same positions, in the same order, and the same scores.

Shapes: Q queries, q of them in a part, n passages in a block, H dimensions, k results per query.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval import device_search, faiss_search
from embedding_finetune.retrieval.device_search import DeviceSearch, searches_on
from embedding_finetune.retrieval.faiss_search import FaissSearch
from embedding_finetune.retrieval.results import (
    MOST_PASSAGES,
    NO_RESULT,
    Ties,
    as_results,
    exact_scores,
    positions_of,
    scores_of,
)

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_FUSION_OFFSET = 60
_RESULTS_PER_SPLIT = 2**20


class Ranking(NamedTuple):
    """The best passages of every query, best first.

    positions: (Q, k) int32, -1 past the end. scores: (Q, k) float32, -inf past the end.
    """

    positions: np.ndarray
    scores: np.ndarray


def split(results: np.ndarray, ties: Ties) -> Ranking:
    """The ranking of results (Q, k). It takes their memory: afterwards `results` holds none."""
    halves = results.view(np.int32).reshape(*results.shape, 2)
    positions, scores = halves[..., 0], halves[..., 1].view(np.float32)
    step = max(_RESULTS_PER_SPLIT // max(results.shape[1], 1), 1)
    for first in range(0, len(results), step):
        part = slice(first, first + step)
        positions[part], scores[part] = positions_of(results[part], ties), scores_of(results[part])
    return Ranking(positions, scores)


class TopK:
    """The k best passages of every query, updated with each block of passages that is added.

    ties: which of two passages with equal scores ranks higher, the one that comes "first" or "last". device: the one
    that encodes. gpus: the numbers of the GPUs to search on with faiss-gpu, none for the device. A corpus may hold
    MOST_PASSAGES. Raises UserError when the results do not fit into memory, or faiss is needed and missing.
    """

    def __init__(
        self,
        queries: np.ndarray,
        top_k: int,
        *,
        ties: Ties = "first",
        device: torch.device = _CPU,
        gpus: Sequence[int] = (),
    ) -> None:
        self.queries = queries
        self.top_k = top_k
        self.ties: Ties = ties
        self._search: DeviceSearch | FaissSearch
        try:
            if searches_on(device) and not gpus:
                try:
                    self._search = DeviceSearch(queries, top_k, ties=ties, device=device)
                    return
                except torch.OutOfMemoryError:
                    logger.warning("warning: queries and results do not fit into the GPU: faiss searches on the CPU")
            self._search = FaissSearch(queries, top_k, ties=ties, gpus=gpus)
        except MemoryError as error:
            raise UserError(
                f"the {top_k} best passages of {len(queries)} queries do not fit into memory: lower the end of "
                "--range_for_sampling (mine_hard_neg.py) or --cutoffs (evaluate.py)"
            ) from error

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        if start + len(block) > MOST_PASSAGES:
            raise UserError(f"a corpus may hold {MOST_PASSAGES} passages, and this one has more")
        if len(block) and len(self.queries):
            self._search.add(start, block)

    def ranking(self) -> Ranking:
        """The best passages of the blocks added so far. It takes the memory of the results: nothing can follow."""
        results = self._search.results(slice(None))
        del self._search
        return split(results, self.ties)

    def results(self, rows: slice) -> np.ndarray:
        """The results of some queries, as integers: (q, k), best first."""
        return self._search.results(rows)

    def replace(self, rows: slice, results: np.ndarray) -> None:
        """Let some queries have these results (q, k)."""
        self._search.replace(rows, results)


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

    embeddings: (P, H), of the given texts, none of length 0. device: the one that encodes. `pairs`: (n, 2) int64, a row
    of embeddings and a passage's position.
    """

    def __init__(self, embeddings: np.ndarray, threshold: float, *, device: torch.device = _CPU) -> None:
        unit = _unit(embeddings)
        self.threshold = threshold
        self.pairs = np.empty((0, 2), dtype=np.int64)
        self._near_pairs: Callable[[np.ndarray, float], np.ndarray] = (
            partial(device_search.near_pairs, torch.from_numpy(unit).to(device))
            if searches_on(device)
            else partial(faiss_search.near_pairs, unit)
        )

    def add(self, start: int, block: np.ndarray) -> None:
        """Search passages start .. start + n - 1, whose embeddings are block (n, H)."""
        pairs = self._near_pairs(_unit(block), self.threshold)  # (n, 2)
        pairs[:, 1] += start
        self.pairs = np.concatenate([self.pairs, pairs])


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def fuse(rankings: Sequence[np.ndarray], top_k: int, *, ties: Ties = "first") -> Ranking:
    """Reciprocal-rank fusion (Cormack et al., SIGIR 2009): rank by the sum over rankings of 1 / (60 + rank from 1).

    rankings: positions (Q, any) each, best first, -1 past the end. Returns the top_k best; scores are the sums.
    """
    fused = np.full((len(rankings[0]), top_k), NO_RESULT, dtype=np.int64)
    credit = np.concatenate([1 / (_FUSION_OFFSET + np.arange(1, r.shape[1] + 1)) for r in rankings])
    for row in range(len(fused)):
        positions, places = np.unique(np.concatenate([ranking[row] for ranking in rankings]), return_inverse=True)
        # Rounding makes sums of the same terms in another order equal.
        scores = np.bincount(places, weights=credit).round(12).astype(np.float32)
        found = positions >= 0
        best = np.sort(as_results(scores[found], positions[found], ties))[:top_k]
        fused[row, : len(best)] = best
    return split(fused, ties)


def gpus_to_search_on(device: torch.device, *, use_gpu_for_searching: bool, own_gpu: int | None = None) -> list[int]:
    """The numbers of the GPUs that faiss-gpu searches on: all, or only the process's own one; none without the flag.

    device: the one that encodes. Raises UserError where faiss has to search and cannot, before anything is encoded.
    """
    if use_gpu_for_searching:
        gpus = faiss_search.all_gpus()
        return gpus if own_gpu is None else [gpus[own_gpu % len(gpus)]]
    if not searches_on(device):
        faiss_search.import_faiss()
    return []
