"""Training rows: validated, mapped into memory from disk, and their columns of lists.

Shapes: N numbers in all lists of a column.
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np

from embedding_finetune import jsonl
from embedding_finetune.command_line import UserError, scratch_folder
from embedding_finetune.jsonl import text_id

ROW_FEATURES = datasets.Features(
    {
        "query": datasets.Value("string"),
        "pos": datasets.List(datasets.Value("string")),
        "neg": datasets.List(datasets.Value("string")),
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

    With max_rows_per_file, that many rows of each file are drawn without replacement, kept in order.
    Raises UserError naming `path:line`, with scores_required also where a row has texts without scores.
    """
    per_file = []
    for path in jsonl.data_files(train_data):
        rows = _mapped_rows(path, scores_required)
        if max_rows_per_file is not None and len(rows) > max_rows_per_file:
            chosen = random.Random(f"{seed}:{path.name}").sample(range(len(rows)), max_rows_per_file)
            rows = rows.select(sorted(chosen))
        per_file.append(rows)
    return datasets.concatenate_datasets(per_file)


def end_to_end(rows: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists of int64: the row that each number stands in, and the numbers, row after row: (N,) each."""
    numbers, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        lists = table[column].combine_chunks()
        numbers.append(lists.flatten().to_numpy())
        counts.append(lists.value_lengths().to_numpy())
    return np.repeat(np.arange(len(rows)), np.concatenate(counts)), np.concatenate(numbers)


def _mapped_rows(path: Path, scores_required: bool) -> datasets.Dataset:
    """One file's rows in Arrow format on disk. They are written anew in every run: no cache can be stale."""
    folder = tempfile.mkdtemp(dir=scratch_folder())
    try:
        return datasets.Dataset.from_generator(
            _training_rows,
            gen_kwargs={"path": str(path), "scores_required": scores_required},
            features=ROW_FEATURES,
            cache_dir=folder,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


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
