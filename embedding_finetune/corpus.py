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
    """Queries, the corpus to search, and per query the positions of the texts that answer it."""

    queries: list[str]
    corpus: Corpus
    relevant: list[set[int]]


def load_task(query_file: str | os.PathLike, corpus: Corpus) -> RetrievalTask:
    """Read queries and find their positives in the corpus; a warning counts those that it does not hold."""
    rows = list(read_queries(query_file))
    found = [[corpus.position(text) for text in row["pos"]] for row in rows]
    relevant = [{position for position in positions if position is not None} for positions in found]
    logger.info("%d queries, %d distinct passages", len(rows), len(corpus))
    missing = sum(position is None for positions in found for position in positions)
    if missing:
        logger.warning(
            "warning: %d positives are not in the corpus and cannot be found; %d queries have none that can, "
            "and count as misses",
            missing,
            sum(not positions for positions in relevant),
        )
    return RetrievalTask([row["query"] for row in rows], corpus, relevant)
