import numpy as np
import pytest
from helpers.data import write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.training.batches import EpochSampler
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.rows import load_rows


def rows_of(tmp_path, positives, negatives):
    """Rows of texts that are called by letters."""
    records = [
        {"query": f"query {n}", "pos": list(p), "neg": list(q)} for n, (p, q) in enumerate(zip(positives, negatives))
    ]
    return load_rows(str(write_jsonl(tmp_path / "rows.jsonl", records)))


def test_neighbours_are_the_rows_whose_positives_are_among_a_rows_negatives(tmp_path):
    # Row 0's negatives: nobody's positive, row 2's second, row 1's, one that rows 1 and 2 share, row 1's again.
    neighbours = Neighbours(rows_of(tmp_path, ["a", "bs", "sc"], ["xcbs", "", "b"]), most=5)
    assert [neighbours.of(row) for row in range(3)] == [[2, 1], [], [1]]


def test_a_row_is_followed_by_its_nearest_neighbours(tmp_path):
    # Rows 2n and 2n + 1 have each other's positive as a negative.
    letters = "abcdefghijklmnopqrstuvwxyz"
    swapped = "".join(letters[n ^ 1] for n in range(26))
    order = Neighbours(rows_of(tmp_path, letters, swapped), most=1).order(np.random.default_rng(0))
    assert (order[::2] ^ 1 == order[1::2]).all()
    assert order.tolist() != sorted(order)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    negatives=st.lists(st.text("abcdefgh", max_size=6), min_size=1, max_size=8),
    most=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_row_comes_once_whatever_its_neighbours(tmp_path, negatives, most, seed):
    rows = rows_of(tmp_path, "abcdefgh", ["b", *negatives, *[""] * 7][:8])
    neighbours = Neighbours(rows, most=most)
    order = neighbours.order(np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(8))
    assert order.tolist() == neighbours.order(np.random.default_rng(seed)).tolist()


def test_batches_hold_neighbours_and_differ_from_epoch_to_epoch(tmp_path):
    # Ten rings of four rows; each row has the positives of the others of its ring as negatives.
    rings = [[f"answer {place} of {ring}" for ring in range(10)] for place in range(4)]
    positives = [[text] for place in rings for text in place]
    negatives = [
        [rings[other][ring] for other in range(4) if other != place] for place in range(4) for ring in range(10)
    ]
    neighbours = Neighbours(rows_of(tmp_path, positives, negatives), most=3)
    sampler = EpochSampler(40, seed=0, neighbours=neighbours)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler]
        assert all(len({index % 10 for index in order[first : first + 4]}) == 1 for first in range(0, 40, 4))
        epochs.append(order)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


def test_rows_without_neighbours_are_refused(tmp_path):
    with pytest.raises(UserError, match="--neighbours_in_batch: no row's negatives are positives of other rows"):
        Neighbours(rows_of(tmp_path, "ab", "xy"), most=2)


def test_with_files_only_rows_of_one_file_are_neighbours(tmp_path):
    rows = rows_of(tmp_path, ["a", "b", "c", "d"], ["bcd", "a", "da", "c"])
    neighbours = Neighbours(rows, most=3, files=np.array([0, 0, 1, 1]))
    assert [neighbours.of(row) for row in range(4)] == [[1], [0], [3], [2]]
    with pytest.raises(UserError, match="no row's negatives are positives of other rows"):
        Neighbours(rows, most=3, files=np.arange(4))
