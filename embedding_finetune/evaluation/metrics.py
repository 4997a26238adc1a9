"""Retrieval measures over rankings, and whether two models differ by more than luck.

Shapes: Q queries, K ranks. `relevance` (Q, K) bool says whether the passage at each rank, best first, answers the
query; it is False past the end of a small corpus. `relevant_counts` (Q,) int is the number of distinct texts that
answer the query. It includes texts that the corpus does not hold: they cannot be found, and count as misses. Every
measure returns one float64 per query, (Q,), and 0 for a query with no relevant passage within the cutoff.
"""

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

_LARGEST_CUTOFF = 10**300
"""Larger cutoffs count as this one, which still fits into a float."""


def mrr(relevance: np.ndarray, relevant_counts: np.ndarray, cutoff: int) -> np.ndarray:
    """Reciprocal rank of the first relevant passage within the cutoff (Voorhees, TREC-8 1999)."""
    within = relevance[:, :cutoff]
    if not within.shape[1]:
        return np.zeros(len(within))
    return np.where(within.any(axis=1), 1.0 / (within.argmax(axis=1) + 1), 0.0)


def hit(relevance: np.ndarray, relevant_counts: np.ndarray, cutoff: int) -> np.ndarray:
    """1 where at least one relevant passage is within the cutoff, else 0."""
    return np.asarray(relevance[:, :cutoff].any(axis=1), dtype=np.float64)


def recall(relevance: np.ndarray, relevant_counts: np.ndarray, cutoff: int) -> np.ndarray:
    """Share of the query's relevant texts that is within the cutoff."""
    return relevance[:, :cutoff].sum(axis=1) / relevant_counts


def precision(relevance: np.ndarray, relevant_counts: np.ndarray, cutoff: int) -> np.ndarray:
    """Number of relevant passages within the cutoff, divided by the cutoff, even if the corpus is smaller."""
    return relevance[:, :cutoff].sum(axis=1) / float(min(cutoff, _LARGEST_CUTOFF))


def average_precision(relevance: np.ndarray, relevant_counts: np.ndarray, cutoff: int) -> np.ndarray:
    """Sum of the precision at each relevant rank within the cutoff, divided by the number of relevant texts."""
    within = relevance[:, :cutoff]
    at_rank = within.cumsum(axis=1) / np.arange(1, within.shape[1] + 1)
    return (at_rank * within).sum(axis=1) / relevant_counts


def ndcg(relevance: np.ndarray, relevant_counts: np.ndarray, cutoff: int) -> np.ndarray:
    """Discounted gain, 1 / log2(rank + 1) per relevant passage, divided by that of an ideal ranking.

    The ideal ranks all of the query's relevant texts first, also those that the corpus does not hold (Järvelin and
    Kekäläinen 2002, with linear gain as in trec_eval).
    """
    within = relevance[:, :cutoff]
    best_counts = np.minimum(relevant_counts, cutoff)
    depth = max(within.shape[1], int(best_counts.max(initial=0)))  # a cutoff may be far beyond any rank
    discounts = 1.0 / np.log2(np.arange(2, depth + 2))
    ideal = np.concatenate([[0.0], discounts.cumsum()])[best_counts]
    return within @ discounts[: within.shape[1]] / ideal


MEASURES = {"MRR": mrr, "Hit": hit, "Recall": recall, "nDCG": ndcg, "MAP": average_precision, "Precision": precision}


def relevance_of(positions: np.ndarray, relevant: Sequence[Set[int]]) -> np.ndarray:
    """Whether the passage at each rank of positions (Q, K) is one of its query's relevant ones: (Q, K) bool."""
    answers = np.fromiter((position for positions in relevant for position in positions), dtype=np.int64)
    if not len(answers) or not positions.size:
        return np.zeros(positions.shape, dtype=bool)
    # A query and a position make one integer, so that one search finds all of them.
    span = max(int(positions.max()), int(answers.max())) + 1
    wanted = np.sort(np.repeat(np.arange(len(relevant)), [len(positions) for positions in relevant]) * span + answers)
    ranked = np.arange(len(positions))[:, None] * span + positions  # (Q, K)
    places = np.searchsorted(wanted, ranked).clip(max=len(wanted) - 1)
    return (wanted[places] == ranked) & (positions >= 0)


def per_query(
    relevance: np.ndarray, relevant_counts: np.ndarray, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """`{"MRR@1": (Q,), "Hit@1": (Q,), ...}`, cutoff by cutoff."""
    return {f"{name}@{k}": MEASURES[name](relevance, relevant_counts, k) for k in cutoffs for name in measures}


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each measure over all queries."""
    return {name: float(scores.mean()) for name, scores in values.items()}


class Difference(NamedTuple):
    """Mean difference of two models over the same queries, its 95% bootstrap interval, and the p-value."""

    mean: float
    low: float
    high: float
    p_value: float


def compare(base: np.ndarray, other: np.ndarray, *, seed: int, rounds: int = 10_000) -> Difference:
    """How much better `other` (Q,) is than `base` (Q,) per query, and how sure that is.

    p_value: two-sided paired randomisation test (Fisher 1935; Smucker et al., CIKM 2007): how often the mean is as far
    from 0 when each query's difference has a random sign, counting the observed one. The interval goes from the 2.5% to
    the 97.5% quantile of the mean over queries drawn with replacement (Efron 1979). Queries with equal differences are
    drawn together, with binomial and multinomial numbers: the distributions are the same, and take no more time for
    more queries.
    """
    rng = np.random.default_rng(seed)
    differences = other - base
    mean = float(differences.mean())
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    positive = rng.binomial(counts, 0.5, size=(rounds, len(counts)))  # (rounds, distinct sizes)
    flipped = (2 * positive - counts) @ sizes / len(differences)  # (rounds,)
    extreme_count = int((np.abs(flipped) >= abs(mean) - 1e-12).sum())
    values, counts = np.unique(differences, return_counts=True)
    drawn = rng.multinomial(len(differences), counts / len(differences), size=rounds)  # (rounds, distinct values)
    low, high = np.quantile(drawn @ values / len(differences), [0.025, 0.975])
    return Difference(mean, float(low), float(high), (extreme_count + 1) / (rounds + 1))
