"""Rows of csv, tsv and parquet files, through pyarrow, a batch at a time.

Readers give batches: the number of the first row, and the values of each column that was wanted. In csv and tsv, rows
are numbered as spreadsheets do, the header is row 1, all values are strings, and an empty cell is None. pyarrow is
imported where it is used: most runs read JSON Lines.
"""

import codecs
import csv
import io
import os
import re
import secrets
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.data.jsonl import open_for_reading
from embedding_finetune.files import AnyPath

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Batch = tuple[int, dict[str, list[Any]]]

DELIMITED = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
PARQUET = ".parquet"

_BLOCK_BYTES = (2**20, 2**26)
"""What is parsed at once of a csv or tsv file; its longest row may have as much as the last."""
_BATCH_BYTES = 2**25
"""What a batch of parquet holds at most, unless a single row is larger or texts repeat."""
_BUFFER_BYTES = 2**20
_ROWS_PER_BATCH = 1000
_ROWS_PER_WRITE = 1000
_WRONG_CELLS = re.compile(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)")


def is_table(path: AnyPath) -> bool:
    """Whether a file has columns, by its name."""
    return str(path).lower().endswith((*DELIMITED, PARQUET))


def is_parquet(path: AnyPath) -> bool:
    """Whether a file is to be parquet, by its name."""
    return str(path).lower().endswith(PARQUET)


def column_names(path: AnyPath) -> list[str]:
    """The names of a table's columns. Raises UserError where a name is there twice."""
    names = _parquet_names(path) if is_parquet(path) else [name for name in _header(path)[1] if name]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'{path}: the column "{name}" is there twice; rename one')
    return names


def read_columns(path: AnyPath, names: Sequence[str]) -> Iterator[Batch]:
    """The rows of a table, of which the columns with these names are read.

    Raises UserError for a file that is damaged. In csv and tsv, cells may be quoted, as RFC 4180 has it, and hold line
    breaks then. A file that is not UTF-8, a row with too many or too few cells, and a quote that is never closed are
    errors. A csv file has the separator of its header: a comma, a semicolon or a tab.
    """
    return _read_parquet(path, names) if is_parquet(path) else _read_delimited(path, names)


def _read_delimited(path: AnyPath, names: Sequence[str]) -> Iterator[Batch]:
    """Small blocks take little memory; a file with a row that is longer is read on with large ones from there."""
    delimiter, header, number = _header(path)
    number += 1  # of the next row
    are_quotes_checked = False
    for block_bytes in _BLOCK_BYTES:
        try:
            for rows in _parse_delimited(path, delimiter, len(header), number, block_bytes):
                if not are_quotes_checked and any(map(_has_line_break, rows.columns)):
                    _check_quotes(path, delimiter)
                    are_quotes_checked = True
                places = [header.index(name) for name in names]
                texts = [_texts(path, number, name, rows[place]) for name, place in zip(names, places)]
                yield number, dict(zip(names, texts))
                number += rows.num_rows
            return
        except _LongRowError:
            continue
    raise UserError(
        f"{path}: row {number} or one after it is longer than {_BLOCK_BYTES[-1] >> 20} MB, or a quote in it is never "
        "closed; close it, or use JSON Lines or parquet"
    )


class _LongRowError(Exception):
    """A row is longer than a block."""


def _parse_delimited(
    path: AnyPath, delimiter: str, cells: int, start: int, block_bytes: int
) -> Iterator["pa.RecordBatch"]:
    """The rows from the number `start` on, as columns of bytes."""
    import pyarrow as pa
    import pyarrow.csv

    columns = [str(place) for place in range(cells)]
    # With one thread pyarrow knows the row of an error. With names of columns it takes the header for a row.
    reading = pa.csv.ReadOptions(block_size=block_bytes, use_threads=False, column_names=columns)
    parsing = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False)
    as_bytes = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.binary()),
        null_values=[""],
        strings_can_be_null=True,
        check_utf8=False,
    )
    number, closed = 1, False
    try:
        file = _WithLastRow(path, cells=cells, delimiter=delimiter)
        with pa.PythonFile(file, mode="r") as raw, pa.csv.open_csv(raw, reading, parsing, as_bytes) as reader:
            for part in _slices(reader):
                closed = part.column(0)[-1].as_py() == file.last_cell
                before = min(max(0, start - number), part.num_rows)
                rows = part.slice(before, max(0, part.num_rows - before - closed))
                if rows.num_rows:
                    yield rows
                number += part.num_rows
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        message = first_line(error)
        if "straddl" in message:
            raise _LongRowError from error
        raise UserError(f"{path}: {_reason(error, message, number)}") from error
    if not closed:
        raise UserError(f"{path}: row {number - 1}: a quote is opened there and never closed")


def _has_line_break(cells: "pa.Array") -> bool:
    """Whether one of the cells has several lines, as one has that a stray quote made of several rows."""
    import pyarrow.compute as pc

    return bool(pc.any(pc.match_substring_regex(cells, r"[\r\n]")).as_py())


def _check_quotes(path: AnyPath, delimiter: str) -> None:
    """Raise UserError where a quoted cell goes on after its closing quote, which pyarrow takes as it comes."""
    number, limit = 0, csv.field_size_limit(sys.maxsize)
    try:
        with open_for_reading(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
            for _ in csv.reader(text, delimiter=delimiter, strict=True):
                number += 1
    except csv.Error as error:
        if "unexpected end" not in str(error):  # a quote that is never closed is told where it is met
            raise UserError(
                f"{path}: row {number + 1}: a quoted cell goes on after its closing quote; write a quote within a cell "
                "as two, in a quoted cell"
            ) from error
    finally:
        csv.field_size_limit(limit)


def _header(path: AnyPath) -> tuple[str, list[str], int]:
    """The separator, the first row that is not blank, and its number."""
    try:
        with open_for_reading(path) as file:
            delimiter = _separator(path, file.peek(1))
            # What follows the header is decoded with it, and is checked where it is read.
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            rows = enumerate(csv.reader(text, delimiter=delimiter), start=1)
            number, names = next(((number, names) for number, names in rows if names), (0, []))
            "".join(names).encode()
            return delimiter, names, number
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: row {number}: not UTF-8; save the file as UTF-8, in Excel as CSV UTF-8") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: row 1: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _separator(path: AnyPath, start: bytes) -> str:
    if str(path).lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    without_quoted = re.sub(b'"[^"]*"', b"", start.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n"))
    header = re.split(rb"[\r\n]", without_quoted)[0]
    return max(",;\t", key=lambda separator: header.count(separator.encode()))


class _WithLastRow(io.RawIOBase):
    """A file of bytes with one row more, which is not found where a quote before it is never closed."""

    def __init__(self, path: AnyPath, *, cells: int, delimiter: str) -> None:
        self.last_cell = secrets.token_hex().encode()
        self._file = open_for_reading(path)
        self._rest = io.BytesIO(b"\n" + self.last_cell + delimiter.encode() * (cells - 1) + b"\n")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size) or self._rest.read(size)

    def close(self) -> None:
        self._file.close()
        super().close()


def _slices(batches: Iterable["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
            yield batch.slice(start, _ROWS_PER_BATCH)


def _texts(path: AnyPath, number: int, name: str, cells: "pa.Array") -> list[str | None]:
    """Bytes as strings, None for an empty one; `number` is the row of the first."""
    import pyarrow as pa

    try:
        return cells.cast(pa.string()).to_pylist()
    except pa.ArrowInvalid:
        for row, cell in enumerate(cells.to_pylist(), start=number):
            try:
                (cell or b"").decode()
            except UnicodeDecodeError:
                raise UserError(
                    f'{path}: row {row}: "{name}" is not UTF-8; save the file as UTF-8, in Excel as CSV UTF-8'
                ) from None
        raise


def _reason(error: Exception, message: str, number: int) -> str:
    if match := _WRONG_CELLS.match(message):
        row, expected, there = match.groups()
        return f"row {row}: expected {expected} cells, as the header has, but there are {there}; check its quotes"
    return f"cannot be read after row {number - 1}: {getattr(error, 'strerror', None) or message}"


def _parquet_names(path: AnyPath) -> list[str]:
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def open_parquet(path: AnyPath) -> "pq.ParquetFile":
    """A parquet file to read from. Raises UserError for one that is missing, empty or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if os.path.exists(path) and os.path.getsize(path) == 0:
        raise UserError(f"{path}: the file is empty; expected rows")
    try:
        # Pages are read one after the other: whole row groups may be as large as the file.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a damaged name of a column
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _read_parquet(path: AnyPath, names: Sequence[str]) -> Iterator[Batch]:
    import pyarrow as pa

    number = 1
    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(_rows_per_batch(file.metadata), columns=names):
                yield number, {name: _values(path, number, name, batch[name]) for name in names}
                number += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{path}: row {number} or one after it cannot be read: {reason}") from error


def _rows_per_batch(metadata: "pq.FileMetaData") -> int:
    """So many that a batch of rows of average size is held easily."""
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(_ROWS_PER_BATCH, _BATCH_BYTES * metadata.num_rows // max(size, 1)))


def _values(path: AnyPath, number: int, name: str, column: "pa.Array") -> list[Any]:
    """The values of a column as Python has them; `number` is the row of the first."""
    unreadable = (ValueError, OverflowError)  # not UTF-8, a date beyond the year 9999
    try:
        return _as_python(column)
    except unreadable:
        for row, value in enumerate(column, start=number):
            try:
                value.as_py()
            except unreadable as error:
                raise UserError(
                    f'{path}: row {row}: "{name}" cannot be read: {first_line(error)}; leave the column out'
                ) from error
        raise


def _as_python(column: "pa.Array") -> list[Any]:
    """What to_pylist gives, ten times as fast for lists of texts."""
    import pyarrow as pa

    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or pa.types.is_nested(column.type.value_type):
        return column.to_pylist()
    items = column.flatten().to_pylist()
    values: list[Any] = []
    start = 0
    for length in column.value_lengths().to_pylist():
        values.append(None if length is None else items[start : start + length])
        start += length or 0
    return values
