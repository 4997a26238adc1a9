"""Judgements: whether a passage answers a query, as a person or a language model says who has read both.

A file has lines `{"query": str, "passage": str, "relevant": true or false}`, as --doubts_file writes them with null in
place of the answer. A passage that answers becomes a positive of the query's rows. One that does not is a confirmed
negative of theirs. Queries and passages are known by their texts.
"""

import argparse
import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from embedding_finetune import files
from embedding_finetune.command_line import UserError
from embedding_finetune.data import jsonl
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.qrels import check_unicode
from embedding_finetune.data.records import SCORE_FIELDS
from embedding_finetune.data.texts import canonical

logger = logging.getLogger(__name__)

FIELDS = ("query", "passage", "relevant")
JUDGEMENTS_HELP = (
    'lines {"query": str, "passage": str, "relevant": true or false}, as --doubts_file writes them without the answer: '
    "true makes the passage a positive, false a confirmed negative"
)


class Judged(NamedTuple):
    """What was judged of one query: the texts of passages that answer it, and of those that do not."""

    relevant: list[str]
    not_relevant: list[str]

    def count_against(self, labelled: Set[str]) -> int:
        """How many find a passage not relevant that the data, by canonical text, name as a positive."""
        return sum(canonical(text) in labelled for text in self.not_relevant)


class Settled(NamedTuple):
    """A row as judged. The first `confirmed` texts of its "neg" are known to answer nothing."""

    row: Record
    confirmed: int


class Judgements:
    """Judgements by query; there may be none. Of two about the same texts the later one holds.

    One about a query as a passage is left out: in no script does a query answer itself, or serve as its negative.
    """

    def __init__(self, judged: Iterable[tuple[str, str, bool]] = ()) -> None:
        self.contradicted = 0
        self._by_query: dict[str, dict[str, tuple[str, bool]]] = {}
        for query, passage, relevant in judged:
            if canonical(query) == canonical(passage):
                continue
            of_query = self._by_query.setdefault(canonical(query), {})
            _, before = of_query.pop(canonical(passage), ("", relevant))
            self.contradicted += before != relevant
            of_query[canonical(passage)] = (passage, relevant)

    def __len__(self) -> int:
        return sum(map(len, self._by_query.values()))

    def of(self, query: str) -> Judged:
        """What was judged of a query, in the order of the file."""
        found = self._by_query.get(canonical(query), {}).values()
        return Judged(
            [text for text, relevant in found if relevant], [text for text, relevant in found if not relevant]
        )

    def passages(self) -> Iterator[str]:
        """The texts of all passages that were judged."""
        for judged in self._by_query.values():
            yield from (text for text, _ in judged.values())

    def count_about(self, queries: Iterable[str]) -> int:
        """How many are about one of the queries."""
        return sum(len(self._by_query.get(query, ())) for query in set(map(canonical, queries)))


NO_JUDGEMENTS = Judgements()


class Use:
    """Counts what a file's rows make of judgements, and logs it.

    added: positives that rows got. against_labels: judgements that say of a positive of the data that it is none.
    not_held: those that find a passage relevant which the corpus does not hold.
    """

    def __init__(self, judgements: Judgements, where: object) -> None:
        self._judgements, self._where = judgements, where
        self._queries: list[str] = []
        self._added = self._against_labels = self._not_held = 0

    def add(self, query: str, *, added: int, against_labels: int, not_held: int = 0) -> None:
        """Count those of one row."""
        self._queries.append(query)
        self._added += added
        self._against_labels += against_labels
        self._not_held += not_held

    def log(self) -> None:
        """One line, and a warning where the data say otherwise. Nothing where there are no judgements."""
        if not self._judgements:
            return
        absent = f"; {self._not_held} are about passages that are not in the corpus" if self._not_held else ""
        logger.info(
            "%s: %d of %d judgements are about its queries, and add %d positives%s",
            *(self._where, self._judgements.count_about(self._queries), len(self._judgements), self._added, absent),
        )
        if self._against_labels:
            logger.warning(
                "warning: %s: %d judgements say that a positive of the data answers nothing: the data count; take "
                "such positives out of them",
                *(self._where, self._against_labels),
            )


def read_judgements(paths: Sequence[str]) -> Judgements:
    """The judgements of files, of which later ones hold; lines with null are skipped. Log lines count all of it.

    Raises UserError naming file and line for a line of another kind.
    """
    skipped = 0

    def judged() -> Iterator[tuple[str, str, bool]]:
        nonlocal skipped
        for path in paths:
            for line, record in jsonl.read(path):
                relevant = _checked(f"{path}:{line}", record)
                skipped += relevant is None
                if relevant is not None:
                    yield record["query"], record["passage"], relevant

    judgements = Judgements(judged())
    if paths:
        logger.info(
            "%s: %d judgements; %d lines without an answer (null) are skipped, %d were contradicted by a later line",
            *(", ".join(paths), len(judgements), skipped, judgements.contradicted),
        )
    return judgements


def _checked(place: str, record: Record) -> bool | None:
    for field in FIELDS[:2]:
        text = record.get(field)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{place}: "{field}" is missing or no text; expected the text of the {field}')
        check_unicode(f'{place}: "{field}"', text)
    if "relevant" not in record:
        raise UserError(f'{place}: "relevant" is missing, expected true, false or null')
    relevant = record["relevant"]
    if relevant is not None and not isinstance(relevant, bool):
        raise UserError(f'{place}: "relevant" is {relevant!r}, expected true, false or null')
    return relevant


def settle_rows(rows: Iterable[Record], judgements: Judgements, where: object) -> Iterator[Settled]:
    """Training rows as judged; a log line counts the judgements that were used.

    A row gets the positives that were judged of its query. Those judged not to answer it stand first among its
    negatives, the others behind them. Scores of a row that changes are left out: they belong to its old texts.
    """
    use = Use(judgements, where)
    for row in rows:
        judged = judgements.of(row["query"])
        if not any(judged):
            yield Settled(row, 0)
            continue
        labelled = set(map(canonical, row["pos"]))
        positives = [*row["pos"], *(text for text in judged.relevant if canonical(text) not in labelled)]
        answers = {*map(canonical, positives), canonical(row["query"])}
        confirmed = [text for text in judged.not_relevant if canonical(text) not in answers]
        taken = answers.union(map(canonical, confirmed))
        others = [text for text in row.get("neg", ()) if canonical(text) not in taken]
        use.add(row["query"], added=len(positives) - len(row["pos"]), against_labels=judged.count_against(labelled))
        kept = {name: value for name, value in row.items() if name not in SCORE_FIELDS}
        yield Settled({**kept, "pos": positives, "neg": [*confirmed, *others]}, len(confirmed))
    use.log()


def check_can_be_replaced(flag: str, path: str) -> None:
    """Raise UserError where a file of doubts would replace one with answers in it, or another kind of file."""
    if not os.path.exists(path):
        return
    try:
        answers = [record["relevant"] for _, record in jsonl.read(path)]
    except (UserError, KeyError) as error:
        raise UserError(f"{flag} {path}: is no file of doubts, and would be replaced; give another name") from error
    if any(answer is not None for answer in answers):
        raise UserError(
            f"{flag} {path}: there are answers in it, which would be lost; give it as --judgements, and another name "
            f"for {flag}"
        )


def add_judgements_arguments(group: argparse._ActionsContainer) -> None:
    """Add --judgements and --doubts_file."""
    group.add_argument("--judgements", nargs="+", default=[], metavar="FILE", help=JUDGEMENTS_HELP)
    group.add_argument(
        "--doubts_file",
        metavar="FILE",
        help="write the passages there that may be answers nobody labelled, as lines for a person or a language model "
        "to fill in: they rank above the right passage, or just below it",
    )


def check_judgement_paths(judgements: Sequence[str], doubts_file: str | None = None) -> None:
    """Raise UserError where a file is missing, or where one cannot be written or must not be replaced."""
    for path in judgements:
        files.require_data("--judgements", path)
        if os.path.isdir(path):
            raise UserError(f"--judgements: {path} is a folder; give files of judgements")
    if doubts_file is not None:
        if doubts_file.lower().endswith((".csv", ".tsv", ".parquet")):
            raise UserError(f"--doubts_file {doubts_file}: JSON Lines are written; give a name that ends in .jsonl")
        files.require_writable("--doubts_file", doubts_file)
        check_can_be_replaced("--doubts_file", doubts_file)
