import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.training import pool_file as module
from embedding_finetune.training.pool_file import PoolFile, new_file

VECTORS = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)


@pytest.fixture(params=[2**30, 5])
def pool(request, monkeypatch):
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", request.param)  # also less than a row
    pool = PoolFile(new_file(VECTORS.nbytes), VECTORS.shape)
    for first in (8, 0, 4):
        pool.write(first, VECTORS[first : first + 4])
    return pool


def test_blocks_come_back_as_they_were_written(pool):
    assert (len(pool), pool.nbytes) == (11, VECTORS.nbytes)
    for part in (slice(None), slice(2, 5), slice(9, 99), slice(4, 4)):
        assert torch.equal(pool[part], torch.from_numpy(VECTORS[part]))


@given(places=st.lists(st.integers(0, 10), max_size=20))
def test_rows_come_in_the_order_that_they_are_asked_for(places):
    pool = PoolFile(new_file(VECTORS.nbytes), VECTORS.shape)
    pool.write(0, VECTORS)
    assert torch.equal(
        pool[np.array(places, dtype=np.int64)], torch.from_numpy(VECTORS[np.array(places, dtype=np.int64)])
    )


def test_all_go_to_a_device_block_by_block(pool, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 4)
    assert torch.equal(pool.on(torch.device("cpu")), torch.from_numpy(VECTORS))


def test_another_process_reads_the_same_file(pool):
    path = new_file(VECTORS.nbytes)
    PoolFile(path, VECTORS.shape).write(0, VECTORS)
    assert torch.equal(PoolFile(path, VECTORS.shape)[:], torch.from_numpy(VECTORS))


def test_a_file_that_has_become_shorter_is_an_error(tmp_path):
    path = new_file(VECTORS.nbytes)
    pool = PoolFile(path, VECTORS.shape)
    with open(path, "r+b") as file:
        file.truncate(20)
    with pytest.raises(OSError, match="has become shorter than 132 bytes"):
        pool[:]
