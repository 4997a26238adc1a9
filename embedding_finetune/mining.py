"""Choosing negatives from ranked candidates, and the account of what was chosen and why.

Candidates are known by their positions in the corpus; texts play no part here.

Shapes: Q queries, W ranks of the sampling window, P pairs of a query and one of its positives.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
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


class Selection(NamedTuple):
    """The negatives of one row: positions in the corpus, and their scores, NaN where they are not known yet.

    The first `kept` of them the row had before; the last `random_fills` were drawn from outside the ranking. `dropped`
    counts, by reason, what the window held but could not be taken.
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
    kept: Sequence[int] = (),
) -> Selection:
    """Choose negatives of one query from the slice [start:stop) of its ranking until there are `count`.

    ranking: positions, best first; negative ones mark places past the end of a small corpus. scores, refused_by: of
    the slice, the latter as ScoreFilters.refusals gives it. excluded: position -> reason, for every text that must not
    become a negative. kept: negatives that the row has already, distinct and not excluded; all of them come first.

    "random" samples the others, "top" takes them in order. What the window cannot give is filled with random candidates
    from outside ranking[:stop], never an excluded one, never twice; fewer come back when the corpus has no more.
    """
    start, stop = window
    retrieved = [position for position in ranking[:stop] if position >= 0]
    own = set(kept)
    dropped: Counter[str] = Counter()
    eligible: list[int] = []  # places in the window
    for place, position in enumerate(retrieved[start:]):
        if position in excluded:
            dropped[excluded[position]] += 1
        elif refused_by[place]:
            dropped[FILTERS[refused_by[place] - 1]] += 1
        elif position not in own:
            eligible.append(place)
    wanted = max(count - len(kept), 0)
    chosen = rng.sample(eligible, min(wanted, len(eligible))) if strategy == "random" else eligible[:wanted]
    fills: list[int] = []
    if len(chosen) < wanted:
        refused = excluded.keys() | own | set(retrieved)
        missing = wanted - len(chosen)
        # Of a sample this large without replacement, at most len(refused) cannot be taken.
        drawn = rng.sample(range(corpus_size), min(corpus_size, missing + len(refused)))
        fills = [position for position in drawn if position not in refused][:missing]
    return Selection(
        [*kept, *(retrieved[start + place] for place in chosen), *fills],
        [*([float("nan")] * len(kept)), *(float(scores[place]) for place in chosen), *([float("nan")] * len(fills))],
        len(kept),
        len(fills),
        dropped,
    )


def row_rng(seed: int, row: int) -> random.Random:
    """The generator of one row's choices: a function of the seed and the row's number alone."""
    return random.Random(f"{seed}:{row}")
