"""The record in a checkpoint of the queries it was trained on: `training_queries.npy`, their hashes."""

from pathlib import Path

import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.files import AnyPath, atomic_writer
from embedding_finetune.model.checkpoint import find_file

_FILE = "training_queries.npy"


def read_training_queries(name_or_path: str, *, cache_dir: str | None = None) -> np.ndarray:
    """texts.text_id of every query that the weights were trained on, sorted: (N,) int64, empty without a record.

    Raises UserError when the record is damaged.
    """
    path = find_file(name_or_path, _FILE, cache_dir)
    if path is None:
        return np.empty(0, np.int64)
    try:
        return np.load(path).astype(np.int64, casting="safe")
    except (ValueError, TypeError, EOFError) as error:
        raise UserError(
            f"{path}: damaged ({error}); remove it to go on without a record of training queries"
        ) from error


def write_training_queries(folder: AnyPath, ids: np.ndarray) -> None:
    """Write the record that read_training_queries reads. ids: (N,) int64, in any order."""
    with atomic_writer(Path(folder) / _FILE) as file:
        np.save(file, np.unique(ids))
