"""Choosing negatives from ranked candidates, and the account of what was chosen and why.

Candidates are known by their positions in the corpus; texts play no part here.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Selection(NamedTuple):
    """The negatives of one row: positions in the corpus.

    The last `random_fills` of them were drawn from outside the ranking; `dropped` counts what
    the window held but could not be taken, by reason.
    """

    negatives: list[int]
    random_fills: int
    dropped: Counter[str]


def select_negatives(
    ranking: Iterable[int],
    *,
    window: tuple[int, int],
    count: int,
    excluded: Mapping[int, str],
    corpus_size: int,
    rng: random.Random,
) -> Selection:
    """Sample `count` negatives of one query from the slice [start:stop) of its ranking.

    ranking: positions, best first; negative ones mark places past the end of a small corpus.
    excluded: position -> reason, for every text that must not become a negative. What the window
    cannot give is filled with random candidates from outside ranking[:stop], never an excluded one,
    never twice; fewer come back when the corpus has no more.
    """
    start, stop = window
    retrieved = [position for position in ranking if position >= 0][:stop]
    in_window = retrieved[start:]
    dropped = Counter(excluded[position] for position in in_window if position in excluded)
    eligible = [position for position in in_window if position not in excluded]
    negatives = rng.sample(eligible, min(count, len(eligible)))
    fills: list[int] = []
    if len(negatives) < count:
        refused = excluded.keys() | set(retrieved)
        wanted = count - len(negatives)
        # Of a sample this large without replacement, at most len(refused) cannot be taken.
        drawn = rng.sample(range(corpus_size), min(corpus_size, wanted + len(refused)))
        fills = [position for position in drawn if position not in refused][:wanted]
    return Selection(negatives + fills, len(fills), dropped)


def row_rng(seed: int, row: int) -> random.Random:
    """The generator of one row's choices: a function of the seed and the row's number alone."""
    return random.Random(f"{seed}:{row}")
