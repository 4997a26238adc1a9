"""The corpus, distinct texts by position, and retrieval tasks: queries with the positions that answer them."""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.qrels import read_judgements
from embedding_finetune.data.records import HELD_OUT_BY, read_passages, read_queries
from embedding_finetune.data.texts import (
    DIGEST_BYTES,
    Instructions,
    TextsOnDisk,
    canonical,
    raw_digests,
    text_digest,
    text_id,
)
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

    def digest(self) -> str:
        """A hash of all texts, whatever their order."""
        return hashlib.blake2b(self._digests.tobytes(), digest_size=DIGEST_BYTES).hexdigest()

    def digest_in_order(self) -> str:
        """A hash of all texts and of their positions."""
        digests = np.empty_like(self._digests)
        digests[self._positions] = self._digests
        return hashlib.blake2b(digests.tobytes(), digest_size=DIGEST_BYTES).hexdigest()

    def positions(self, texts: Sequence[str]) -> np.ndarray:
        """The position of each text, -1 for a text that is not here: (len(texts),) int64."""
        wanted = np.array([text_digest(text) for text in texts], dtype="S16")
        if not len(self._digests) or not len(wanted):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        return np.where(self._digests[places] == wanted, self._positions[places], -1)

    def docid(self, position: int) -> str:
        """A position, zero-padded so that docids sort as positions do; `missing12` from len(corpus) on."""
        return f"{position:0{len(str(len(self)))}d}" if position < len(self) else f"missing{position}"


class Documents:
    """The documents of a BEIR corpus, each with an id, in ascending order of ids, whatever the order of the file.

    `texts[p]` is the text at position p. Documents without text have positions from len(documents) on: they may be
    right answers, and cannot be found. `distinct` (M,): the positions whose text no later document has. `text_numbers`
    (N,): for each document, the place of its text among these. `duplicates` counts the other documents.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ids: list[str] = []
        empty: list[str] = []
        digests = bytearray()

        def texts() -> Iterable[str]:
            for name, text in beir.read_documents(path):
                (ids if text else empty).append(name)
                if text:
                    digests.extend(raw_digests([text]).tobytes())
                    yield text

        self.texts = TextsOnDisk(texts())
        if not ids:
            raise UserError(f"{path}: no document has a title or a text")
        beir.log_skipped(path, len(empty))
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__))
        self.texts.keep(order)
        self.ids = [*(ids[number] for number in order.tolist()), *sorted(empty)]
        _, last, numbers = np.unique(
            np.frombuffer(digests, dtype="S16")[order][::-1], return_index=True, return_inverse=True
        )
        last = len(order) - 1 - last  # of each text, by digest
        self.distinct = np.sort(last)
        self.text_numbers = np.searchsorted(self.distinct, last[numbers[::-1]])
        self.duplicates = len(order) - len(last)

    def __len__(self) -> int:
        return len(self.texts)

    def docid(self, position: int) -> str:
        """The id of the document at a position."""
        return self.ids[position]


class RetrievalTask(NamedTuple):
    """Queries, the corpus to search, and the answers to each query.

    relevant: for each query, the positions of its answers, and how relevant each is, from 1. Answers that the corpus
    does not hold have positions from len(corpus) on. ids name the queries in TREC files. groups: None for a query
    without. instructions: those that queries have of their own.
    held_out_by: what all of them were kept out of training by, if so, see hold_out.py. unanswered: further questions,
    which the corpus does not answer; they are in no measure.
    """

    queries: list[str]
    corpus: Corpus | Documents
    relevant: list[dict[int, int]]
    ids: list[str]
    groups: list[str | None]
    instructions: Instructions = None
    held_out_by: str | None = None
    unanswered: "RetrievalTask | None" = None

    def asked(self) -> "RetrievalTask":
        """The task with the questions that the corpus does not answer behind the others."""
        if self.unanswered is None:
            return self
        parts = (self, self.unanswered)
        return self._replace(
            queries=[query for part in parts for query in part.queries],
            instructions=[own for part in parts for own in part.instructions or [None] * len(part.queries)],
        )

    def findable(self, number: int) -> list[int]:
        """The positions of a query's answers that the corpus holds, in ascending order."""
        return sorted(position for position in self.relevant[number] if position < len(self.corpus))

    @property
    def findable_answers(self) -> set[int]:
        """The positions of all queries' answers that the corpus holds."""
        return {position for number in range(len(self.queries)) for position in self.findable(number)}

    @property
    def missing(self) -> int:
        """How many answers the corpus does not hold."""
        return sum(position >= len(self.corpus) for positions in self.relevant for position in positions)

    @property
    def unanswerable(self) -> int:
        """How many queries have no answer in the corpus."""
        return sum(not self.findable(number) for number in range(len(self.queries)))

    def count_queries_among(self, ids: np.ndarray) -> int:
        """How many queries have their text_id in ids (any,)."""
        return int(np.isin([text_id(query) for query in self.queries], ids).sum())


def read_corpus(path: AnyPath, columns: Sequence[str] = ()) -> Corpus | Documents:
    """The passages to search in: the distinct texts of a file, or all documents of a BEIR folder."""
    return Documents(beir.corpus_file(path)) if beir.is_beir(path) else Corpus(read_passages(path, columns))


def load_task(
    query_file: AnyPath, corpus: Corpus | Documents, columns: Sequence[str] = (), *, may_lack_answers: bool = False
) -> RetrievalTask:
    """Read queries from a file and find their positives in the corpus, see make_task; or those of a BEIR folder.

    may_lack_answers: whether a query's `pos` may be empty; such queries become `unanswered`, if others are not. Raises
    UserError where one of the two is of a BEIR folder, and the other is not.
    """
    if beir.is_beir(query_file):
        if not isinstance(corpus, Documents):
            raise UserError(
                f"{query_file}: its judgements are about ids of documents: give {beir.folder_of(query_file)} as the "
                "passages too"
            )
        return _make_beir_task(beir.find_split(query_file, "test"), corpus)
    if isinstance(corpus, Documents):
        raise UserError(
            f"{query_file}: is no BEIR folder, and the passages are one's, known by their ids: give a BEIR folder as "
            f"the queries too, or {corpus.path} as the passages"
        )
    rows = list(read_queries(query_file, columns, may_lack_answers=may_lack_answers))
    if not all(row["pos"] for row in rows):  # ids stay those of the places in the file
        rows = [{**row, "id": name} for row, name in zip(rows, _ids(rows))]
    answered = [row for row in rows if row["pos"]]
    if rows and not answered:
        answered = list(read_queries(query_file, columns))  # which raises
    task = make_task(answered, corpus)
    if len(answered) == len(rows):
        return task
    others = [row for row in rows if not row["pos"]]
    logger.info("%d further questions have no answer: they are in no measure, and count in --thresholds", len(others))
    return task._replace(unanswered=_task_of(others, corpus))


def make_task(rows: Sequence[Record], corpus: Corpus) -> RetrievalTask:
    """Find the positives of rows of read_queries in the corpus; a warning counts those that it does not hold."""
    beyond = itertools.count(len(corpus))
    relevant = []
    for row in rows:
        positions = corpus.positions(row["pos"])
        found = dict.fromkeys(positions[positions >= 0].tolist(), 1)
        missing = len({canonical(text) for text in row["pos"]}) - len(found)
        relevant.append({**found, **dict.fromkeys(itertools.islice(beyond, missing), 1)})
    task = _task_of(rows, corpus)._replace(relevant=relevant)
    logger.info("%d queries, %d distinct passages (%d duplicates)", len(rows), len(corpus), corpus.duplicates)
    _warn_of_missing(task)
    return task


def _task_of(rows: Sequence[Record], corpus: Corpus) -> RetrievalTask:
    """The queries of rows, with no answer known."""
    return RetrievalTask(
        queries=[row["query"] for row in rows],
        corpus=corpus,
        relevant=[{} for _ in rows],
        ids=_ids(rows),
        groups=[row.get("group") for row in rows],
        instructions=[row.get("instruction") for row in rows],
        held_out_by=_held_out_by(rows),
    )


def _ids(rows: Sequence[Record]) -> list[str]:
    """The rows' own ids, or their numbers, with zeros before them so that they sort."""
    digits = len(str(len(rows)))
    return [str(row.get("id", f"{number:0{digits}d}")) for number, row in enumerate(rows)]


def _make_beir_task(split: beir.Split, corpus: Documents) -> RetrievalTask:
    """The queries of a split that have an answer, with their grades; a log line counts the others."""
    judgements = read_judgements(split.qrels)
    position_of = {name: position for position, name in enumerate(corpus.ids)}
    judged = {document for documents in judgements.values() for document in documents}
    queries = {name: text for _, name, text in beir.read_judged_queries(split, judgements)}
    beir.check_all_found(
        split._replace(corpus=corpus.path), judgements.keys() - queries.keys(), judged - position_of.keys()
    )
    relevant = {
        name: {position_of[document]: score for document, score in judgements[name].items() if score > 0}
        for name in queries
    }
    answered = [name for name, answers in relevant.items() if answers]
    beir.log_without_answer(split, len(queries) - len(answered), len(queries))
    task = RetrievalTask(
        queries=[queries[name] for name in answered],
        corpus=corpus,
        relevant=[relevant[name] for name in answered],
        ids=answered,
        groups=[None] * len(answered),
    )
    logger.info("%s: %d queries, %d documents", split.qrels, len(answered), len(corpus))
    _warn_of_missing(task)
    return task


def _warn_of_missing(task: RetrievalTask) -> None:
    if task.unanswerable == len(task.queries):
        logger.warning("warning: no query has an answer in the corpus: all count as misses; is it the right file?")
    elif task.missing:
        logger.warning(
            "warning: %d positives are not in the corpus and cannot be found; %d queries have no other and "
            "count as misses",
            task.missing,
            task.unanswerable,
        )


def _held_out_by(rows: Sequence[Record]) -> str | None:
    """What all rows were held out by; None where some were not, or by something else."""
    kinds = [row.get(HELD_OUT_BY) for row in rows]
    return kinds[0] if isinstance(kinds[0], str) and kinds.count(kinds[0]) == len(kinds) else None
