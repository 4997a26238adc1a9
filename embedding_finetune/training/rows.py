"""Training rows: validated, mapped into memory from disk, and their columns.

Shapes: R rows, N numbers in all lists of a column.
"""

import hashlib
import itertools
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from embedding_finetune.command_line import UserError, scratch_folder
from embedding_finetune.data import beir
from embedding_finetune.data.formats import data_files
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.records import read_training_rows
from embedding_finetune.data.texts import text_id
from embedding_finetune.distributed import once_per_machine

logger = logging.getLogger(__name__)

_ROWS_PER_WRITE = 100
"""Rows that are held until they are written: few, since each may hold megabytes."""

ROW_FEATURES = datasets.Features(
    {
        # Offsets of 64 bits: a few hundred long rows are more than the 2 GiB that those of 32 bits can tell apart.
        "query": datasets.Value("large_string"),
        "instruction": datasets.Value("large_string"),  # null where the row has none of its own
        "pos": datasets.List(datasets.Value("large_string")),
        "neg": datasets.List(datasets.Value("large_string")),
        "query_id": datasets.Value("int64"),
        "pos_ids": datasets.List(datasets.Value("int64")),
        "pos_scores": datasets.List(datasets.Value("float32")),
        "neg_scores": datasets.List(datasets.Value("float32")),
        "file": datasets.Value("int32"),  # its place among the files of --train_data
    }
)


def load_rows(
    train_data: str | Sequence[str],
    columns: Sequence[str] = (),
    *,
    max_rows_per_file: int | None = None,
    seed: int = 0,
    scores_required: bool = False,
) -> datasets.Dataset:
    """Validate the rows of files, and of folders' files, and map them into memory from disk, in the order given.

    Under torchrun one process of each machine validates and writes them, and all of the machine map the same files.
    With max_rows_per_file, that many rows of each file are drawn without replacement, kept in order.
    Raises UserError naming file and line or row, with scores_required also where a row has texts without scores.
    """
    paths = training_files([train_data] if isinstance(train_data, str) else train_data)
    written = once_per_machine(
        lambda: [_write_rows(path, columns, scores_required, number) for number, path in enumerate(paths)]
    )
    per_file = []
    for path, file in zip(paths, written):
        rows = datasets.Dataset.from_file(file)
        if max_rows_per_file is not None and len(rows) > max_rows_per_file:
            chosen = random.Random(f"{seed}:{path.name}").sample(range(len(rows)), max_rows_per_file)
            rows = rows.select(sorted(chosen))
        if len(paths) > 1:
            logger.info("%s: %d training rows", path, len(rows))
        per_file.append(rows)
    return datasets.concatenate_datasets(per_file)


def training_files(train_data: Sequence[str]) -> list[Path]:
    """The files of --train_data, those of folders in sorted order; a BEIR folder counts as one file.

    Raises UserError where one is there twice.
    """
    paths = [path for given in train_data for path in data_files(given)]
    places: dict[str, Path] = {}
    for path in paths:
        read = beir.find_split(path, "train").qrels if beir.is_beir(path) else path
        earlier = places.setdefault(os.path.realpath(read), path)
        if earlier is not path:
            also = "" if str(earlier) == str(path) else f", as {earlier} too"
            raise UserError(f"--train_data: {path} is given twice{also}; give it once")
    return paths


def numbers_of_files(rows: datasets.Dataset) -> np.ndarray:
    """Which file each row is of: (R,) int32."""
    return rows.select_columns(["file"]).with_format("arrow")[:]["file"].to_numpy()


def instructions_of(rows: datasets.Dataset) -> Iterator[str | None]:
    """The instruction of each row, None for a row without."""
    for table in rows.select_columns(["instruction"]).with_format("arrow").iter(batch_size=10_000):
        yield from table["instruction"].to_pylist()


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


def rows_digest(rows: datasets.Dataset) -> str:
    """A hash of the texts and scores of all rows, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    columns = ["query", "instruction", "pos", "neg", "pos_scores", "neg_scores"]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS_PER_WRITE):
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


def _write_rows(path: Path, columns: Sequence[str], scores_required: bool, number: int) -> str:
    """Write one file's rows in Arrow's format; gives the file. Every run writes them anew: no cache can be stale."""
    target = os.path.join(tempfile.mkdtemp(dir=scratch_folder()), "rows.arrow")
    schema = ROW_FEATURES.arrow_schema
    rows = _training_rows(path, columns, scores_required, number)
    try:
        with pa.OSFile(target, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while batch := list(itertools.islice(rows, _ROWS_PER_WRITE)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    except OSError as error:
        raise UserError(
            f"{target}: the training rows cannot be written there: {error.strerror or error}; "
            "make room, or set TMPDIR to another folder"
        ) from error
    return target


def _training_rows(path: Path, columns: Sequence[str], scores_required: bool, number: int) -> Iterator[Record]:
    for row in read_training_rows(path, columns, scores_required=scores_required):
        yield {
            "query": row["query"],
            "instruction": row.get("instruction"),
            "pos": row["pos"],
            "neg": row.get("neg", []),
            "query_id": text_id(row["query"]),
            "pos_ids": list(map(text_id, row["pos"])),
            "pos_scores": row.get("pos_scores") or [],
            "neg_scores": row.get("neg_scores") or [],
            "file": number,
        }
