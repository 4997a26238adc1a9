"""The record of what weights were trained on."""

import numpy as np
import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.model.training_queries import read_training_queries, write_training_queries


def test_the_record_holds_every_id_once_in_order(tmp_path):
    write_training_queries(tmp_path, np.array([7, 2**62, 3, 7], dtype=np.int64))
    found = read_training_queries(str(tmp_path))
    assert (found.tolist(), found.dtype) == ([3, 7, 2**62], np.int64)
    write_training_queries(tmp_path, np.array([5], dtype=np.int64))
    assert read_training_queries(str(tmp_path)).tolist() == [5]


def test_weights_without_a_record_are_known_to_be_trained_on_nothing(tmp_path):
    found = read_training_queries(str(tmp_path))
    assert (found.shape, found.dtype) == ((0,), np.int64)


@pytest.mark.parametrize("damage", ["cut", "no array", "empty", "of numbers that are not whole", "a pickle"])
def test_a_damaged_record_is_named_with_the_remedy(tmp_path, damage):
    path = tmp_path / "training_queries.npy"
    write_training_queries(tmp_path, np.arange(100))
    if damage == "of numbers that are not whole":
        np.save(path, np.array([0.5]))
    elif damage == "a pickle":
        np.save(path, np.array([{"a": 1}], dtype=object))
    else:
        path.write_bytes({"cut": path.read_bytes()[:-300], "no array": b"not an array", "empty": b""}[damage])
    with pytest.raises(UserError) as refusal:
        read_training_queries(str(tmp_path))
    assert str(refusal.value).startswith(f"{path}: damaged (")
    assert str(refusal.value).endswith("remove it to go on without a record of training queries")
    assert "\n" not in str(refusal.value)
