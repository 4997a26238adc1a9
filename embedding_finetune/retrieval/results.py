"""Scores of pairs, the same whatever their neighbours, and results: a score and a position in one 64-bit integer.

The last bit of a matrix product depends on its shape, so equal vectors may get unequal scores. The final scores are
therefore computed pair by pair in float64 and rounded to float32, and ties are decided by position.

Of two results the smaller integer is the better. Lists of results are merged by sorting. At the end they are split into
positions and scores, of 32 bits each, where they stand: the rankings of 100,000 queries are most of a run's memory.

Shapes: Q queries, n passages in a block, H dimensions, P pairs, k results per query.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Ties = Literal["first", "last"]
"""Which of two passages with equal scores ranks higher: the one that comes first, or last."""

NO_RESULT = np.iinfo(np.int64).max
"""The result that stands where there is none: it sorts last."""
MOST_PASSAGES = 2**31 - 1
"""Of a corpus: a position is an int32 once results are split, and -1 stands past the end."""
LOW_BITS = 2**32 - 1
SIGNLESS_BITS = 2**31 - 1
SPARE_RESULTS = 8
"""Results that are taken from a block beyond k, so that most ties at the k-th place need no second look."""

_VALUES_PER_CHUNK = 2**16
"""As float64 they stay in the cache of a CPU core: 2^23 took 3 to 4 times as long, with the same bits."""


def as_results(scores: np.ndarray, positions: np.ndarray, ties: Ties) -> np.ndarray:
    """Scores and positions, of the same shape, as integers whose ascending order is best first.

    The high 32 bits hold the score, the low ones the position, so that the better of two ties is the smaller integer.
    """
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # adding 0 makes one of the two zeros
    ascending = np.where(bits < 0, bits ^ SIGNLESS_BITS, bits)  # in IEEE 754 negative numbers sort backwards
    low = positions if ties == "first" else np.int64(LOW_BITS) - positions
    return (~ascending << 32) | low


def scores_of(results: np.ndarray) -> np.ndarray:
    """The float32 scores of results; -inf where there is no result."""
    ascending = ~(results >> 32)
    bits = np.where(ascending < 0, ascending ^ SIGNLESS_BITS, ascending).astype(np.int32)
    return np.where(results == NO_RESULT, np.float32(-np.inf), bits.view(np.float32))


def positions_of(results: np.ndarray, ties: Ties) -> np.ndarray:
    """The positions of results; -1 where there is no result."""
    low = results & LOW_BITS
    return np.where(results == NO_RESULT, -1, low if ties == "first" else LOW_BITS - low)


def best_of(lists: Sequence[np.ndarray], top_k: int) -> np.ndarray:
    """The k best of several lists of results (Q, any) for the same queries: (Q, k), ascending."""
    return np.sort(np.concatenate(lists, axis=1), axis=1)[:, :top_k]


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


def rounding_error(dimensions: int) -> float:
    """A generous bound on the float32 rounding of an inner product of H terms, for vectors of length 1."""
    return float(4 * np.finfo(np.float32).eps * np.sqrt(dimensions))


def longest(vectors: np.ndarray) -> float:
    """The length of the longest of vectors (n, H); 0 where there is none."""
    return float(np.sqrt(np.einsum("nh,nh->n", vectors, vectors).max(initial=0)))
