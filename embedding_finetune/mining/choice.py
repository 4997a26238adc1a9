"""Choosing the negatives of one row from its ranked candidates.

Candidates are known by their positions in the corpus; texts play no part here.

Shapes: Q queries, W ranks of the sampling window, P pairs of a query and one of its positives.
"""

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Strategy = Literal["random", "top"]


class ScoreFilters(NamedTuple):
    """Which scores a negative may have; None switches a filter off.

    max_score, min_score: bounds on the score itself. absolute_margin M: score <= positive - M. relative_margin R:
    score <= positive - R * |positive|, which tightens where the positive's score is negative too; R = 0.05 is
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
        """Which filter, counted from 1 in the order of FILTERS, is the first to refuse a candidate; 0 for none.

        scores: (Q, W). lowest_positive: (Q,), the score of the query's lowest-scoring positive. Returns (Q, W) uint8.
        """
        scores, positive = scores.astype(np.float64), lowest_positive.astype(np.float64)[:, None]
        refused = np.zeros(scores.shape, dtype=np.uint8)

        def refuse(filter_number: int, where: np.ndarray) -> None:
            refused[where & (refused == 0)] = filter_number

        if self.max_score is not None:
            refuse(1, scores > self.max_score)
        if self.min_score is not None:
            refuse(2, scores < self.min_score)
        if self.absolute_margin is not None:
            refuse(3, scores > positive - self.absolute_margin)
        if self.relative_margin is not None:
            refuse(4, scores > positive - self.relative_margin * np.abs(positive))
        return refused


FILTERS = tuple(f"--{name}" for name in ScoreFilters._fields)
"""What an account calls the filters."""
DRAWN, KEPT = "(drawn at random)", "(of the input)"
"""What it puts behind a reason that was met elsewhere than among the ranks to sample from."""


class Selection(NamedTuple):
    """The negatives of one row: positions in the corpus, and their scores, NaN where they are not known yet.

    The first `kept` of them the row had before; the last `random_fills` were drawn from outside the ranking. `dropped`
    counts, by reason, what could not be taken.
    """

    negatives: list[int]
    scores: list[float]
    kept: int
    random_fills: int
    dropped: Counter[str]


def lowest_scores(rows: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """The lowest of each row's scores: rows and scores (P,), rows below count -> (count,), +inf for a row with none."""
    lowest = np.full(count, np.inf, dtype=np.float32)
    np.minimum.at(lowest, rows, scores)
    return lowest


def select_negatives(
    ranking: Sequence[int],
    scores: Sequence[float],
    refused_by: Sequence[int],
    *,
    window: tuple[int, int],
    count: int,
    excluded: Mapping[int, str],
    corpus_size: int,
    rng: random.Random,
    strategy: Strategy = "random",
    kept: Mapping[int, float] | None = None,
) -> Selection:
    """Choose negatives of one query from the slice [start:stop) of its ranking until there are `count`.

    ranking: positions, best first; negative ones mark places past the end of a small corpus. scores, refused_by: of
    the slice, the latter as ScoreFilters.refusals gives it. excluded: position -> reason, for every text that must not
    become a negative. kept: negatives that the row has already and their scores, none excluded; all of them come first.

    "random" samples the others, "top" takes them in order. What the window cannot give is filled with random candidates
    from outside ranking[:stop], see draw_outside; fewer come back when the corpus has no more.
    """
    start, stop = window
    retrieved = [position for position in ranking[:stop] if position >= 0]
    kept = kept or {}
    dropped: Counter[str] = Counter()
    eligible: list[int] = []  # places in the window
    for place, position in enumerate(retrieved[start:]):
        if position in excluded:
            dropped[excluded[position]] += 1
        elif refused_by[place]:
            dropped[FILTERS[refused_by[place] - 1]] += 1
        elif position not in kept:
            eligible.append(place)
    wanted = max(count - len(kept), 0)
    chosen = rng.sample(eligible, min(wanted, len(eligible))) if strategy == "random" else eligible[:wanted]
    fills: list[int] = []
    if len(chosen) < wanted:
        refused = excluded.keys() | kept.keys() | set(retrieved)
        fills = draw_outside(refused, wanted - len(chosen), corpus_size, rng)
    return Selection(
        [*kept, *(retrieved[start + place] for place in chosen), *fills],
        [*kept.values(), *(float(scores[place]) for place in chosen), *([float("nan")] * len(fills))],
        len(kept),
        len(fills),
        dropped,
    )


def draw_outside(refused: Collection[int], count: int, corpus_size: int, rng: random.Random) -> list[int]:
    """Up to `count` distinct positions below corpus_size, drawn at random, none of them in the set `refused`."""
    # Of a sample this large without replacement, at most len(refused) cannot be taken.
    drawn = rng.sample(range(corpus_size), min(corpus_size, count + len(refused)))
    return [position for position in drawn if position not in refused][:count]


def row_rng(seed: int, row: int, attempt: int = 0) -> random.Random:
    """The generator of one row's choices: a function of the seed, the row's number and the attempt alone."""
    return random.Random(f"{seed}:{row}:{attempt}" if attempt else f"{seed}:{row}")
