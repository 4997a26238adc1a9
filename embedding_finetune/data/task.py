"""Retrieval tasks: queries, with the positions in a corpus of the passages that answer them."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir
from embedding_finetune.data.corpus import Corpus, Documents
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.judgements import NO_JUDGEMENTS, Judgements, Use
from embedding_finetune.data.qrels import read_qrels
from embedding_finetune.data.records import HELD_OUT_BY, read_queries
from embedding_finetune.data.texts import Instructions, canonical, text_id
from embedding_finetune.files import AnyPath

logger = logging.getLogger(__name__)


class RetrievalTask(NamedTuple):
    """Queries, the corpus to search, and the answers to each query.

    relevant: for each query, the positions of its answers, and how relevant each is, from 1. Answers that the corpus
    does not hold have positions from len(corpus) on. ids name the queries in TREC files. groups: None for a query
    without. instructions: those that queries have of their own.
    held_out_by: what all of them were kept out of training by, if so, see hold_out.py. unanswered: further questions,
    which the corpus does not answer; they are in no measure. not_relevant: for numbers of queries, the positions that
    are known not to answer them. left_out: for numbers of queries, the positions that their rankings leave out.
    """

    queries: list[str]
    corpus: Corpus | Documents
    relevant: list[dict[int, int]]
    ids: list[str]
    groups: list[str | None]
    instructions: Instructions = None
    held_out_by: str | None = None
    unanswered: "RetrievalTask | None" = None
    not_relevant: Mapping[int, Set[int]] = MappingProxyType({})
    left_out: Mapping[int, Set[int]] = MappingProxyType({})

    def asked(self) -> "RetrievalTask":
        """The task with the questions that the corpus does not answer behind the others."""
        if self.unanswered is None:
            return self
        parts = (self, self.unanswered)
        return self._replace(
            queries=[query for part in parts for query in part.queries],
            instructions=[own for part in parts for own in part.instructions or [None] * len(part.queries)],
            left_out={
                **self.left_out,
                **{len(self.queries) + number: positions for number, positions in self.unanswered.left_out.items()},
            },
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


def load_task(
    query_file: AnyPath,
    corpus: Corpus | Documents,
    columns: Sequence[str] = (),
    *,
    may_lack_answers: bool = False,
    judgements: Judgements = NO_JUDGEMENTS,
) -> RetrievalTask:
    """Read queries from a file and find their positives in the corpus, see make_task; or those of a BEIR folder.

    may_lack_answers: whether a query's `pos` may be empty; such queries become `unanswered`, if others are not.
    judgements: what they find relevant is a positive too, if the corpus holds it. Raises UserError where one of the
    two is of a BEIR folder, and the other is not.
    """
    if beir.is_beir(query_file):
        if not isinstance(corpus, Documents):
            raise UserError(
                f"{query_file}: its judgements are about ids of documents: give {beir.folder_of(query_file)} as the "
                "passages too"
            )
        return _make_beir_task(beir.find_split(query_file, "test"), corpus, judgements)
    if isinstance(corpus, Documents):
        raise UserError(
            f"{query_file}: is no BEIR folder, and the passages are one's, known by their ids: give a BEIR folder as "
            f"the queries too, or {corpus.path} as the passages"
        )
    rows = list(read_queries(query_file, columns, may_lack_answers=may_lack_answers))
    rows = list(_with_judged_positives(rows, corpus, judgements, query_file))
    if not all(row["pos"] for row in rows):  # ids stay those of the places in the file
        rows = [{**row, "id": name} for row, name in zip(rows, _ids(rows))]
    answered = [row for row in rows if row["pos"]]
    if rows and not answered:
        answered = list(read_queries(query_file, columns))  # which raises
    task = make_task(answered, corpus, judgements)
    if len(answered) == len(rows):
        return task
    others = [row for row in rows if not row["pos"]]
    logger.info("%d further questions have no answer: they are in no measure, and count in --thresholds", len(others))
    return task._replace(unanswered=_task_of(others, corpus))


def _with_judged_positives(
    rows: Sequence[Record], corpus: Corpus, judgements: Judgements, where: AnyPath
) -> Iterator[Record]:
    """The rows with what was judged relevant, and the corpus holds, among their `pos`; log lines count it."""
    use = Use(judgements, where)
    for row in rows:
        judged = judgements.of(row["query"])
        if not any(judged):
            yield row
            continue
        labelled = set(map(canonical, row["pos"]))
        held, not_held = [], 0
        for text, position in zip(judged.relevant, corpus.positions(judged.relevant).tolist()):
            if position < 0:
                not_held += 1
            elif canonical(text) not in labelled:
                held.append(text)
        not_held += int((corpus.positions(judged.not_relevant) < 0).sum())
        use.add(row["query"], added=len(held), against_labels=judged.count_against(labelled), not_held=not_held)
        yield {**row, "pos": [*row["pos"], *held]}
    use.log()


def make_task(rows: Sequence[Record], corpus: Corpus, judgements: Judgements = NO_JUDGEMENTS) -> RetrievalTask:
    """Find the positives of rows of read_queries in the corpus; a warning counts those that it does not hold.

    judgements: what they find not relevant is known not to be.
    """
    beyond = itertools.count(len(corpus))
    relevant: list[dict[int, int]] = []
    not_relevant: dict[int, set[int]] = {}
    for number, row in enumerate(rows):
        positions = corpus.positions(row["pos"])
        found = dict.fromkeys(positions[positions >= 0].tolist(), 1)
        missing = len({canonical(text) for text in row["pos"]}) - len(found)
        relevant.append({**found, **dict.fromkeys(itertools.islice(beyond, missing), 1)})
        if refused := judgements.of(row["query"]).not_relevant:
            not_relevant[number] = set(corpus.positions(refused).tolist()) - found.keys() - {-1}
    task = _task_of(rows, corpus)._replace(relevant=relevant, not_relevant=not_relevant)
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


def _make_beir_task(split: beir.Split, corpus: Documents, judgements: Judgements) -> RetrievalTask:
    """The queries of a split that have an answer, with their grades; a log line counts the others.

    A text that was judged is that of all documents that have it.
    """
    qrels = read_qrels(split.qrels)
    position_of = {name: position for position, name in enumerate(corpus.ids)}
    known = {document for documents in qrels.values() for document in documents}
    queries = {name: text for _, name, text in beir.read_judged_queries(split, qrels)}
    beir.check_all_found(split._replace(corpus=corpus.path), qrels.keys() - queries.keys(), known - position_of.keys())
    graded = {name: {position_of[document]: score for document, score in qrels[name].items()} for name in queries}
    _add_judged(graded, queries, corpus, judgements, split.qrels)
    relevant = {
        name: {position: score for position, score in scores.items() if score > 0} for name, scores in graded.items()
    }
    answered = [name for name, answers in relevant.items() if answers]
    beir.log_without_answer(split, len(queries) - len(answered), len(queries))
    task = RetrievalTask(
        queries=[queries[name] for name in answered],
        corpus=corpus,
        relevant=[relevant[name] for name in answered],
        ids=answered,
        groups=[None] * len(answered),
        not_relevant={number: graded[name].keys() - relevant[name].keys() for number, name in enumerate(answered)},
    )
    logger.info("%s: %d queries, %d documents", split.qrels, len(answered), len(corpus))
    _warn_of_missing(task)
    return task


def _add_judged(
    graded: dict[str, dict[int, int]],
    queries: Mapping[str, str],
    corpus: Documents,
    judgements: Judgements,
    where: AnyPath,
) -> None:
    """Add to the grades of documents, by query and position: 1 for one judged relevant, 0 for one judged not to be."""
    if not judgements:
        return
    positions = corpus.positions_of_all(judgements.passages())
    use = Use(judgements, where)
    for name, query in queries.items():
        judged, scores = judgements.of(query), graded[name]
        added = against_labels = not_held = 0
        for text in judged.relevant:
            held = positions.get(canonical(text), [])
            not_held += not held
            added += any(scores.get(position, 0) <= 0 for position in held)
            scores.update({position: max(scores.get(position, 0), 1) for position in held})
        for text in judged.not_relevant:
            held = positions.get(canonical(text), [])
            not_held += not held
            against_labels += any(scores.get(position, 0) > 0 for position in held)
            scores.update({position: scores.get(position, 0) for position in held})
        use.add(query, added=added, against_labels=against_labels, not_held=not_held)
    use.log()


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
