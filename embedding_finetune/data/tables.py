"""Rows of csv, tsv and parquet files, through pyarrow, a batch at a time.

Readers yield (number, record). In csv and tsv, rows are numbered as spreadsheets do, the header is row 1, and an empty
cell is missing. pyarrow is imported where it is used: most runs read JSON Lines.
"""

import gzip
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.data.jsonl import Record
from embedding_finetune.files import AnyPath, atomic_writer

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK_BYTES = 2**24
"""What is parsed at once, and the longest row of a csv or tsv file."""
_ROWS_PER_BATCH = 1000
_END_BYTES = 10
_WRONG_CELLS = re.compile(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)")


def read_delimited(path: AnyPath) -> Iterator[tuple[int, Record]]:
    """Rows of a csv or tsv file as records of strings; a csv file may have semicolons, if its header has.

    Cells may be quoted, as RFC 4180 has it, and hold line breaks then. Raises UserError for a file that is not UTF-8, a
    row with too many or too few cells, a header that names a column twice, and a quote that is never closed.
    """
    import pyarrow as pa
    import pyarrow.csv

    number = 1
    try:
        with _open(path) as raw:
            header = raw.readline().decode("utf-8-sig", errors="replace")
        parse = pa.csv.ParseOptions(delimiter=_delimiter(path, header), newlines_in_values=True)
        with _open(path) as raw, pa.csv.open_csv(raw, _serial(), parse) as reader:
            names = reader.schema.names
        _check_header(path, names)
        as_bytes = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()), strings_can_be_null=False, check_utf8=False
        )
        counting = _QuoteCounter(_open(path))
        with pa.PythonFile(counting, mode="r") as raw, pa.csv.open_csv(raw, _serial(), parse, as_bytes) as reader:
            last: Record = {}
            for batch in reader:
                for last in _decoded(path, number, batch):
                    number += 1
                    yield number, {name: cell for name, cell in last.items() if cell}
        if counting.ends_within_quotes and any("\n" in cell for cell in last.values()):
            raise UserError(f"{path}: row {number}: a quote is opened there and never closed")
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: {_reason(error, number)}") from error


def _serial() -> Any:
    """With one thread pyarrow knows the row of an error."""
    import pyarrow.csv

    return pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)


def _open(path: AnyPath) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if str(path).endswith(".gz") else open(path, "rb")


def _delimiter(path: AnyPath, header: str) -> str:
    if ".tsv" in str(path)[-7:]:
        return "\t"
    return ";" if header.count(";") > header.count(",") else ","


def _check_header(path: AnyPath, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: row 1: the column {name!r} is there twice; rename one")


class _QuoteCounter:
    """A binary file that counts the quotes of what is read: pyarrow takes the rest of a file as the last cell."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._quotes = 0
        self._end = b""
        self.closed = False

    @property
    def ends_within_quotes(self) -> bool:
        """Whether it looks as if a quote were never closed."""
        return self._quotes % 2 == 1 and not self._end.rstrip().endswith(b'"')

    def read(self, size: int = -1) -> bytes:
        part = self._file.read(size)
        self._quotes += part.count(b'"')
        self._end = (self._end + part)[-_END_BYTES:]
        return part

    def close(self) -> None:
        self.closed = True
        self._file.close()


def _decoded(path: AnyPath, number: int, batch: "pa.RecordBatch") -> list[Record]:
    """The rows of a batch of bytes after row `number`, as strings."""
    import pyarrow as pa

    try:
        strings = [column.cast(pa.string()) for column in batch.columns]
    except pa.ArrowInvalid:
        for place, row in enumerate(batch.to_pylist(), start=number + 1):
            for name, cell in row.items():
                try:
                    cell.decode()
                except UnicodeDecodeError:
                    raise UserError(f"{path}: row {place}: {name!r} is not UTF-8; save the file as UTF-8") from None
        raise
    return pa.RecordBatch.from_arrays(strings, names=batch.schema.names).to_pylist()


def _reason(error: Exception, number: int) -> str:
    message = first_line(error)
    if "straddl" in message:
        return f"row {number + 1} or one after it is longer than {_BLOCK_BYTES >> 20} MB; use JSON Lines or parquet"
    if "Empty CSV file" in message:
        return "the file is empty; expected a header and rows"
    if match := _WRONG_CELLS.match(message):
        return "row {}: expected {} cells, as the header has, but there are {}".format(*match.groups())
    return f"cannot be read: {getattr(error, 'strerror', None) or message}"


def read_parquet(path: AnyPath) -> Iterator[tuple[int, Record]]:
    """Rows of a parquet file, from 1, as records of what pyarrow makes of its columns.

    Raises UserError for a file that is no parquet file, or a damaged one.
    """
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_PER_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: row {number + 1}: cannot be read: {reason}") from error


def write_parquet(path: AnyPath, records: Iterable[Record]) -> None:
    """Write records as a parquet file, fields in first-seen order.

    A run that is killed leaves the old file or the new one. Raises UserError for a field whose values are of several
    types, which a column cannot hold.
    """
    import pyarrow as pa
    import pyarrow.parquet

    rows = list(records)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException as error:
            raise UserError(
                f"{path}: {name!r} holds values of several types, which a column cannot: {first_line(error)}; "
                "give a name that ends in .jsonl"
            ) from error
    with atomic_writer(path) as file:
        pa.parquet.write_table(pa.table(columns), file)
