"""The order of rows follows the flags, and so does the number of steps."""

import numpy as np
import pytest

from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.one_file import OneFileSampler
from embedding_finetune.training.sampling import epoch_sampler, keys_per_step, steps_of_run

FILES = np.array([0] * 20 + [1] * 10)


@pytest.fixture
def flags(tmp_path):
    def make(**flags):
        return RetrieverTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, **flags)

    return make


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        # 30 rows are 4 batches of 8, and 3 full ones.
        ({"num_train_epochs": 3}, 12),
        ({"num_train_epochs": 1.1}, 5),
        ({"num_train_epochs": 3, "dataloader_drop_last": True}, 9),
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 3}, 6),
        ({"max_steps": 10}, 10),
    ],
)
def test_a_run_has_as_many_steps_as_transformers_would_make(flags, given, steps):
    assert steps_of_run(flags(**given), 30) == steps


def test_a_step_takes_the_rows_of_all_its_batches(flags):
    assert keys_per_step(flags(gradient_accumulation_steps=3)) == 24


def test_the_order_follows_seed_and_strategy(flags):
    rows = [
        [row for _, row in epoch_sampler(flags(**given), FILES)] for given in ({}, {}, {"seed": 7}, {"data_seed": 7})
    ]
    assert rows[0] == rows[1] != rows[2] == rows[3]
    in_order = epoch_sampler(flags(train_sampling_strategy="sequential"), FILES)
    assert [row for _, row in in_order] == list(range(30))


def test_batches_of_one_file_are_made_of_each_files_rows(flags):
    found = epoch_sampler(flags(), FILES, one_file_per_batch=True)
    assert isinstance(found, OneFileSampler)
    assert len(found) == (3 + 2) * 8
