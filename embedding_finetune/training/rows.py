"""Training rows: validated, mapped into memory from disk, and their columns of lists.

Shapes: N numbers in all lists of a column.
"""

import hashlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from embedding_finetune.command_line import UserError, first_line, scratch_folder
from embedding_finetune.data import jsonl
from embedding_finetune.data.texts import text_id
from embedding_finetune.distributed import once_per_machine

_ROWS_PER_WRITE = 100
"""Rows that are held until they are written: few, since each may hold megabytes."""

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
    }
)


def load_rows(
    train_data: str, *, max_rows_per_file: int | None = None, seed: int = 0, scores_required: bool = False
) -> datasets.Dataset:
    """Validate the rows of a file, or of a folder's files, and map them into memory from disk.

    Under torchrun one process of each machine validates and writes them, and all of the machine map the same files.
    With max_rows_per_file, that many rows of each file are drawn without replacement, kept in order.
    Raises UserError naming `path:line`, with scores_required also where a row has texts without scores.
    """
    paths = jsonl.data_files(train_data)
    written = once_per_machine(lambda: [_write_rows(path, scores_required) for path in paths])
    per_file = []
    for path, files in zip(paths, written):
        rows = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
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


def rows_digest(rows: datasets.Dataset) -> str:
    """A hash of the texts and scores of all rows, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    columns = ["query", "pos", "neg", "pos_scores", "neg_scores"]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS_PER_WRITE):
        for name in columns:
            for part in _content(table[name].combine_chunks()):
                digest.update(part)
    return digest.hexdigest()


def _content(values: pa.Array) -> Iterator[memoryview]:
    """What an array without nulls holds, whatever part of larger buffers it is."""
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


def _write_rows(path: Path, scores_required: bool) -> list[str]:
    """Write one file's rows in Arrow format; gives the files. Every run writes them anew: no cache can be stale."""
    folder = tempfile.mkdtemp(dir=scratch_folder())
    try:
        rows = datasets.Dataset.from_generator(
            _training_rows,
            gen_kwargs={"path": str(path), "scores_required": scores_required},
            features=ROW_FEATURES,
            cache_dir=folder,
            writer_batch_size=_ROWS_PER_WRITE,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, OSError):
            raise UserError(
                f"{folder}: the training rows cannot be written there: {first_line(cause)}; "
                "make room, or set TMPDIR to another folder"
            ) from error
        raise
    return [file["filename"] for file in rows.cache_files]


def _training_rows(path: str, scores_required: bool) -> Iterator[jsonl.Record]:
    for row in jsonl.read_training_rows(path, scores_required=scores_required):
        yield {
            "query": row["query"],
            "pos": row["pos"],
            "neg": row.get("neg", []),
            "query_id": text_id(row["query"]),
            "pos_ids": list(map(text_id, row["pos"])),
            "pos_scores": row.get("pos_scores") or [],
            "neg_scores": row.get("neg_scores") or [],
        }
