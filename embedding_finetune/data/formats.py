"""One door to every file of rows: its format by its name, its columns by the names that the suite knows.

.jsonl, .json (one object a line, or one array of objects), .csv, .tsv, all of these with .gz, and .parquet; or a folder
of such files. Files are read a part at a time. A file with any other name is read as JSON Lines.
"""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir, jsonl, parquet_output, tables
from embedding_finetune.data.columns import (
    ANOTHER_NEGATIVE,
    JUDGEMENTS,
    ROLES,
    Layout,
    Place,
    Roles,
    check_no_judgement,
    listed,
    parse_columns,
)
from embedding_finetune.data.jsonl import Record
from embedding_finetune.files import AnyPath

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

DATA_SUFFIXES = (*jsonl.SUFFIXES, *tables.DELIMITED, tables.PARQUET)
_LISTS = ("pos", "neg", "context")
_OWN_NAMES: Layout = {}
_NOT_READ = (".xlsx", ".xls", ".ods", ".arrow", ".feather", ".parquet.gz", ".zip", ".bz2", ".xz", ".zst")


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
        place, roles = Place(file, asked), Roles(asked, fields)
        if tables.is_table(file):
            yield from _read_table(place, roles, fields, others=others)
        else:
            yield from _read_lines(place, roles)
        if not place.number:
            rows = "one JSON object per line" if place.table is None else "rows"
            raise UserError(f"{file}: the file is empty; expected {rows}")
        roles.log_unused(file)


def _read_lines(place: Place, roles: Roles) -> Iterator[tuple[Place, Record]]:
    if str(place.path).lower().endswith(_NOT_READ):
        raise UserError(f"{place.path}: such files are not read; save it as one of {', '.join(DATA_SUFFIXES)}")
    for number, record in jsonl.read(place.path):
        place.number = number
        names = tuple(record)
        layout = roles.layout(place, names)
        place.layout = layout or _OWN_NAMES
        if layout:
            if layout.get("pos") == ["positive"]:
                for name in JUDGEMENTS:
                    check_no_judgement(place, name, record.get(name))
            record = {field: _value(field, record, columns) for field, columns in layout.items()}
        yield place, record


def _value(field: str, record: Record, columns: Sequence[str]) -> object:
    """A field of a record; sentence-transformers' columns hold one text each."""
    one_text = field in _LISTS and (columns[0] == "positive" or ANOTHER_NEGATIVE.fullmatch(columns[0]))
    return _as_list([record[column] for column in columns]) if one_text else record[columns[0]]


def _as_list(values: Iterable[object]) -> list[object]:
    """Texts and lists of texts as one list, without what is null."""
    return [text for value in values for text in (value if isinstance(value, list) else [value]) if text is not None]


def _read_table(place: Place, roles: Roles, used: Sequence[str], *, others: bool) -> Iterator[tuple[Place, Record]]:
    place.table = names = tables.column_names(place.path)
    if not names:
        return
    is_parquet = tables.is_parquet(place.path)
    layout: Layout = roles.layout(place, tuple(names)) or {name: [name] for name in names}
    place.layout = layout
    judgements = [name for name in JUDGEMENTS if name in names and layout.get("pos") == ["positive"]]
    fields, wanted = layout, set(names)
    if is_parquet and not others:  # the cells of a csv file have to be parsed anyway
        fields = {field: columns for field, columns in layout.items() if field in used} or {names[0]: names[:1]}
        wanted = {*itertools.chain(*fields.values()), *judgements}
        if unread := [name for name in names if name not in wanted]:
            logger.info("%s: ignored: %s", place.path, listed(unread))
    for first, batch in tables.read_columns(place.path, [name for name in names if name in wanted]):
        for name in judgements:
            for number, value in enumerate(batch[name], first):
                place.number = number
                check_no_judgement(place, name, value)
        columns = [
            _column([batch[name] for name in names], is_list=field in _LISTS and field in used)
            for field, names in fields.items()
        ]
        for number, values in enumerate(zip(*columns), first):
            record = dict(zip(fields, values))
            if not is_parquet and None in values:
                record = {field: value for field, value in record.items() if value is not None}
                if not any(values):
                    continue
            place.number = number
            yield place, record


def _column(columns: Sequence[list[Any]], *, is_list: bool) -> list[Any]:
    """The values of a field: of one column, or of those that hold one text each."""
    if len(columns) > 1:
        return [_as_list(values) for values in zip(*columns)]
    if is_list:
        return [[value] if isinstance(value, str) else value for value in columns[0]]
    return columns[0]


def check_can_be_written(flag: str, path: AnyPath) -> None:
    """Raise UserError naming `flag` for a name of a format that is only read."""
    target = os.path.realpath(path)  # what is written, where the path is a link
    if target.lower().endswith((*tables.DELIMITED, *_NOT_READ)):
        raise UserError(f"{flag}: {path}: such files are not written; give a name that ends in .jsonl or .parquet")
    if tables.is_parquet(target) != tables.is_parquet(path):
        raise UserError(f"{flag}: {path} is a link to {target}, a file of another format; give the file")


def schema_to_write(
    path: AnyPath, rows: Sequence[Record], names: Iterable[str], *, source: AnyPath
) -> "pa.Schema | None":
    """What `write` needs for a name that ends in .parquet: the columns for rows of the `source`, None for other names.

    names: the columns, in order. Raises UserError where a column cannot hold all values.
    """
    return (
        parquet_output.schema_of(path, names, rows, like=data_files(source, quiet=True))
        if tables.is_parquet(path)
        else None
    )


def write(path: AnyPath, records: Iterable[Record], schema: "pa.Schema | None" = None) -> None:
    """Write records as parquet where there is a schema, else as JSON Lines.

    A run that is killed leaves the old file or the new one.
    """
    if schema is None:
        jsonl.write(path, records)
    else:
        parquet_output.write_parquet(path, records, schema)


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
