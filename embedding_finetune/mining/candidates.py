"""What mining chooses from, as values: pairs of rows and texts, and each row's ranked candidates with their scores.

Shapes: Q rows, each with one query; k ranks, of which the last W are the sampling window; P pairs of a row and a text.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from embedding_finetune.retrieval.doubts import Witness


class Pairs(NamedTuple):
    """Pairs of a row's number and a text's position in the corpus: (P,) int64 each."""

    rows: np.ndarray
    positions: np.ndarray


Score = Callable[[Pairs], np.ndarray]
"""Scores pairs: (P,) float32."""


class Candidates(NamedTuple):
    """Rankings and scores of all rows.

    ranking: (Q, k) positions, best first, -1 past the end. window_scores: (Q, W), of its last W ranks, -inf past the
    end. pair_scores: (P,), of the pairs given to rank_candidates. near_duplicates: (n, 2), positions of a positive and
    of a passage that is nearly equal to it. score: scores other pairs in the same way. weights_digests: by the models'
    names. witnesses: by the names of models and reranker, their own rankings, cut to a few ranks, with the scores of
    the pairs (P,), NaN where they are not known.
    """

    ranking: np.ndarray
    window_scores: np.ndarray
    pair_scores: np.ndarray
    near_duplicates: np.ndarray
    score: Score
    weights_digests: dict[str, str]
    witnesses: dict[str, Witness]

    @property
    def window(self) -> tuple[int, int]:
        """The ranks [start, stop) to sample from; stop is at most the size of the corpus."""
        ranks = self.ranking.shape[1]
        return ranks - self.window_scores.shape[1], ranks


def window_scores(candidates: Candidates, start: int) -> np.ndarray:
    """Score the ranking's window, which begins at rank `start`: (Q, W), -inf past the end."""
    window = candidates.ranking[:, start:]
    scores = np.full(window.shape, -np.inf, dtype=np.float32)
    rows, columns = np.nonzero(window >= 0)
    scores[rows, columns] = candidates.score(Pairs(rows, window[rows, columns]))
    return scores
