"""Rows as a parquet file: columns whose types change no value."""

import io
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.tables import is_parquet, open_parquet
from embedding_finetune.files import AnyPath, atomic_writer

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_WRITE = 10_000


def schema_of(path: AnyPath, names: Iterable[str], rows: Sequence[Record], like: Sequence[AnyPath]) -> "pa.Schema":
    """Columns with these names for the rows, to be written at `path` as parquet.

    like: files that the rows are from. A column has the type that it has in a parquet file among them, else what
    pyarrow makes of its values. Raises UserError where these are of several types, which a column cannot hold.
    """
    import pyarrow as pa

    texts, scores = pa.list_(pa.string()), pa.list_(pa.float64())
    types = {"query": pa.string(), "pos": texts, "neg": texts, "pos_scores": scores, "neg_scores": scores}
    schemas = []
    for file in filter(is_parquet, like):
        with open_parquet(file) as parquet:
            schemas.append(parquet.schema_arrow)
    for name in names:
        if name not in types:
            known = [schema.field(name).type for schema in schemas if name in schema.names]
            types[name] = _type(path, name, [row.get(name) for row in rows], known)
    return pa.schema([(name, types[name]) for name in names])


def _type(path: AnyPath, name: str, values: list[Any], known: Sequence["pa.DataType"]) -> "pa.DataType":
    """The first of the known types that holds all values as they are, else their own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for type_ in (*dict.fromkeys(known), None):
        try:
            column = pa.array(values, type_)
            # An object without fields cannot be written, and one of too many levels could not be read.
            pq.write_table(pa.table({name: column[:1]}), trial := io.BytesIO())
            pq.ParquetFile(trial).close()
            if _are_same(column.to_pylist(), values):  # pyarrow cuts 2.5 to an integer without a word
                return column.type
            reason = f"as {column.type} they would change"
        except (pa.ArrowException, OSError, OverflowError, UnicodeEncodeError, TypeError, ValueError) as error:
            reason = first_line(error)
    raise UserError(
        f'{path}: "{name}" holds values that one column of a parquet file cannot: {reason}; give a name that ends in '
        ".jsonl"
    )


def _are_same(stored: object, value: object) -> bool:
    """Whether a value came back as it was; a field that an object lacks may have become null."""
    if isinstance(stored, list | tuple) and isinstance(value, list | tuple):
        return len(stored) == len(value) and all(map(_are_same, stored, value))
    if isinstance(stored, dict) and isinstance(value, dict):
        return all(_are_same(stored.get(name), value.get(name)) for name in stored.keys() | value.keys())
    return stored == value or (stored != stored and value != value)  # NaN is not equal to itself


def write_parquet(path: AnyPath, records: Iterable[Record], schema: "pa.Schema") -> None:
    """Write records as a parquet file. A run that is killed leaves the old file or the new one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    remaining = iter(records)
    with atomic_writer(path) as file, pq.ParquetWriter(file, schema) as writer:
        while rows := list(itertools.islice(remaining, _ROWS_PER_WRITE)):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
