"""A table of many types, and the rows of a file."""

import datetime
import decimal

import pyarrow as pa

from embedding_finetune.data import tables

TABLE = pa.table(
    {
        "text": pa.array(["a", "é", None, "d"]),
        "large": pa.array(["a", "b", "c", None], pa.large_string()),
        "dictionary": pa.array(["a", "b", "a", None]).dictionary_encode(),
        "list": pa.array([["a"], [], None, ["b", None]]),
        "large_list": pa.array([["a"], [], None, ["b", "c"]], pa.large_list(pa.large_string())),
        "fixed": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
        "nested": pa.array([[["a"], []], None, [], [["b", "c"]]]),
        "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}, {"a": 2, "b": None}]),
        "map": pa.array([[("k", 1)], [], None, [("l", 2)]], pa.map_(pa.string(), pa.int64())),
        "int": pa.array([1, 2, None, 4], pa.int16()),
        "float": pa.array([1.5, float("nan"), None, 4.0], pa.float32()),
        "bool": pa.array([True, False, None, True]),
        "bytes": pa.array([b"\xff", b"", None, b"d"]),
        "date": pa.array([datetime.date(2026, 1, 2)] * 3 + [None]),
        "stamp": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, 6)] * 3 + [None], pa.timestamp("us", "UTC")),
        "nanoseconds": pa.array([10**18 + 1, None, 3, 4], pa.timestamp("ns")),
        "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("0.02"), None], pa.decimal128(9, 2)),
        "nothing": pa.nulls(4),
    }
)


def rows_of(path, names=None):
    """(number, row) of all rows."""
    names = tables.column_names(path) if names is None else names
    batches = tables.read_columns(path, names)
    return [
        (number, dict(zip(batch, values)))
        for first, batch in batches
        for number, values in enumerate(zip(*batch.values()), first)
    ]
