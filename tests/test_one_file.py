"""Batches of one file each: every row once per epoch, whatever the number of processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from embedding_finetune.training.one_file import OneFileSampler


def sampler_of(rows_of_files, *, per_process, processes=1, epoch=0, **options):
    files = np.repeat(np.arange(len(rows_of_files)), rows_of_files)
    sampler = OneFileSampler(files, per_process=per_process, processes=processes, seed=3, **options)
    sampler.set_epoch(epoch)
    return sampler


def dealt_out(sampler):
    """What each process gets of each batch, as DataLoader and accelerate deal it out: batch -> process -> places."""
    micro_batches = list(BatchSampler(sampler, sampler.per_process, drop_last=False))
    return [micro_batches[n : n + sampler.processes] for n in range(0, len(micro_batches), sampler.processes)]


def rows_in(places):
    return [place.row for place in places if place is not None and place.weight]


@given(
    rows_of_files=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    per_process=st.integers(1, 6),
    processes=st.sampled_from([1, 2, 3]),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_every_row_comes_once_in_a_batch_of_its_own_file_whatever_the_number_of_processes(
    rows_of_files, per_process, processes, epoch, shuffle
):
    options = {"epoch": epoch, "shuffle": shuffle}
    sampler = sampler_of(rows_of_files, per_process=per_process, processes=processes, **options)
    batches = dealt_out(sampler)
    assert len(sampler) == len(list(sampler)) == len(batches) * per_process * processes
    assert len(batches) == sum(-(-rows // (per_process * processes)) for rows in rows_of_files)
    rows = [[row for places in batch for row in rows_in(places)] for batch in batches]
    assert sorted(row for batch in rows for row in batch) == list(range(sum(rows_of_files)))
    for batch, shares in zip(rows, batches):
        assert len({sampler.files[row] for row in batch}) == 1
        sizes = [len(rows_in(share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        for share, size in zip(shares, sizes):
            # The mean over processes of their weighted means is the mean over all rows.
            weights = {place.weight for place in share if place is not None}
            assert weights == {size * processes / len(batch)}
    alone = sampler_of(rows_of_files, per_process=per_process * processes, **options)
    assert [[row for places in batch for row in rows_in(places)] for batch in dealt_out(alone)] == rows


def test_a_file_is_cut_into_as_few_batches_as_hold_it_and_of_like_size():
    sampler = sampler_of([9, 4, 1], per_process=4)
    sizes = {0: [], 1: [], 2: []}
    for batch in sampler.batches():
        sizes[int(sampler.files[batch[0]])].append(len(batch))
    assert sizes == {0: [3, 3, 3], 1: [4], 2: [1]}


def test_with_drop_last_only_full_batches_are_left():
    sampler = sampler_of([9, 4, 3], per_process=2, processes=2, drop_last=True)
    assert sorted(sampler.files[batch[0]] for batch in sampler.batches()) == [0, 0, 1]
    assert {len(batch) for batch in sampler.batches()} == {4}
    assert len(sampler) == 12
    used = {row for batch in sampler.batches() for row in batch.tolist()}
    sampler.set_epoch(1)
    assert used != {row for batch in sampler.batches() for row in batch.tolist()}


def test_batches_and_their_order_differ_from_epoch_to_epoch_and_are_the_same_for_one_seed():
    epochs = [sampler_of([40, 20], per_process=4, epoch=epoch) for epoch in (0, 1, 0)]
    rows = [[batch.tolist() for batch in sampler.batches()] for sampler in epochs]
    assert rows[0] == rows[2] != rows[1]
    files = [[int(sampler.files[batch[0]]) for batch in sampler.batches()] for sampler in epochs]
    assert files[0] != files[1]
    assert files[0] != sorted(files[0])
    assert files[0].count(0) == 10  # in proportion to the rows


def test_rows_in_order_stay_in_order():
    batches = sampler_of([5, 3], per_process=4, shuffle=False).batches()
    assert [batch.tolist() for batch in batches] == [[0, 1, 2], [3, 4], [5, 6, 7]]


def test_neighbours_of_one_file_share_a_batch():
    class Swapped:
        """Rows n and n + 1 are neighbours."""

        def order(self, rng):
            return (2 * rng.permutation(20)[:, None] + [0, 1]).flatten()

    batches = sampler_of([24, 16], per_process=4, neighbours=Swapped()).batches()
    assert all(row ^ 1 in batch.tolist() for batch in batches for row in batch.tolist())


@pytest.mark.parametrize("processes", [2, 3])
def test_a_process_without_a_share_takes_part_with_a_row_that_weighs_nothing(processes):
    ((*others, last),) = dealt_out(sampler_of([1], per_process=2, processes=processes))
    assert last == [(0, 0, float(processes)), None]
    assert others == [[(0, 0, 0.0), None]] * (processes - 1)
