"""One door to every file of rows: its format by its name, its columns by the names that the suite knows.

.jsonl, .json (one object a line, or one array of objects), .csv, .tsv, all of these with .gz, and .parquet. Files are
read a part at a time. A file with any other name is read as JSON Lines.
"""

import argparse
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir, jsonl, tables
from embedding_finetune.data.jsonl import Record
from embedding_finetune.files import AnyPath

logger = logging.getLogger(__name__)

DELIMITED = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
PARQUET = ".parquet"
DATA_SUFFIXES = (*jsonl.SUFFIXES, *DELIMITED, PARQUET)

ROLES = ("query", "pos", "neg", "text", "id", "group", "instruction")
"""The suite's own names of columns, which --columns maps others to."""
COLUMNS_HELP = f"what your files call the columns {', '.join(ROLES)}, such as query=question pos=answer"
_LISTS = ("pos", "neg", "context")
_ANOTHER_NEGATIVE = re.compile(r"negative(?:_(\d+))?")
_ALSO_CALLED = {"query": "anchor", "pos": "positive", "instruction": "prompt"}
"""What sentence-transformers and FlagEmbedding call them."""
_JUDGEMENTS = ("label", "score")
"""Columns beside sentence-transformers' names that say how good a pair is."""


_AS_THEY_ARE: Mapping[str, Sequence[str]] = {}


class Place:
    """Where a reader stands in a file, for errors, and which columns the fields of this record came from.

    A reader has one, and moves it from record to record.
    """

    def __init__(self, path: AnyPath, *, is_line: bool) -> None:
        self.path = path
        self.number = 0
        self.is_line = is_line
        self.columns = _AS_THEY_ARE

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.is_line else f"{self.path}: row {self.number}"

    def name(self, field: str) -> str:
        """A field as the file calls it: "question"."""
        return " and ".join(f'"{column}"' for column in self.columns.get(field, [field]))


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
        if role in columns or column in columns.values():
            raise UserError(f"--columns {text}: that {'role' if role in columns else 'column'} is given twice")
        columns[role] = column
    return columns


class _Columns:
    """Which column of a file plays which role. `given`: role -> column, as --columns says.

    Without it the suite's own names count, and where these are missing, sentence-transformers': anchor, positive,
    negative, negative_1 and so on, and FlagEmbedding's prompt. A file without a column that --columns names is read as
    if it had not been named.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self._known: dict[tuple[str, ...], Mapping[str, Sequence[str]]] = {}

    def sources(self, place: Place, record: Record) -> Mapping[str, Sequence[str]]:
        """Field -> the columns that it comes from, for fields that are called otherwise in the file."""
        names = tuple(record)
        sources = self._known.get(names)
        if sources is None:
            sources = self._known[names] = self._find_sources(place, names)
        return sources

    def _find_sources(self, place: Place, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
        found: dict[str, Sequence[str]] = {}
        for role, column in self._given.items():
            if column in names and column != role:
                if role in names:
                    raise UserError(
                        f'{place}: "{column}", which --columns makes the {role}, stands beside "{role}"; rename one'
                    )
                found[role] = [column]
        for role, column in _ALSO_CALLED.items():
            if role not in names and role not in found and column in names:
                found[role] = [column]
        if found.get("pos") == ["positive"] and "neg" not in names and "neg" not in found:
            numbered = [(int(match[1] or 0), name) for name in names if (match := _ANOTHER_NEGATIVE.fullmatch(name))]
            if numbered:
                found["neg"] = [name for _, name in sorted(numbered)]
        return found


def read(path: AnyPath, columns: Sequence[str] = ()) -> Iterator[tuple[Place, Record]]:
    """Yield (place, record) for every record of a file, with the suite's own names.

    columns: what --columns gives, such as `query=question`.

    In csv, tsv and parquet, and in sentence-transformers' columns, a text where a list is expected is a list of one.
    Raises UserError when the file cannot be read, when it holds no record, and where it is damaged.
    """
    roles = _Columns(parse_columns(columns))
    is_table = str(path).endswith((*DELIMITED, PARQUET))
    place = Place(path, is_line=not is_table)
    for place.number, record in _read(path):
        place.columns = roles.sources(place, record)
        if place.columns:
            _check_no_judgement(place, record)
            record = _renamed(record, place.columns)
        if is_table:
            _put_texts_into_lists(record)
        yield place, record
    if not place.number:
        raise UserError(f"{path}: the file is empty; expected {'rows' if is_table else 'one JSON object per line'}")


def _read(path: AnyPath) -> Iterator[tuple[int, Record]]:
    if str(path).endswith(PARQUET):
        return tables.read_parquet(path)
    return tables.read_delimited(path) if str(path).endswith(DELIMITED) else jsonl.read(path)


def _check_no_judgement(place: Place, record: Record) -> None:
    """Refuse pairs that are good or bad by a number: read as positives, all of them would be good."""
    if place.columns.get("pos") != ["positive"]:
        return
    for name in _JUDGEMENTS:
        if isinstance(record.get(name), int | float):
            raise UserError(
                f'{place}: a number in "{name}" beside "positive" says how good the pair is, which is not read; '
                f'keep the pairs that are right, without the column "{name}"'
            )


def _renamed(record: Record, sources: Mapping[str, Sequence[str]]) -> Record:
    """The record with the suite's own names, each in the place of the first column that it comes from."""
    own = {column: (field, columns) for field, columns in sources.items() for column in columns}
    renamed: Record = {}
    for name, value in record.items():
        field, columns = own.get(name, (name, [name]))
        if field in renamed:
            continue
        single = (field in _LISTS and _ANOTHER_NEGATIVE.fullmatch(name)) or name == "positive"
        renamed[field] = _texts_of(record, columns) if single else value
    return renamed


def _texts_of(record: Record, columns: Sequence[str]) -> list[object]:
    """The texts of sentence-transformers' columns, those that are null left out."""
    values = [record[column] for column in columns if record.get(column) is not None]
    return [text for value in values for text in (value if isinstance(value, list) else [value])]


def _put_texts_into_lists(record: Record) -> None:
    for field in _LISTS:
        if isinstance(record.get(field), str):
            record[field] = [record[field]]


def write(path: AnyPath, records: Iterator[Record]) -> None:
    """Write records as the name says: parquet, else JSON Lines.

    A run that is killed leaves the old file or the new one.
    """
    if str(path).endswith(PARQUET):
        tables.write_parquet(path, records)
    else:
        jsonl.write(path, records)


def data_files(path: AnyPath) -> list[Path]:
    """The data files at `path`: the file itself, or a folder's visible JSON files, sorted by name.

    A BEIR folder counts as one file.
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
    if subfolders:
        counts = ", ".join(f"{name} ({count} data files)" for name, count in subfolders.items())
        logger.warning("warning: %s: subfolders are not read: %s", path, counts)
    ignored = [child.name for child in children if child not in files and child.name not in subfolders]
    if ignored:
        logger.info("%s: not read: %s", path, ", ".join(ignored))
    return files


def _is_data_file(name: str) -> bool:
    return name.endswith(DATA_SUFFIXES) and not name.startswith(".")


def _count_data_files(folder: Path) -> int:
    """How many data files a visible folder holds, at any depth; 0 for a file."""
    if folder.name.startswith(".") or not folder.is_dir():
        return 0
    return sum(_is_data_file(name) for _, _, names in os.walk(folder) for name in names)
