"""Choosing the negatives of one row from its ranked candidates.

Candidates are positions in the corpus; their texts are not used here.

Shapes: P pairs of a query and one of its positives.
"""

import math
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from embedding_finetune.mining.filters import FILTERS

Strategy = Literal["random", "top"]


DRAWN_AT_RANDOM, FROM_INPUT = "(drawn at random)", "(of the input)"
"""Follow a reason in the audit where it concerns candidates from elsewhere than the ranks to sample from."""


@dataclass(slots=True)
class Selection:
    """The negatives of one row: positions in the corpus, and their scores, NaN where they are not known yet.

    The first `confirmed` of them were judged not to answer the query, and the next `kept` come from the input; the last
    `random_fills` were drawn from outside the ranking. `dropped` counts, by reason, the candidates that could not be
    taken. select_negatives gives arrays: a list has an object of 32 bytes for each number.
    """

    negatives: MutableSequence[int]
    scores: MutableSequence[float]
    kept: int
    random_fills: int
    dropped: Counter[str]
    confirmed: int = 0


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
    confirmed: int = 0,
) -> Selection:
    """Choose up to `count` negatives of one query from the window [start:stop) of its ranking.

    ranking: positions, best first; -1 past the end of a small corpus. scores, refused_by: of the window, the latter as
    ScoreFilters.refusals returns it. excluded: position -> reason, for every text that must not become a negative.
    kept: the row's negatives that stay, and their scores; all come first. confirmed: how many of them were judged.

    "random" samples the others, "top" takes them in order. Missing ones are drawn at random from outside
    ranking[:stop], see draw_outside. The result has fewer when the corpus has no more.
    """
    start, stop = window
    retrieved = [position for position in ranking[:stop] if position >= 0]
    kept = kept or {}
    dropped: Counter[str] = Counter()
    eligible: list[int] = []  # places in the window
    for place, position in enumerate(retrieved[start:]):
        if position in kept:
            continue
        if position in excluded:
            dropped[excluded[position]] += 1
        elif refused_by[place]:
            dropped[FILTERS[refused_by[place]]] += 1
        else:
            eligible.append(place)
    wanted = max(count - len(kept), 0)
    chosen = rng.sample(eligible, min(wanted, len(eligible))) if strategy == "random" else eligible[:wanted]
    fills: list[int] = []
    if len(chosen) < wanted:
        fills = draw_outside(excluded, [*kept, *retrieved], wanted - len(chosen), corpus_size, rng)
    return Selection(
        array("q", [*kept, *(retrieved[start + place] for place in chosen), *fills]),
        array("d", [*kept.values(), *(scores[place] for place in chosen), *([math.nan] * len(fills))]),
        len(kept) - confirmed,
        len(fills),
        dropped,
        confirmed,
    )


def draw_outside(
    excluded: Mapping[int, str], others: Iterable[int], count: int, corpus_size: int, rng: random.Random
) -> list[int]:
    """Up to `count` distinct positions below corpus_size, drawn at random, none of them among excluded or others.

    The time that it takes depends on the others, and hardly on how many are excluded.
    """
    refused = {position for position in others if position not in excluded}
    # At most so many of a sample without replacement cannot be taken, so this many are enough.
    most = min(corpus_size, count + len(excluded) + len(refused))
    drawn = sample_one_by_one(corpus_size, most, rng)
    return list(islice((position for position in drawn if position not in refused and position not in excluded), count))


def sample_one_by_one(size: int, count: int, rng: random.Random) -> Iterator[int]:
    """What rng.sample(range(size), count) gives, number by number: who stops early does not pay for the rest.

    The algorithm is that of Python's random.sample, with its choice of one of two ways: a seed gives what it gave.
    """
    set_size = 21 + (4 ** math.ceil(math.log(count * 3, 4)) if count > 5 else 0)
    if size <= set_size:  # the list of all is shuffled from its beginning; only the places that changed are kept
        changed: dict[int, int] = {}
        for drawn in range(count):
            place, last = rng.randrange(size - drawn), size - drawn - 1
            yield changed.get(place, place)
            changed[place] = changed.get(last, last)
        return
    seen: set[int] = set()
    for _ in range(count):
        while (number := rng.randrange(size)) in seen:
            pass
        seen.add(number)
        yield number


def row_rng(seed: int, row: int, attempt: int = 0) -> random.Random:
    """The generator of one row's choices: it depends only on the seed, the row's number and the attempt."""
    return random.Random(f"{seed}:{row}:{attempt}" if attempt else f"{seed}:{row}")
