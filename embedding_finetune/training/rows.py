"""Training rows: validated, mapped into memory from disk, and their columns.

Shapes: R rows, N numbers in all lists of a column.
"""

import itertools
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from embedding_finetune.command_line import UserError, scratch_folder
from embedding_finetune.data import beir
from embedding_finetune.data.fields import field_value
from embedding_finetune.data.formats import data_files
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.judgements import NO_JUDGEMENTS, Judgements, settle_rows
from embedding_finetune.data.records import read_training_rows
from embedding_finetune.data.texts import canonical, folded_id, text_id
from embedding_finetune.distributed import once_per_machine
from embedding_finetune.training.row_columns import read_column

logger = logging.getLogger(__name__)

_ROWS_PER_WRITE = 1000
_CHARACTERS_PER_WRITE = 2**21
"""Rows are held until they are so many, or their texts so long. The more there are, the fewer pages of the file are
touched when it is mapped, each of which counts as the process's memory."""

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
        "confirmed": datasets.Value("int32"),  # how many of the first "neg" were judged to answer nothing
        "file": datasets.Value("int32"),  # its place among the files of --train_data
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
    train_data: str | Sequence[str],
    columns: Sequence[str] = (),
    *,
    max_rows_per_file: int | None = None,
    seed: int = 0,
    scores_required: bool = False,
    may_be_held_out: bool = False,
    hold_out_field: str | None = None,
    judgements: Judgements = NO_JUDGEMENTS,
) -> datasets.Dataset:
    """Validate the rows of files, and of folders' files, and map them into memory from disk, in the order given.

    Under torchrun one process of each machine validates and writes them, and all of the machine map the same files.
    With max_rows_per_file, that many rows of each file are drawn without replacement, kept in order.
    may_be_held_out: keep what evaluation reads of rows. hold_out_field: the field whose rows are held out together.
    judgements: what is known of the rows' queries, see judgements.settle_rows.
    Raises UserError naming file and line or row, with scores_required also where a row has texts without scores, and
    where a row lacks hold_out_field.
    """
    paths = training_files([train_data] if isinstance(train_data, str) else train_data)
    options = (scores_required, may_be_held_out, hold_out_field)
    most = max_rows_per_file

    def write(number: int, path: Path) -> str:
        file = _write_rows(_training_rows(path, columns, number, judgements, *options))
        return file if most is None else _draw(file, most, f"{seed}:{path.name}")

    rows = _mapped(once_per_machine(lambda: [write(number, path) for number, path in enumerate(paths)]))
    if len(paths) > 1:
        for path, count in zip(paths, np.bincount(read_column(rows, "file"), minlength=len(paths)).tolist()):
            logger.info("%s: %d training rows", path, count)
    return rows


def keep_rows(rows: datasets.Dataset, kept: np.ndarray) -> datasets.Dataset:
    """The rows where `kept` (R,) is True, in a file of their own; rows: what load_rows gives.

    Rows that are selected by their numbers are read a hundred times slower. One process of each machine writes them.
    """
    return _mapped(once_per_machine(lambda: [_write_kept(_files_of(rows), kept)]))


def _mapped(files: Sequence[str]) -> datasets.Dataset:
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def _files_of(rows: datasets.Dataset) -> list[str]:
    return [file["filename"] for file in rows.cache_files]


def _draw(file: str, most: int, seed: str) -> str:
    """A file of at most so many rows of a file, which it replaces."""
    count = sum(batch.num_rows for batch in _stored_batches(file))
    if count <= most:
        return file
    kept = np.zeros(count, dtype=bool)
    kept[random.Random(seed).sample(range(count), most)] = True
    drawn = _write_kept([file], kept)
    os.remove(file)
    return drawn


def _write_kept(files: Sequence[str], kept: np.ndarray) -> str:
    start = 0
    with _new_file() as (target, writer):
        for batch in itertools.chain.from_iterable(map(_stored_batches, files)):
            end = start + batch.num_rows
            if kept[start:end].any():
                writer.write_batch(batch.filter(pa.array(kept[start:end])))
            start = end
    return target


def _stored_batches(file: str) -> Iterator[pa.RecordBatch]:
    """The rows of a file, read and not mapped: the pages of a mapped file count as this process's memory."""
    with pa.OSFile(file, "rb") as source, pa.ipc.open_stream(source) as batches:
        yield from batches


@contextmanager
def _new_file() -> Iterator[tuple[str, Any]]:
    """A new file of rows, and what writes batches into it. Every run writes anew: no cache can be stale."""
    target = os.path.join(tempfile.mkdtemp(dir=scratch_folder()), "rows.arrow")
    try:
        with pa.OSFile(target, "wb") as file, pa.ipc.new_stream(file, ROW_FEATURES.arrow_schema) as writer:
            yield target, writer
    except OSError as error:
        raise UserError(
            f"{target}: the training rows cannot be written there: {error.strerror or error}; "
            "make room, or set TMPDIR to another folder"
        ) from error


def training_files(train_data: Sequence[str]) -> list[Path]:
    """The files of --train_data, those of folders in sorted order; a BEIR folder counts as one file.

    Raises UserError where one is there twice.
    """
    paths = [path for given in train_data for path in data_files(given)]
    places: dict[tuple[int, int], Path] = {}
    for path in paths:
        read = beir.find_split(path, "train").qrels if beir.is_beir(path) else path
        status = os.stat(read)  # the same for all names and links of a file
        earlier = places.setdefault((status.st_dev, status.st_ino), path)
        if earlier is not path:
            also = "" if str(earlier) == str(path) else f", as {earlier} too"
            raise UserError(f"--train_data: {path} is given twice{also}; give it once")
    return paths


def _write_rows(rows: Iterator[Record]) -> str:
    """Write rows in Arrow's format; gives the file."""
    with _new_file() as (target, writer):
        for batch in _batches(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=ROW_FEATURES.arrow_schema))
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
    path: Path,
    columns: Sequence[str],
    number: int,
    judgements: Judgements,
    scores_required: bool,
    may_be_held_out: bool,
    hold_out_field: str | None,
) -> Iterator[Record]:
    known = [*(EVALUATION_FIELDS if may_be_held_out else ()), *([] if hold_out_field is None else [hold_out_field])]
    rows = read_training_rows(
        path, columns, scores_required=scores_required, field_required=hold_out_field, known=known
    )
    for row, confirmed in settle_rows(rows, judgements, path):
        yield {
            "query": row["query"],
            "instruction": row.get("instruction"),
            "pos": row["pos"],
            "neg": row.get("neg", []),
            "query_id": text_id(row["query"]),
            "pos_ids": list(map(text_id, row["pos"])),
            "pos_scores": row.get("pos_scores") or [],
            "neg_scores": row.get("neg_scores") or [],
            "confirmed": confirmed,
            "file": number,
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


def replace_negatives(rows: datasets.Dataset, negatives: Iterator[list[str]]) -> datasets.Dataset:
    """The rows with other negatives, in a file of their own. Scores are left out: they belong to the old ones.

    negatives: those of each row, the confirmed ones first. One process of each machine writes them.
    """
    return _mapped(once_per_machine(lambda: [_write_rows(map(_with_negatives, stored_rows(rows), negatives))]))


def _with_negatives(row: Record, texts: list[str]) -> Record:
    judged = set(map(canonical, row["neg"][: row["confirmed"]]))
    confirmed = sum(canonical(text) in judged for text in texts) if judged else 0
    return {**row, "neg": texts, "confirmed": confirmed, "pos_scores": [], "neg_scores": []}


def all_passages(rows: datasets.Dataset) -> Iterator[str]:
    """Every positive and negative of rows of load_rows."""
    return _texts(rows, ("pos", "neg"))


def all_positives(rows: datasets.Dataset) -> Iterator[str]:
    """Every positive of rows of load_rows."""
    return _texts(rows, ("pos",))


def confirmed_negatives(rows: datasets.Dataset) -> Iterator[str]:
    """Every negative of rows of load_rows that was judged to answer nothing."""
    if read_column(rows, "confirmed").any():
        for row in stored_rows(rows):
            yield from row["neg"][: row["confirmed"]]


def _texts(rows: datasets.Dataset, columns: Sequence[str]) -> Iterator[str]:
    for batch in itertools.chain.from_iterable(map(_stored_batches, _files_of(rows))):
        for column in columns:
            yield from batch[column].flatten().to_pylist()


def stored_rows(rows: datasets.Dataset) -> Iterator[Record]:
    """Rows of load_rows one after the other."""
    for batch in itertools.chain.from_iterable(map(_stored_batches, _files_of(rows))):
        yield from batch.to_pylist()
