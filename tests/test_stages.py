"""The stages of a run: where a step is, how long they are, and at which rate they learn."""

import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.stages import Stages, equal_stages, schedule_factors


def test_a_step_is_in_its_stage_and_after_the_last_in_none():
    stages = Stages([3, 2])
    assert [stages.place(step) for step in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert stages.total == 5


def test_a_stage_that_is_settled_settles_those_after_it():
    stages = Stages([5, 5, 5])
    stages.settle(1, 3)
    assert stages.steps == [5, 3, 3]


def test_stages_are_of_equal_length():
    assert equal_stages(200, 2).steps == [100, 100]
    assert equal_stages(200, 3).steps == [66, 66, 66]
    with pytest.raises(UserError, match="--mining_rounds 3: the run has 2 steps"):
        equal_stages(2, 3)


def args(tmp_path, **flags):
    return RetrieverTrainingArguments(output_dir=str(tmp_path), **flags)


def test_each_stage_warms_up_and_ends_at_zero_the_next_at_half_the_rate(tmp_path):
    factor = Stages([4, 4, 2]).factor(schedule_factors(args(tmp_path, warmup_steps=0.5)))
    assert list(map(factor, range(10))) == [0, 0.5, 1, 0.5, 0, 0.25, 0.5, 0.25, 0, 0.25]
    assert factor(10) == 0  # where the last stage has ended


def test_a_stage_whose_length_is_settled_later_has_that_lengths_rates(tmp_path):
    stages = Stages([1])
    factor = stages.factor(schedule_factors(args(tmp_path)))
    stages.settle(0, 4)
    assert list(map(factor, range(5))) == [1, 0.75, 0.5, 0.25, 0]


def test_a_schedule_gets_its_own_flags(tmp_path):
    flags = {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-3, "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    assert schedule_factors(args(tmp_path, **flags))(8)(8) == pytest.approx(0.1)


def test_a_schedule_that_follows_a_measure_is_refused(tmp_path):
    with pytest.raises(UserError, match="--lr_scheduler_type"):
        schedule_factors(args(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"))(4)
