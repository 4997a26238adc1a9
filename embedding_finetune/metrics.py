"""Retrieval measures over rankings.

Shapes: Q queries, K ranks. `relevance` (Q, K) bool says whether the passage at each rank, best first,
answers the query; a rank past the end of a small corpus is False.
"""

from collections.abc import Sequence, Set

import numpy as np


def mrr(relevance: np.ndarray, cutoff: int) -> np.ndarray:
    """Reciprocal rank of the first relevant passage within the cutoff, per query: (Q,) float64.

    0 for a query with none among its first `cutoff` ranks, also where it has no relevant passage in
    the corpus at all. Its mean over queries is the MRR (Voorhees, TREC-8 1999).
    """
    within = relevance[:, :cutoff]
    if not within.shape[1]:
        return np.zeros(len(within))
    return np.where(within.any(axis=1), 1.0 / (within.argmax(axis=1) + 1), 0.0)


def hit(relevance: np.ndarray, cutoff: int) -> np.ndarray:
    """1 where at least one relevant passage is within the cutoff, else 0, per query: (Q,) float64.

    It does not count how many there are: a query with two relevant passages scores 1 with either.
    """
    return relevance[:, :cutoff].any(axis=1).astype(np.float64)


MEASURES = {"MRR": mrr, "Hit": hit}


def relevance_of(positions: np.ndarray, relevant: Sequence[Set[int]]) -> np.ndarray:
    """Whether the passage at each rank, of positions (Q, K), is one of its query's relevant ones: (Q, K) bool."""
    rows = [[p in answers for p in ranked] for ranked, answers in zip(positions.tolist(), relevant)]
    return np.array(rows, dtype=bool).reshape(positions.shape)


def per_query(relevance: np.ndarray, measures: Sequence[str], cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """`{"MRR@1": (Q,), "Hit@1": (Q,), ...}`, cutoff by cutoff."""
    return {f"{name}@{k}": MEASURES[name](relevance, k) for k in cutoffs for name in measures}


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean of each measure over all queries."""
    return {name: float(scores.mean()) for name, scores in values.items()}
