"""Training rows: validated, mapped into memory from disk, and their columns of lists.

Shapes: R rows, N numbers in all lists of a column.
"""

import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from embedding_finetune.command_line import UserError, scratch_folder
from embedding_finetune.data.formats import data_files
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.records import field_value, read_training_rows
from embedding_finetune.data.texts import folded_id, text_id
from embedding_finetune.distributed import once_per_machine

_ROWS_PER_WRITE = 1000
_CHARACTERS_PER_WRITE = 2**21
"""Rows are held until they are so many, or their texts so long. The more there are, the fewer pages of the file are
touched when it is mapped, each of which counts as the process's memory."""

ROW_FEATURES = datasets.Features(
    {
        # Offsets of 64 bits: a few hundred long rows are more than the 2 GiB that those of 32 bits can tell apart.
        "query": datasets.Value("large_string"),
        "pos": datasets.List(datasets.Value("large_string")),
        "neg": datasets.List(datasets.Value("large_string")),
        "query_id": datasets.Value("int64"),
        "pos_ids": datasets.List(datasets.Value("int64")),
        "pos_scores": datasets.List(datasets.Value("float32")),
        "neg_scores": datasets.List(datasets.Value("float32")),
        # Of rows that may be held out, else empty or 0: what ties them to others, see held_out.py, and what else
        # evaluation reads of them, as JSON.
        "query_key": datasets.Value("int64"),
        "pos_keys": datasets.List(datasets.Value("int64")),
        "field_key": datasets.Value("int64"),
        "field": datasets.Value("large_string"),
        "evaluation_fields": datasets.Value("large_string"),
    }
)
EVALUATION_FIELDS = ("id", "group", "instruction")


def load_rows(
    train_data: str,
    columns: Sequence[str] = (),
    *,
    max_rows_per_file: int | None = None,
    seed: int = 0,
    scores_required: bool = False,
    may_be_held_out: bool = False,
    hold_out_field: str | None = None,
) -> datasets.Dataset:
    """Validate the rows of a file, or of a folder's files, and map them into memory from disk.

    Under torchrun one process of each machine validates and writes them, and all of the machine map the same files.
    With max_rows_per_file, that many rows of each file are drawn without replacement, kept in order.
    may_be_held_out: keep what evaluation reads of rows. hold_out_field: the field whose rows are held out together.
    Raises UserError naming file and line or row, with scores_required also where a row has texts without scores, and
    where a row lacks hold_out_field.
    """
    paths = data_files(train_data)
    options = (scores_required, may_be_held_out, hold_out_field)
    written = once_per_machine(lambda: [_write_rows(path, columns, *options) for path in paths])
    per_file = []
    for path, file in zip(paths, written):
        rows = datasets.Dataset.from_file(file)
        if max_rows_per_file is not None and len(rows) > max_rows_per_file:
            chosen = random.Random(f"{seed}:{path.name}").sample(range(len(rows)), max_rows_per_file)
            rows = rows.select(sorted(chosen))
        per_file.append(rows)
    return datasets.concatenate_datasets(per_file)


def list_lengths(rows: datasets.Dataset, column: str) -> np.ndarray:
    """How many items each row has in a column of lists: (N,) int64."""
    tables = rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    lengths = [table[column].combine_chunks().value_lengths().to_numpy() for table in tables]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def flatten_column(rows: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The row number of each item in a column of lists of int64, and the items, row after row: (N,) each."""
    numbers, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        lists = table[column].combine_chunks()
        numbers.append(lists.flatten().to_numpy())
        counts.append(lists.value_lengths().to_numpy())
    return np.repeat(np.arange(len(rows)), np.concatenate(counts)), np.concatenate(numbers)


def _write_rows(
    path: Path, columns: Sequence[str], scores_required: bool, may_be_held_out: bool, hold_out_field: str | None
) -> str:
    """Write one file's rows in Arrow's format; gives the file. Every run writes them anew: no cache can be stale."""
    target = os.path.join(tempfile.mkdtemp(dir=scratch_folder()), "rows.arrow")
    schema = ROW_FEATURES.arrow_schema
    rows = _training_rows(path, columns, scores_required, may_be_held_out, hold_out_field)
    try:
        with pa.OSFile(target, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(rows):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    except OSError as error:
        raise UserError(
            f"{target}: the training rows cannot be written there: {error.strerror or error}; "
            "make room, or set TMPDIR to another folder"
        ) from error
    return target


def _batches(rows: Iterator[Record]) -> Iterator[list[Record]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(row["query"]) + sum(map(len, row["pos"])) + sum(map(len, row["neg"]))
        if len(batch) == _ROWS_PER_WRITE or characters > _CHARACTERS_PER_WRITE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _training_rows(
    path: Path, columns: Sequence[str], scores_required: bool, may_be_held_out: bool, hold_out_field: str | None
) -> Iterator[Record]:
    known = [*(EVALUATION_FIELDS if may_be_held_out else ()), *([] if hold_out_field is None else [hold_out_field])]
    rows = read_training_rows(
        path, columns, scores_required=scores_required, field_required=hold_out_field, known=known
    )
    for row in rows:
        yield {
            "query": row["query"],
            "pos": row["pos"],
            "neg": row.get("neg", []),
            "query_id": text_id(row["query"]),
            "pos_ids": list(map(text_id, row["pos"])),
            "pos_scores": row.get("pos_scores") or [],
            "neg_scores": row.get("neg_scores") or [],
            **(_held_out_columns(row, hold_out_field) if may_be_held_out else {}),
        }


def _held_out_columns(row: Record, field: str | None) -> Record:
    value = "" if field is None else field_value(row[field])
    fields = {name: row[name] for name in EVALUATION_FIELDS if row.get(name) is not None}
    return {
        "query_key": folded_id(row["query"]),
        "pos_keys": list(map(folded_id, row["pos"])),
        "field": value,
        "field_key": 0 if field is None else text_id(value),
        "evaluation_fields": json.dumps(fields, default=str) if fields else "{}",
    }


def read_column(rows: datasets.Dataset, column: str) -> np.ndarray:
    """A column of numbers: (R,)."""
    return rows.select_columns([column]).with_format("arrow")[:][column].to_numpy()


def all_passages(rows: datasets.Dataset) -> Iterator[str]:
    """Every positive and negative of the files, also of rows that were not drawn; see load_rows.

    The files are read, not mapped: their pages would count as this process's memory.
    """
    for file in rows.cache_files:
        with pa.OSFile(file["filename"], "rb") as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for column in ("pos", "neg"):
                    yield from batch[column].flatten().to_pylist()
