"""Doubts: unlabelled passages that models rank above the right one, or just below it. Many are answers nobody labelled.

They harm twice: as negatives they teach a model what is wrong, and in an evaluation they count as errors. A person or a
language model settles them, see data/judgements.py.

Shapes: Q queries, K ranks of a ranking.
"""

import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from embedding_finetune.data import jsonl
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.texts import canonical
from embedding_finetune.retrieval.top_k import Ranking

logger = logging.getLogger(__name__)

RANKS_IN_DOUBT = 10
"""How many of the first passages of each ranking are looked at."""
MOST_DOUBTS = 1000
"""In a file."""
_BEYOND = 1000
"""Stands for the rank of a passage that a ranking does not reach."""
_CLOSE = 0.05
"""A passage within this share of the right one's score is in doubt although it stands below."""


class Witness(NamedTuple):
    """What a model says of the passages. positive_scores: (Q,), of the right passages, NaN where it is not known."""

    ranking: Ranking
    positive_scores: np.ndarray

    def places(self, query: int) -> dict[int, tuple[int, float]]:
        """Position -> rank, from 1, and score, of what is in the ranking of a query."""
        positions, scores = (array[query].tolist() for array in self.ranking)
        return {position: (rank, score) for rank, (position, score) in enumerate(zip(positions, scores), start=1)}


class Standing(NamedTuple):
    """Where a model puts a passage, and where the right one. Ranks are from 1; None beyond the ranking.

    Scores are None where they are not known.
    """

    rank: int | None
    score: float | None
    positive_rank: int | None
    positive_score: float | None

    @property
    def above(self) -> bool:
        """Whether the passage is known to stand above the right one."""
        if self.rank is None:
            return False
        if self.positive_rank is not None:
            return self.rank < self.positive_rank
        return self.positive_score is None or self.score is None or self.score > self.positive_score

    def both_among(self, ranks: int) -> bool:
        """Whether both passages are among the first ranks."""
        return self.rank is not None and self.positive_rank is not None and max(self.rank, self.positive_rank) <= ranks

    @property
    def margin(self) -> float | None:
        """By which share of the right one's score the passage's is higher; None where one is not known."""
        if self.score is None or self.positive_score is None:
            return None
        return (self.score - self.positive_score) / max(abs(self.positive_score), 1e-9)

    @property
    def doubtful(self) -> bool:
        """Whether the passage stands above the right one, or just below it."""
        return self.above or (self.margin is not None and self.margin >= -_CLOSE)


class Doubt(NamedTuple):
    """A query's number, the positions of a passage and of a right one, and where each model puts the two."""

    query: int
    passage: int
    positive: int
    standings: dict[str, Standing]

    @property
    def order(self) -> tuple[int, int, float]:
        """What sorts the most damaging doubts first.

        How many models put it above the right passage, how high they put the two, and how close their scores are. A
        model counts where both are among its first ten: a model that has not found the right passage puts anything
        above it.
        """
        standings = self.standings.values()
        above = sum(one.above and one.both_among(RANKS_IN_DOUBT) for one in standings)
        ranks = sum((one.rank or _BEYOND) + (one.positive_rank or _BEYOND) for one in standings)
        margins = [abs(one.margin) for one in standings if one.margin is not None]
        return -above, ranks, sum(margins) / len(margins) if margins else math.inf


def find_doubts(
    witnesses: Mapping[str, Witness], positives: Sequence[int], settled: Callable[[int], Container[int]]
) -> list[Doubt]:
    """The doubts of all queries, the most damaging first; of equal ones the first query's.

    positives: (Q,), the position of a right passage, -1 for a query that has none, and so no doubts. settled: for a
    query's number, the positions that are known to answer it or not to, and of the query itself.
    """
    doubts = []
    for number, positive in enumerate(positives):
        if positive < 0:
            continue
        known = settled(number)
        places = {name: witness.places(number) for name, witness in witnesses.items()}
        scores = {name: float(witness.positive_scores[number]) for name, witness in witnesses.items()}
        seen = dict.fromkeys(passage for ranked in places.values() for passage in islice(ranked, RANKS_IN_DOUBT))
        for passage in seen:
            if passage not in (-1, positive) and passage not in known:
                standings = {name: _standing(places[name], scores[name], passage, positive) for name in places}
                if any(standing.doubtful for standing in standings.values()):
                    doubts.append(Doubt(number, passage, positive, standings))
    return sorted(doubts, key=lambda doubt: doubt.order)


def _standing(places: Mapping[int, tuple[int, float]], known_score: float, passage: int, positive: int) -> Standing:
    """known_score: of the right passage, for where the ranking does not have it; NaN where it is not known."""
    rank, score = places.get(passage, (None, None))
    positive_rank, positive_score = places.get(positive, (None, None if math.isnan(known_score) else known_score))
    return Standing(rank, score, positive_rank, positive_score)


def write_doubts(path: str, doubts: Sequence[Doubt], queries: Sequence[str], texts: Sequence[str]) -> None:
    """Write the first doubts, each pair of texts once, to be filled in; a log line counts all.

    queries: (Q,). texts: of the corpus, by position.
    """
    lines = list(islice(_lines(doubts, queries, texts), MOST_DOUBTS))
    jsonl.write(path, lines)
    logger.info(
        "%s: %d passages may be answers that nobody labelled; the %d most damaging are there: fill in "
        '"relevant", and give the file as --judgements',
        *(path, len(doubts), len(lines)),
    )


def _lines(doubts: Sequence[Doubt], queries: Sequence[str], texts: Sequence[str]) -> Iterator[Record]:
    written: set[tuple[str, str]] = set()
    for doubt in doubts:
        query, passage = queries[doubt.query], texts[doubt.passage]
        pair = (canonical(query), canonical(passage))
        if pair not in written:
            written.add(pair)
            yield {
                "query": query,
                "passage": passage,
                "relevant": None,
                "positive": texts[doubt.positive],
                "models": {name: _rounded(standing) for name, standing in doubt.standings.items()},
            }


def _rounded(standing: Standing) -> Record:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in standing._asdict().items()}
