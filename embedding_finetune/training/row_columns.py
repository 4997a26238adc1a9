"""Columns of training rows, as rows.load_rows gives these, read without making Python objects where that can be.

Shapes: R rows, N numbers in all lists of a column.
"""

import hashlib
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa

_ROWS_PER_READ = 10_000


def read_column(rows: datasets.Dataset, column: str) -> np.ndarray:
    """A column of numbers: (R,)."""
    return rows.select_columns([column]).with_format("arrow")[:][column].to_numpy()


def instructions_of(rows: datasets.Dataset) -> Iterator[str | None]:
    """The instruction of each row, None for a row without."""
    for table in rows.select_columns(["instruction"]).with_format("arrow").iter(batch_size=_ROWS_PER_READ):
        yield from table["instruction"].to_pylist()


def list_lengths(rows: datasets.Dataset, column: str) -> np.ndarray:
    """How many items each row has in a column of lists: (N,) int64."""
    tables = rows.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_PER_READ)
    lengths = [table[column].combine_chunks().value_lengths().to_numpy() for table in tables]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def flatten_column(rows: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The row number of each item in a column of lists of int64, and the items, row after row: (N,) each."""
    numbers, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_PER_READ):
        lists = table[column].combine_chunks()
        numbers.append(lists.flatten().to_numpy())
        counts.append(lists.value_lengths().to_numpy())
    return np.repeat(np.arange(len(rows)), np.concatenate(counts)), np.concatenate(numbers)


def rows_digest(rows: datasets.Dataset) -> str:
    """A hash of the texts and scores of all rows, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    columns = ["query", "instruction", "pos", "neg", "pos_scores", "neg_scores"]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS_PER_READ):
        for name in columns:
            for part in _content(table[name].combine_chunks()):
                digest.update(part)
    return digest.hexdigest()


def _content(values: pa.Array) -> Iterator[memoryview]:
    """What an array holds, whatever part of larger buffers it is. Lists and numbers have no nulls."""
    if values.null_count:
        yield values.is_null().to_numpy(zero_copy_only=False).data
        values = values.fill_null("")
    if pa.types.is_list(values.type):
        yield values.value_lengths().to_numpy().data
        yield from _content(values.flatten())
    elif not len(values):  # there may be no buffers
        return
    elif pa.types.is_large_string(values.type):
        _, offsets, texts = values.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
        yield np.diff(ends).data
        yield memoryview(texts)[ends[0] : ends[-1]]
    else:
        yield values.to_numpy().data
