"""The corpus, distinct texts by position, and retrieval tasks: queries with the positions that answer them."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.records import HELD_OUT_BY, read_queries
from embedding_finetune.data.texts import DIGEST_BYTES, TextsOnDisk, canonical, text_digest, text_id
from embedding_finetune.files import AnyPath

logger = logging.getLogger(__name__)


class Corpus:
    """Distinct texts in first-seen order; texts with the same canonical form count as one.

    `texts[p]` is the text at position p as it was first written; `duplicates` counts the repeats. Texts stay on disk.
    They are compared by 128-bit digests, and memory holds one digest for each text. Texts that only `beyond` holds get
    positions from len(corpus) on: they can be scored, but not retrieved.
    """

    def __init__(self, texts: Iterable[str], beyond: Iterable[str] = ()) -> None:
        digests = bytearray()
        sizes = []

        def digested() -> Iterable[str]:
            for part in (texts, beyond):
                for text in part:
                    digests.extend(text_digest(text))
                    yield text
                sizes.append(len(digests) // DIGEST_BYTES)

        self.texts = TextsOnDisk(digested())
        self._digests, first_seen = np.unique(np.frombuffer(digests, dtype="S16"), return_index=True)
        self._size = int((first_seen < sizes[0]).sum())
        self.duplicates = sizes[0] - self._size
        order = np.argsort(first_seen)
        self.texts.keep(first_seen[order])
        self._positions = np.empty_like(order)  # of the sorted digests
        self._positions[order] = np.arange(len(order))

    def __len__(self) -> int:
        return self._size

    def positions(self, texts: Sequence[str]) -> np.ndarray:
        """The position of each text, -1 for a text that is not here: (len(texts),) int64."""
        wanted = np.array([text_digest(text) for text in texts], dtype="S16")
        if not len(self._digests) or not len(wanted):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        return np.where(self._digests[places] == wanted, self._positions[places], -1)


class RetrievalTask(NamedTuple):
    """Queries, the corpus to search, and the answers to each query.

    relevant: the positions of a query's answers in the corpus. relevant_counts: how many distinct answers it has,
    including those that the corpus does not hold. ids name the queries in TREC files. groups: None for a query without.
    held_out_by: what all of them were kept out of training by, if so, see hold_out.py.
    """

    queries: list[str]
    corpus: Corpus
    relevant: list[set[int]]
    relevant_counts: list[int]
    ids: list[str]
    groups: list[str | None]
    held_out_by: str | None = None

    @property
    def missing(self) -> int:
        """How many answers the corpus does not hold."""
        return sum(self.relevant_counts) - sum(map(len, self.relevant))

    @property
    def unanswerable(self) -> int:
        """How many queries have no answer in the corpus."""
        return sum(not positions for positions in self.relevant)

    def count_queries_among(self, ids: np.ndarray) -> int:
        """How many queries have their text_id in ids (any,)."""
        return int(np.isin([text_id(query) for query in self.queries], ids).sum())


def load_task(query_file: AnyPath, corpus: Corpus, columns: Sequence[str] = ()) -> RetrievalTask:
    """Read queries from a file and find their positives in the corpus, see make_task."""
    return make_task(list(read_queries(query_file, columns)), corpus)


def make_task(rows: Sequence[Record], corpus: Corpus) -> RetrievalTask:
    """Find the positives of rows of read_queries in the corpus; a warning counts those that it does not hold."""
    answers = [corpus.positions(row["pos"]) for row in rows]
    digits = len(str(len(rows)))
    task = RetrievalTask(
        queries=[row["query"] for row in rows],
        corpus=corpus,
        relevant=[set(positions[positions >= 0].tolist()) for positions in answers],
        relevant_counts=[len({canonical(text) for text in row["pos"]}) for row in rows],
        ids=[str(row.get("id", f"{number:0{digits}d}")) for number, row in enumerate(rows)],
        groups=[row.get("group") for row in rows],
        held_out_by=_held_out_by(rows),
    )
    logger.info("%d queries, %d distinct passages (%d duplicates)", len(rows), len(corpus), corpus.duplicates)
    if task.unanswerable == len(rows):
        logger.warning("warning: no query has an answer in the corpus: all count as misses; is it the right file?")
    elif task.missing:
        logger.warning(
            "warning: %d positives are not in the corpus and cannot be found; %d queries have no other and "
            "count as misses",
            task.missing,
            task.unanswerable,
        )
    return task


def _held_out_by(rows: Sequence[Record]) -> str | None:
    """What all rows were held out by; None where some were not, or by something else."""
    kinds = [row.get(HELD_OUT_BY) for row in rows]
    return kinds[0] if isinstance(kinds[0], str) and kinds.count(kinds[0]) == len(kinds) else None
