"""Which candidates the score filters refuse, and which filter it was.

Shapes: Q queries, W ranks of the sampling window.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class ScoreFilters(NamedTuple):
    """Which scores a negative may have; None switches a filter off.

    max_score, min_score: bounds on the score itself. absolute_margin M: score <= positive - M. relative_margin R:
    score <= positive - R * |positive|, so that it also tightens where the positive's score is negative; R = 0.05 is
    TopK-PercPos at 95% (NV-Retriever, arXiv:2407.15831).
    """

    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None

    @property
    def given(self) -> bool:
        """Whether any of them is switched on."""
        return any(value is not None for value in self)

    def refusals(self, scores: np.ndarray, lowest_positive: np.ndarray) -> np.ndarray:
        """The number of the first filter that refuses a candidate, an index into FILTERS; 0 for none.

        scores: (Q, W). lowest_positive: (Q,), the score of the query's lowest-scoring positive. Returns (Q, W) uint8.
        """
        scores, positive = scores.astype(np.float64), lowest_positive.astype(np.float64)[:, None]
        refused: dict[str, Callable[[float], np.ndarray]] = {
            "max_score": lambda limit: scores > limit,
            "min_score": lambda limit: scores < limit,
            "absolute_margin": lambda margin: scores > positive - margin,
            "relative_margin": lambda margin: scores > positive - margin * np.abs(positive),
        }
        refused_by = np.zeros(scores.shape, dtype=np.uint8)
        for number, (name, value) in enumerate(self._asdict().items(), start=1):
            if value is not None:
                refused_by[(refused_by == 0) & refused[name](value)] = number
        return refused_by


FILTERS = ("", *(f"--{name}" for name in ScoreFilters._fields))
"""The filters' names in the audit, by their numbers in ScoreFilters.refusals."""
