"""Which columns of a file play which role, and where a reader stands in it, for errors.

The suite's own names count, those that --columns gives, and those of sentence-transformers and FlagEmbedding.
"""

import argparse
import json
import logging
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from embedding_finetune.command_line import UserError
from embedding_finetune.files import AnyPath

logger = logging.getLogger(__name__)

ROLES = ("query", "pos", "neg", "text", "id", "group", "instruction")
"""The suite's own names of columns, which --columns maps others to."""
COLUMNS_HELP = f"what your files call the columns {', '.join(ROLES)}, such as query=question pos=answer"
_OTHER_OWN_NAMES = {"text": ["context"]}
_MOST_KNOWN = 1000
"""Sets of names that are remembered: all records of a file may differ in their names."""
ANOTHER_NEGATIVE = re.compile(r"negative(?:_(\d+))?")
ALSO_CALLED = {"query": "anchor", "pos": "positive", "instruction": "prompt"}
"""What sentence-transformers and FlagEmbedding call them."""
JUDGEMENTS = ("label", "score")
"""Columns beside sentence-transformers' names that say how good a pair is."""

_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?(e[+-]?\d+)?|true|false", re.IGNORECASE)
_SHOWN_COLUMNS = 20

Layout = Mapping[str, Sequence[str]]
"""Field -> the columns of the file that it comes from; several for sentence-transformers' negatives."""


class Place:
    """Where a reader stands in a file, for errors, and what the file calls the fields of this record.

    A reader has one, and moves it from record to record. table: the names of a table's columns, None for JSON Lines.
    """

    def __init__(self, path: AnyPath, asked: Mapping[str, str]) -> None:
        self.path = path
        self.number = 0
        self.layout: Layout = {}
        self.table: Sequence[str] | None = None
        self._asked = asked

    def __str__(self) -> str:
        if self.table is None:
            return f"{self.path}:{self.number}"
        return f"{self.path}: row {self.number}" if self.number else f"{self.path}"

    def name(self, field: str) -> str:
        """A field as the file calls it: "question"."""
        return " and ".join(f'"{column}"' for column in self.layout.get(field, [field]))

    def missing(self, field: str, expected: str) -> str:
        """What to say where a record lacks a field: "question" is missing, expected a string."""
        if self.table is not None and field in self.layout:
            return f"{self.name(field)} is empty, expected {expected}"
        names = self.names_to_find(field)
        lacking = f"neither {names} is there" if " nor " in names else f"{names} is missing"
        return f"{lacking}, expected {expected}{self.remedy(field)}"

    def names_to_find(self, field: str) -> str:
        """The names that a field may have in the file: "question" nor "query"."""
        return " nor ".join(f'"{name}"' for name in dict.fromkeys((self._asked.get(field, field), field)))

    def remedy(self, field: str) -> str:
        """What to do where a table has no column of a field; empty for JSON Lines."""
        if self.table is None:
            return ""
        return f"; the columns are {listed(self.table)}: --columns {field}=COLUMN says which it is"


def add_columns_argument(parser: argparse.ArgumentParser) -> None:
    """Add --columns."""
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help=COLUMNS_HELP)


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """`["query=question", "pos=answer"]` of --columns as role -> column. Raises UserError for anything else."""
    columns: dict[str, str] = {}
    for text in given:
        role, _, column = text.partition("=")
        if role not in ROLES or not column:
            raise UserError(
                f"--columns {text}: expected ROLE=COLUMN, such as query=question; the roles are {', '.join(ROLES)}"
            )
        if role in columns:
            raise UserError(f"--columns {text}: that role is given twice")
        if any(column == other and _share_a_file(role, name) for name, other in columns.items()):
            raise UserError(f"--columns {text}: that column is given twice")
        columns[role] = column
    return columns


def _share_a_file(role: str, other: str) -> bool:
    """Whether two roles are played in one file: passages may be the column of another file's answers."""
    return "text" not in (role, other) or {role, other} <= {"text", "id"}


class Roles:
    """Which columns of a file play which role. `asked`: role -> column, as --columns says.

    Without it the suite's own names count, and where these are missing, sentence-transformers': anchor, positive,
    negative, negative_1 and so on, and FlagEmbedding's prompt. A file without a column that --columns names is read as
    if it had not been named.
    """

    def __init__(self, asked: Mapping[str, str], fields: Sequence[str]) -> None:
        self._asked = asked
        self._fields = fields
        self._unused = set(asked.values())
        self._known: dict[tuple[str, ...], Layout | None] = {}

    def layout(self, place: Place, names: tuple[str, ...]) -> Layout | None:
        """The fields of a record with these names, in order; None where it has the suite's own names only."""
        try:
            return self._known[names]
        except KeyError:
            layout = self._find_layout(place, names)
            self._unused.difference_update(*layout.values())
            if len(self._known) == _MOST_KNOWN:
                self._known.clear()
            own = all([field] == columns for field, columns in layout.items())
            self._known[names] = None if own else layout
            return self._known[names]

    def log_unused(self, path: AnyPath) -> None:
        """Log which columns of --columns were in none of the records."""
        for role, column in self._asked.items():
            if column in self._unused:
                logger.info('%s: there is no "%s": --columns %s=%s is not used', path, column, role, column)

    def _find_layout(self, place: Place, names: Sequence[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        free = [name for name in names if name not in self._asked.values()]
        for role, column in self._asked.items():
            if column in names:
                own = [name for name in (role, *_OTHER_OWN_NAMES.get(role, ())) if name in free]
                if own:
                    raise UserError(
                        f'{place}: "{column}", which --columns makes the {role}, stands beside "{own[0]}"; rename one'
                    )
                found[role] = [column]
        for role, column in ALSO_CALLED.items():
            if role in self._fields and role not in (*free, *found) and column in free:
                found[role] = [column]
        if found.get("pos") == ["positive"] and "neg" in self._fields and "neg" not in (*free, *found):
            numbered = [(int(match[1] or 0), name) for name in free if (match := ANOTHER_NEGATIVE.fullmatch(name))]
            if numbered:
                found["neg"] = [name for _, name in sorted(numbered)]
        field_of = {column: field for field, columns in found.items() for column in columns}
        return {field: found.get(field, [field]) for field in (field_of.get(name, name) for name in names)}


def check_no_judgement(place: Place, name: str, value: object) -> None:
    """Refuse pairs that are good or bad by a number: read as positives, all of them would be good."""
    if isinstance(value, int | float | Decimal) or (isinstance(value, str) and _NUMBER.fullmatch(value.strip())):
        raise UserError(
            f'{place}: a number in "{name}" beside "positive" says how good the pair is, which is not read; '
            f'keep the pairs that are right, without the column "{name}"'
        )


def listed(names: Sequence[str]) -> str:
    """Names for one line, not all of very many."""
    more = [f"and {len(names) - _SHOWN_COLUMNS} others"] if len(names) > _SHOWN_COLUMNS else []
    return ", ".join([*(json.dumps(name, ensure_ascii=False) for name in names[:_SHOWN_COLUMNS]), *more])
