"""What can be retrieved, the distinct texts known by their positions, and what should be."""

import logging
import os
from collections.abc import Iterable
from typing import NamedTuple

from embedding_finetune.jsonl import canonical, read_queries

logger = logging.getLogger(__name__)


class Corpus:
    """Texts in first-seen order; texts that are equal in canonical form are one.

    `texts[p]` is the text at position p as it was first written; `duplicates` counts the others.
    """

    def __init__(self, texts: Iterable[str]):
        self.texts: list[str] = []
        self.duplicates = 0
        self._positions: dict[str, int] = {}
        for text in texts:
            if self._positions.setdefault(canonical(text), len(self.texts)) == len(self.texts):
                self.texts.append(text)
            else:
                self.duplicates += 1

    def __len__(self) -> int:
        return len(self.texts)

    def position(self, text: str) -> int | None:
        """Where `text` stands, or None when it is not in the corpus."""
        return self._positions.get(canonical(text))


class RetrievalTask(NamedTuple):
    """Queries, the corpus to search, and what answers each query.

    relevant: the positions of its answers in the corpus; relevant_counts: how many distinct answers it has, those that
    the corpus does not hold included. ids name the queries in TREC files; groups are None where a query has none.
    """

    queries: list[str]
    corpus: Corpus
    relevant: list[set[int]]
    relevant_counts: list[int]
    ids: list[str]
    groups: list[str | None]

    @property
    def missing(self) -> int:
        """How many answers the corpus does not hold."""
        return sum(self.relevant_counts) - sum(map(len, self.relevant))

    @property
    def unanswerable(self) -> int:
        """How many queries have no answer in the corpus."""
        return sum(not positions for positions in self.relevant)


def load_task(query_file: str | os.PathLike, corpus: Corpus) -> RetrievalTask:
    """Read queries and find their positives in the corpus; a warning counts those that it does not hold."""
    rows = list(read_queries(query_file))
    answers = [{canonical(text): corpus.position(text) for text in row["pos"]} for row in rows]
    digits = len(str(len(rows)))
    task = RetrievalTask(
        queries=[row["query"] for row in rows],
        corpus=corpus,
        relevant=[{position for position in found.values() if position is not None} for found in answers],
        relevant_counts=[len(found) for found in answers],
        ids=[str(row.get("id", f"{number:0{digits}d}")) for number, row in enumerate(rows)],
        groups=[row.get("group") for row in rows],
    )
    logger.info("%d queries, %d distinct passages (%d duplicates)", len(rows), len(corpus), corpus.duplicates)
    if task.missing:
        logger.warning(
            "warning: %d positives are not in the corpus and cannot be found; %d queries have none that can, "
            "and count as misses",
            task.missing,
            task.unanswerable,
        )
    return task
