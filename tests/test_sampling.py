"""The order of rows follows the flags: epochs, rounds, batches of one file."""

import numpy as np
import pytest

from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.one_file import OneFileSampler
from embedding_finetune.training.sampling import make_sampler

FILES = np.array([0] * 20 + [1] * 10)


@pytest.fixture
def sampler(tmp_path):
    def make(*, one_file=False, rounds=None, **flags):
        args = RetrieverTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, **flags)
        return make_sampler(args, FILES, one_file_per_batch=one_file, rounds=rounds)

    return make


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        # 30 rows are 4 batches of 8, and 3 full ones.
        ({"num_train_epochs": 3}, 6 * 8),  # 12 steps
        ({"num_train_epochs": 3, "dataloader_drop_last": True}, 4 * 8),  # 9 steps, of which 8 are made
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 2}, 3 * 2 * 8),  # 6 steps of 2 batches
        ({"max_steps": 10}, 5 * 8),
    ],
)
def test_two_rounds_go_through_the_rows_that_their_steps_need(sampler, flags, keys):
    found = sampler(rounds=2, **flags)
    assert len(found) == len(list(found)) == keys


def test_the_order_follows_seed_and_strategy(sampler):
    rows = [[row for _, row in sampler(**flags)] for flags in ({}, {}, {"seed": 7}, {"data_seed": 7})]
    assert rows[0] == rows[1] != rows[2] == rows[3]
    assert [row for _, row in sampler(train_sampling_strategy="sequential")] == list(range(30))


def test_batches_of_one_file_are_made_of_each_files_rows(sampler):
    found = sampler(one_file=True)
    assert isinstance(found, OneFileSampler)
    assert len(found) == (3 + 2) * 8
