"""Retrieval measures over rankings, and whether two models differ by more than luck.

Shapes: Q queries, K ranks. `relevance` (Q, K) int is the grade of the passage at each rank, best first: from 1 where it
answers the query, else 0, also past the end of a small corpus. Every measure returns one float64 per query, (Q,), and 0
for a query with no relevant passage within the cutoff. Only nDCG looks at how high a grade is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SIGNIFICANT = 0.05
"""Below this p-value a difference of two models counts as more than luck."""
_LARGEST_CUTOFF = 10**300
"""Larger cutoffs count as this one, which still fits into a float."""
_ALWAYS_TOGETHER = 4096
"""So many distinct differences are drawn together in any case."""
_NUMBERS_AT_ONCE = 2**20
_ROUNDS_AT_ONCE = 8
"""Rounds are drawn in multiples of so many: BLAS adds in another order where 1 to 3 rows are left over."""


class Judged(NamedTuple):
    """What answers each query, found or not.

    counts: (Q,), how many texts or documents answer it. They include those that the corpus does not hold: they cannot
    be found, and count as misses. grades: (sum of counts,), query after query, each query's best first.
    """

    counts: np.ndarray
    grades: np.ndarray


def judged_of(relevant: Sequence[Mapping[int, int]]) -> Judged:
    """The judgements of RetrievalTask.relevant."""
    counts = np.array([len(grades) for grades in relevant], dtype=np.int64)
    grades = np.fromiter((grade for grades in relevant for grade in grades.values()), dtype=np.int64)
    return Judged(counts, grades[np.lexsort((-grades, np.repeat(np.arange(len(counts)), counts)))])


def mrr(relevance: np.ndarray, judged: Judged, cutoff: int) -> np.ndarray:
    """Reciprocal rank of the first relevant passage within the cutoff (Voorhees, TREC-8 1999)."""
    within = relevance[:, :cutoff] > 0
    if not within.shape[1]:
        return np.zeros(len(within))
    return np.where(within.any(axis=1), 1.0 / (within.argmax(axis=1) + 1), 0.0)


def hit(relevance: np.ndarray, judged: Judged, cutoff: int) -> np.ndarray:
    """1 where at least one relevant passage is within the cutoff, else 0."""
    return np.asarray((relevance[:, :cutoff] > 0).any(axis=1), dtype=np.float64)


def recall(relevance: np.ndarray, judged: Judged, cutoff: int) -> np.ndarray:
    """Share of what answers the query that is within the cutoff."""
    return (relevance[:, :cutoff] > 0).sum(axis=1) / judged.counts


def precision(relevance: np.ndarray, judged: Judged, cutoff: int) -> np.ndarray:
    """Number of relevant passages within the cutoff, divided by the cutoff, even if the corpus is smaller."""
    return (relevance[:, :cutoff] > 0).sum(axis=1) / float(min(cutoff, _LARGEST_CUTOFF))


def average_precision(relevance: np.ndarray, judged: Judged, cutoff: int) -> np.ndarray:
    """Sum of the precision at each relevant rank within the cutoff, divided by the number of what answers the query."""
    within = relevance[:, :cutoff] > 0
    at_rank = within.cumsum(axis=1) / np.arange(1, within.shape[1] + 1)
    return (at_rank * within).sum(axis=1) / judged.counts


def ndcg(relevance: np.ndarray, judged: Judged, cutoff: int) -> np.ndarray:
    """Discounted gain, grade / log2(rank + 1) per relevant passage, divided by that of an ideal ranking.

    The ideal ranks all that answers the query first, the highest grades before others, also what the corpus does not
    hold (Järvelin and Kekäläinen 2002, with linear gain as in trec_eval).
    """
    within = relevance[:, :cutoff]
    starts = judged.counts.cumsum() - judged.counts
    places = np.arange(len(judged.grades)) - np.repeat(starts, judged.counts)  # of each grade, in its query
    ideal_places = places < cutoff
    depth = max(within.shape[1], int(places[ideal_places].max(initial=-1)) + 1)  # a cutoff may be far beyond any rank
    discounts = 1.0 / np.log2(np.arange(2, depth + 2))
    ideal = np.bincount(
        np.repeat(np.arange(len(judged.counts)), judged.counts)[ideal_places],
        weights=judged.grades[ideal_places] * discounts[places[ideal_places]],
        minlength=len(judged.counts),
    )
    return within @ discounts[: within.shape[1]] / ideal


MEASURES = {"MRR": mrr, "Hit": hit, "Recall": recall, "nDCG": ndcg, "MAP": average_precision, "Precision": precision}


def relevance_of(positions: np.ndarray, relevant: Sequence[Mapping[int, int]]) -> np.ndarray:
    """The grade of the passage at each rank of positions (Q, K), as RetrievalTask.relevant has it, else 0: (Q, K)."""
    answers = np.fromiter((position for grades in relevant for position in grades), dtype=np.int64)
    if not len(answers) or not positions.size:
        return np.zeros(positions.shape, dtype=np.int64)
    grades = np.fromiter((grade for grades in relevant for grade in grades.values()), dtype=np.int64)
    # A query and a position make one integer, so that one search finds all of them.
    span = max(int(positions.max()), int(answers.max())) + 1
    wanted = np.repeat(np.arange(len(relevant)), [len(grades) for grades in relevant]) * span + answers
    order = np.argsort(wanted)
    wanted, grades = wanted[order], grades[order]
    ranked = np.arange(len(positions))[:, None] * span + positions  # (Q, K)
    places = np.searchsorted(wanted, ranked).clip(max=len(wanted) - 1)
    return np.where((wanted[places] == ranked) & (positions >= 0), grades[places], 0)


def per_query(
    relevance: np.ndarray, judged: Judged, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """`{"MRR@1": (Q,), "Hit@1": (Q,), ...}`, cutoff by cutoff."""
    return {f"{name}@{k}": MEASURES[name](relevance, judged, k) for k in cutoffs for name in measures}


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each measure over all queries."""
    return {name: float(scores.mean()) for name, scores in values.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one comparison on several measures, corrected for their number (Holm 1979): in the same order.

    Below 0.05 a difference that is luck passes in one of twenty comparisons, however many measures there are.
    The smallest of m is multiplied with m, the next with m - 1, and so on; none becomes less than one before it.
    """
    order = np.argsort(p_values, kind="stable")
    multiplied = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(multiplied), 1)
    return [float(value) for value in corrected]


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
    the 97.5% quantile of the mean over queries drawn with replacement (Efron 1979).

    Queries with equal differences are drawn together, with binomial and multinomial numbers. The distributions are the
    same, and take no more time for more queries. Of very many distinct differences each query is drawn by itself.
    """
    rng = np.random.default_rng(seed)
    differences = other - base
    mean = float(differences.mean())
    flipped = _with_random_signs(np.abs(differences), rng, rounds)
    extreme_count = int((np.abs(flipped) >= abs(mean) - 1e-12).sum())
    low, high = np.quantile(_resampled(differences, rng, rounds), [0.025, 0.975])
    return Difference(mean, float(low), float(high), (extreme_count + 1) / (rounds + 1))


def _with_random_signs(sizes: np.ndarray, rng: np.random.Generator, rounds: int) -> np.ndarray:
    """The mean of sizes (Q,) with random signs, drawn anew for each round: (rounds,)."""
    values, counts = np.unique(sizes, return_counts=True)
    sums = []
    if _are_many(values, sizes):
        for n in _blocks(rounds, len(sizes)):
            bits = rng.integers(0, 256, (n, (len(sizes) + 7) // 8), dtype=np.uint8)
            is_positive = np.unpackbits(bits, axis=1, count=len(sizes))  # (n, Q)
            # Not as a matrix product: BLAS splits it, and its threads wait for one another where cores are busy.
            sums.append(2 * (is_positive * sizes).sum(axis=1) - sizes.sum())
    else:
        for n in _blocks(rounds, len(values)):
            positive = rng.binomial(counts, 0.5, size=(n, len(counts)))  # (n, distinct sizes)
            sums.append((2 * positive - counts) @ values)
    return np.concatenate(sums) / len(sizes)


def _resampled(differences: np.ndarray, rng: np.random.Generator, rounds: int) -> np.ndarray:
    """The mean of differences (Q,) over queries drawn with replacement, anew for each round: (rounds,)."""
    values, counts = np.unique(differences, return_counts=True)
    queries = len(differences)
    if _are_many(values, differences):
        sums = [differences[rng.integers(0, queries, (n, queries))].sum(axis=1) for n in _blocks(rounds, queries)]
    else:
        shares = counts / queries
        # Numbers (n, distinct values): how often each value is drawn.
        sums = [rng.multinomial(queries, shares, size=n) @ values for n in _blocks(rounds, len(values))]
    return np.concatenate(sums) / queries


def _are_many(distinct: np.ndarray, queries: np.ndarray) -> bool:
    """Whether it is faster to draw each query by itself: a binomial number takes as long as some 30 plain ones."""
    return len(distinct) > max(_ALWAYS_TOGETHER, len(queries) // 30)


def _blocks(rounds: int, width: int) -> Iterator[int]:
    """How many rounds to draw at once, of `width` numbers each, so that they take little memory."""
    size = max(_NUMBERS_AT_ONCE // width, _ROUNDS_AT_ONCE) // _ROUNDS_AT_ONCE * _ROUNDS_AT_ONCE
    for start in range(0, rounds, size):
        yield min(size, rounds - start)
