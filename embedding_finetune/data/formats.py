"""One door to every file of rows: its format by its name, its columns by the names that the suite knows.

.jsonl, .json (one object a line, or one array of objects), .csv, .tsv, all of these with .gz, and .parquet; or a folder
of such files. Files are read a part at a time. A file with any other name is read as JSON Lines.
"""

import argparse
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir, jsonl, tables
from embedding_finetune.data.jsonl import Record
from embedding_finetune.files import AnyPath

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

DATA_SUFFIXES = (*jsonl.SUFFIXES, *tables.DELIMITED, tables.PARQUET)
_NOT_READ = (".xlsx", ".xls", ".ods", ".arrow", ".feather", ".parquet.gz", ".zip", ".bz2", ".xz", ".zst")

ROLES = ("query", "pos", "neg", "text", "id", "group", "instruction")
"""The suite's own names of columns, which --columns maps others to."""
COLUMNS_HELP = f"what your files call the columns {', '.join(ROLES)}, such as query=question pos=answer"
_OTHER_OWN_NAMES = {"text": ["context"]}
_MOST_KNOWN = 1000
"""Sets of names that are remembered: all records of a file may differ in their names."""
_LISTS = ("pos", "neg", "context")
_ANOTHER_NEGATIVE = re.compile(r"negative(?:_(\d+))?")
_ALSO_CALLED = {"query": "anchor", "pos": "positive", "instruction": "prompt"}
"""What sentence-transformers and FlagEmbedding call them."""
_JUDGEMENTS = ("label", "score")
"""Columns beside sentence-transformers' names that say how good a pair is."""

_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?(e[+-]?\d+)?|true|false", re.IGNORECASE)
_SHOWN_COLUMNS = 20

Layout = Mapping[str, Sequence[str]]
"""Field -> the columns of the file that it comes from; several for sentence-transformers' negatives."""
_OWN_NAMES: Layout = {}


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
        return f"; the columns are {_listed(self.table)}: --columns {field}=COLUMN says which it is"


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


class _Columns:
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
        for role, column in _ALSO_CALLED.items():
            if role in self._fields and role not in (*free, *found) and column in free:
                found[role] = [column]
        if found.get("pos") == ["positive"] and "neg" in self._fields and "neg" not in (*free, *found):
            numbered = [(int(match[1] or 0), name) for name in free if (match := _ANOTHER_NEGATIVE.fullmatch(name))]
            if numbered:
                found["neg"] = [name for _, name in sorted(numbered)]
        field_of = {column: field for field, columns in found.items() for column in columns}
        return {field: found.get(field, [field]) for field in (field_of.get(name, name) for name in names)}


def read(
    path: AnyPath, columns: Sequence[str] = (), *, fields: Sequence[str] = ROLES, others: bool = True
) -> Iterator[tuple[Place, Record]]:
    """Yield (place, record) for every record of a file, or of a folder's files, with the suite's own names.

    columns: what --columns gives, such as `query=question`; roles that are not among the `fields` are ignored.
    others: whether fields beyond these are wanted; if not, other columns of a table are not read.

    In csv, tsv and parquet, and in sentence-transformers' columns, a text where a list is expected is a list of one.
    Rows of a csv or tsv file without any text are skipped. Raises UserError when a file cannot be read, when it holds
    no record, and where it is damaged.
    """
    asked = {role: column for role, column in parse_columns(columns).items() if role in fields}
    for file in data_files(path):
        place, roles = Place(file, asked), _Columns(asked, fields)
        if tables.is_table(file):
            yield from _read_table(place, roles, None if others else fields)
        else:
            yield from _read_lines(place, roles)
        if not place.number:
            rows = "one JSON object per line" if place.table is None else "rows"
            raise UserError(f"{file}: the file is empty; expected {rows}")
        roles.log_unused(file)


def _read_lines(place: Place, roles: _Columns) -> Iterator[tuple[Place, Record]]:
    if str(place.path).lower().endswith(_NOT_READ):
        raise UserError(f"{place.path}: such files are not read; save it as one of {', '.join(DATA_SUFFIXES)}")
    for number, record in jsonl.read(place.path):
        place.number = number
        names = tuple(record)
        layout = roles.layout(place, names)
        place.layout = layout or _OWN_NAMES
        if layout:
            if layout.get("pos") == ["positive"]:
                for name in _JUDGEMENTS:
                    _check_no_judgement(place, name, record.get(name))
            record = {field: _value(field, record, columns) for field, columns in layout.items()}
        yield place, record


def _value(field: str, record: Record, columns: Sequence[str]) -> object:
    """A field of a record; sentence-transformers' columns hold one text each."""
    one_text = field in _LISTS and (columns[0] == "positive" or _ANOTHER_NEGATIVE.fullmatch(columns[0]))
    return _as_list([record[column] for column in columns]) if one_text else record[columns[0]]


def _as_list(values: Iterable[object]) -> list[object]:
    """Texts and lists of texts as one list, without what is null."""
    return [text for value in values for text in (value if isinstance(value, list) else [value]) if text is not None]


def _read_table(place: Place, roles: _Columns, only: Sequence[str] | None) -> Iterator[tuple[Place, Record]]:
    place.table = names = tables.column_names(place.path)
    if not names:
        return
    is_parquet = tables.is_parquet(place.path)
    layout: Layout = roles.layout(place, tuple(names)) or {name: [name] for name in names}
    place.layout = layout
    judgements = [name for name in _JUDGEMENTS if name in names and layout.get("pos") == ["positive"]]
    fields, wanted = layout, set(names)
    if is_parquet and only is not None:  # the cells of a csv file have to be parsed anyway
        fields = {field: columns for field, columns in layout.items() if field in only} or {names[0]: names[:1]}
        wanted = {*itertools.chain(*fields.values()), *judgements}
        if unread := [name for name in names if name not in wanted]:
            logger.info("%s: ignored: %s", place.path, _listed(unread))
    for first, batch in tables.read_columns(place.path, [name for name in names if name in wanted]):
        for name in judgements:
            for number, value in enumerate(batch[name], first):
                place.number = number
                _check_no_judgement(place, name, value)
        columns = [_column(field, [batch[name] for name in names]) for field, names in fields.items()]
        for number, values in enumerate(zip(*columns), first):
            record = dict(zip(fields, values))
            if not is_parquet and None in values:
                record = {field: value for field, value in record.items() if value is not None}
                if not any(values):
                    continue
            place.number = number
            yield place, record


def _column(field: str, columns: Sequence[list[Any]]) -> list[Any]:
    """The values of a field: of one column, or of those that hold one text each."""
    if len(columns) > 1:
        return [_as_list(values) for values in zip(*columns)]
    if field in _LISTS:
        return [[value] if isinstance(value, str) else value for value in columns[0]]
    return columns[0]


def _check_no_judgement(place: Place, name: str, value: object) -> None:
    """Refuse pairs that are good or bad by a number: read as positives, all of them would be good."""
    if isinstance(value, int | float | Decimal) or (isinstance(value, str) and _NUMBER.fullmatch(value.strip())):
        raise UserError(
            f'{place}: a number in "{name}" beside "positive" says how good the pair is, which is not read; '
            f'keep the pairs that are right, without the column "{name}"'
        )


def _listed(names: Sequence[str]) -> str:
    """Names for one line, not all of very many."""
    more = [f"and {len(names) - _SHOWN_COLUMNS} others"] if len(names) > _SHOWN_COLUMNS else []
    return ", ".join([*(json.dumps(name, ensure_ascii=False) for name in names[:_SHOWN_COLUMNS]), *more])


def check_can_be_written(flag: str, path: AnyPath) -> None:
    """Raise UserError naming `flag` for a name of a format that is only read."""
    if str(path).lower().endswith((*tables.DELIMITED, *_NOT_READ)):
        raise UserError(f"{flag}: {path}: such files are not written; give a name that ends in .jsonl or .parquet")


def schema_to_write(
    path: AnyPath, rows: Sequence[Record], names: Iterable[str], *, source: AnyPath
) -> "pa.Schema | None":
    """What `write` needs for a name that ends in .parquet: the columns for rows of the `source`, None for other names.

    names: the columns, in order. Raises UserError where a column cannot hold all values.
    """
    return tables.schema_of(path, names, rows, like=data_files(source, quiet=True)) if tables.is_parquet(path) else None


def write(path: AnyPath, records: Iterable[Record], schema: "pa.Schema | None" = None) -> None:
    """Write records as parquet where there is a schema, else as JSON Lines.

    A run that is killed leaves the old file or the new one.
    """
    if schema is None:
        jsonl.write(path, records)
    else:
        tables.write_parquet(path, records, schema)


def data_files(path: AnyPath, *, quiet: bool = False) -> list[Path]:
    """The data files at `path`: the file itself, or a folder's visible data files, sorted by name.

    A BEIR folder counts as one file. Unless quiet, log lines say what else is in the folder.
    """
    path = Path(path)
    if not path.is_dir() or beir.is_beir(path):
        return [path]
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    files = [child for child in children if child.is_file() and _is_data_file(child.name)]
    subfolders = {child.name: count for child in children if (count := _count_data_files(child))}
    if not files:
        hint = f"; subfolders are not read: give {path / next(iter(subfolders))}" if subfolders else ""
        raise UserError(f"{path}: the folder holds no {', '.join('*' + s for s in DATA_SUFFIXES)} file{hint}")
    if quiet:
        return files
    if subfolders:
        counts = ", ".join(f"{name} ({count} data files)" for name, count in subfolders.items())
        logger.warning("warning: %s: subfolders are not read: %s", path, counts)
    ignored = [child.name for child in children if child not in files and child.name not in subfolders]
    if ignored:
        logger.info("%s: not read: %s", path, ", ".join(ignored))
    return files


def _is_data_file(name: str) -> bool:
    return name.lower().endswith(DATA_SUFFIXES) and not name.startswith(".")


def _count_data_files(folder: Path) -> int:
    """How many data files a visible folder holds, at any depth; 0 for a file."""
    if folder.name.startswith(".") or not folder.is_dir():
        return 0
    return sum(_is_data_file(name) for _, _, names in os.walk(folder) for name in names)
