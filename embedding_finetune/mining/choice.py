"""Choosing the negatives of one row from its ranked candidates.

Candidates are positions in the corpus; their texts are not used here.

Shapes: Q queries, W ranks of the sampling window, P pairs of a query and one of its positives.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Strategy = Literal["random", "top"]


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
DRAWN_AT_RANDOM, FROM_INPUT = "(drawn at random)", "(of the input)"
"""Follow a reason in the audit where it concerns candidates from elsewhere than the ranks to sample from."""


@dataclass
class Selection:
    """The negatives of one row: positions in the corpus, and their scores, NaN where they are not known yet.

    The first `kept` of them come from the input; the last `random_fills` were drawn from outside the ranking. `dropped`
    counts, by reason, the candidates that could not be taken.
    """

    negatives: list[int]
    scores: list[float]
    kept: int
    random_fills: int
    dropped: Counter[str]


def lowest_scores(rows: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """The lowest of each row's scores: (count,), +inf for a row without any. rows, scores: (P,), rows below count."""
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
    """Choose up to `count` negatives of one query from the window [start:stop) of its ranking.

    ranking: positions, best first; -1 past the end of a small corpus. scores, refused_by: of the window, the latter as
    ScoreFilters.refusals returns it. excluded: position -> reason, for every text that must not become a negative.
    kept: the row's existing negatives and their scores, none of them excluded; all come first.

    "random" samples the others, "top" takes them in order. Missing ones are drawn at random from outside
    ranking[:stop], see draw_outside. The result has fewer when the corpus has no more.
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
            dropped[FILTERS[refused_by[place]]] += 1
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
    # At most len(refused) of a sample without replacement cannot be taken, so this many are enough.
    drawn = rng.sample(range(corpus_size), min(corpus_size, count + len(refused)))
    return [position for position in drawn if position not in refused][:count]


def row_rng(seed: int, row: int, attempt: int = 0) -> random.Random:
    """The generator of one row's choices: it depends only on the seed, the row's number and the attempt."""
    return random.Random(f"{seed}:{row}:{attempt}" if attempt else f"{seed}:{row}")
