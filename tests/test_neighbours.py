import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.data import EpochSampler, TrainDataset, load_rows
from embedding_finetune.neighbours import Neighbours


def test_neighbours_are_the_rows_whose_positives_are_among_a_rows_negatives():
    # Row 0's negatives: nobody's positive, row 2's second positive, row 1's, row 2's first.
    neighbours = Neighbours([[99, 21, 10, 20], [], [10]], [[0], [10, 20], [20, 21]], most=5)
    assert [neighbours.of(row) for row in range(3)] == [[2, 1], [], [1]]  # 20 belongs to row 1, the first that has it
    assert neighbours.count() == 2


def test_a_row_is_followed_by_its_nearest_neighbours():
    pairs = 50
    # Rows 2n and 2n + 1 have each other's positive as a negative.
    neighbours = Neighbours([[row ^ 1] for row in range(2 * pairs)], [[row] for row in range(2 * pairs)], most=1)
    order = neighbours.order(np.random.default_rng(0))
    assert (order[::2] ^ 1 == order[1::2]).all()
    assert not (np.sort(order[::2]) == order[::2]).all()


@given(
    negatives=st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=12),
    most=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_row_comes_once_whatever_its_neighbours(negatives, most, seed):
    neighbours = Neighbours(negatives, [[row] for row in range(len(negatives))], most=most)
    order = neighbours.order(np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(negatives)))
    assert order.tolist() == neighbours.order(np.random.default_rng(seed)).tolist()


def rows_in_rings(tmp_path, rings, size):
    """Rows in rings: each has the positives of the others of its ring as negatives."""
    records = [
        {
            "query": f"question {ring} {place}",
            "pos": [f"answer {ring} {place}"],
            "neg": [f"answer {ring} {other}" for other in range(size) if other != place],
        }
        for place in range(size)
        for ring in range(rings)
    ]
    return load_rows(str(write_jsonl(tmp_path / "rows.jsonl", records)))


def test_batches_hold_neighbours_and_differ_from_epoch_to_epoch(tmp_path):
    dataset = TrainDataset(rows_in_rings(tmp_path, 10, 4), group_size=1, seed=0, neighbours_in_batch=3)
    sampler = EpochSampler(len(dataset), seed=0, neighbours=dataset.neighbours)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        batches = [keys[first : first + 4] for first in range(0, 40, 4)]
        for batch in batches:
            assert len({dataset[key].query.split()[1] for key in batch}) == 1
        epochs.append([index for _, index in keys])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


def test_rows_without_neighbours_are_refused(tmp_path):
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n"]}])))
    with pytest.raises(UserError, match="--neighbours_in_batch: no row's negatives are positives of other rows"):
        TrainDataset(rows, group_size=1, seed=0, neighbours_in_batch=2)
