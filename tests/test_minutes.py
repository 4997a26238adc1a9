"""How many steps fit into --minutes, and what a run costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.minutes import Clock, Costs, Work, bytes_on_disk, peak_memory, steps_within, told


@pytest.fixture
def flags(tmp_path):
    return lambda **given: RetrieverTrainingArguments(output_dir=str(tmp_path), **given)


def test_steps_fill_the_time_that_mining_and_evaluations_leave(flags):
    # 100 s - 20 s of mining before the second round - 10 s of an evaluation after the first = 2 x 35 s.
    work = Work(flags(eval_strategy="epoch"), stages=2)
    assert steps_within(100, Costs(step=1, mining=20, evaluation=10), work) == 35
    # 9 evaluations in 100 steps, the tenth is the last.
    work = Work(flags(eval_strategy="steps", eval_steps=10), steps_per_epoch=25)
    assert steps_within(100 + 9 * 2, Costs(step=1, evaluation=2), work) == 100
    # 3 in 4 epochs.
    work = Work(flags(eval_strategy="epoch"), steps_per_epoch=25)
    assert steps_within(100 + 3 * 2, Costs(step=1, evaluation=2), work) == 100


def test_checkpoints_take_time_too_and_evaluations_that_are_put_off_do_not(flags):
    work = Work(flags(save_strategy="steps", save_steps=10))
    assert steps_within(100 + 10 * 2, Costs(step=1, checkpoint=2), work) == 100
    for delayed, epochs, evaluations in (
        ({"eval_strategy": "steps", "eval_steps": 10, "eval_delay": 35}, None, 6),  # 40, 50, ... 90
        ({"eval_strategy": "steps", "eval_steps": 10, "eval_delay": 999}, None, 0),
        ({"eval_strategy": "epoch", "eval_delay": 1.5}, 25, 2),  # after the second epoch, and the third
    ):
        assert Work(flags(**delayed), steps_per_epoch=epochs).evaluations(100) == evaluations


def test_what_was_done_before_a_later_stage_counts_no_more(flags):
    # Of 200 steps every 20th is measured, and 4 of these are in the last 100 before their end.
    assert Work(flags(eval_strategy="steps", eval_steps=0.1), made=100).evaluations(100) == 4
    assert Work(flags(eval_strategy="steps", eval_steps=30, eval_delay=100), made=90).evaluations(60) == 1  # 120
    assert Work(flags(eval_strategy="epoch"), stages=2, made=100).evaluations(100) == 1


def test_nothing_fits_where_mining_alone_takes_longer(flags):
    assert steps_within(10, Costs(step=1, mining=20), Work(flags(), stages=2)) < 1
    assert steps_within(-5, Costs(step=1), Work(flags(), stages=1)) < 1


@given(
    seconds=st.floats(0, 1e5),
    step=st.floats(0.01, 100),
    other=st.floats(0, 100),
    stages=st.integers(1, 4),
    every=st.integers(1, 50) | st.floats(0.01, 0.99),
)
def test_one_more_step_would_be_too_long(tmp_path_factory, seconds, step, other, stages, every):
    args = RetrieverTrainingArguments(output_dir="unused", eval_strategy="steps", eval_steps=every)
    work, costs = Work(args, stages), Costs(step, other, other)
    steps = steps_within(seconds, costs, work)
    assert steps < 1 or work.seconds(steps * stages, costs) <= seconds
    assert steps == -1 or work.seconds((steps + 1) * stages, costs) > seconds


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "steps", "save_steps": 30}, 4),  # 30, 60, 90, 100
        ({"save_strategy": "steps", "save_steps": 0.25}, 4),
        ({"save_strategy": "epoch"}, 2),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 50}, 2),
    ],
)
def test_checkpoints_are_counted_as_transformers_writes_them(flags, given, kept):
    assert Work(flags(**given), steps_per_epoch=50).checkpoints(100) == kept


def test_a_clock_counts_what_earlier_processes_spent():
    now = 100.0
    clock = Clock(10, now=lambda: now)
    clock.start(spent=60)
    now = 130.0
    assert clock.spent == 90
    assert clock.left == pytest.approx(0.96 * 600 - 90)
    assert clock.needed(54) == 2.5  # (90 + 54) / 0.96 / 60
    assert clock.needed(54.1) == 2.51  # no less than what is needed
    assert not clock.is_over
    now = 641.0
    assert clock.is_over


def test_a_checkpoint_holds_two_more_numbers_for_each_that_is_trained():
    model = nn.Linear(10, 10)  # 110 numbers of 4 bytes
    assert bytes_on_disk(model, checkpoints=0) == 440
    model.bias.requires_grad_(False)
    assert bytes_on_disk(model, checkpoints=2) == 440 + 2 * (440 + 800)


def test_the_line_says_time_memory_and_disk():
    line = told(630, 200, Costs(2.5, 60, 10), memory=2_100_000_000, disk=450_000_000)
    assert line == (
        "about 10 minutes, 200 steps of 2.5 s, 60 s a mining, 10 s an evaluation; 2.1 GB of memory, 0.5 GB of disk"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0123, "0.012 s"),
        (2.46, "2.5 s"),
        (99, "99 s"),
        (150, "2.5 minutes"),
        (17_400, "4.8 hours"),
        (4e6, "1111 hours"),
    ],
)
def test_durations_are_told_in_their_unit(seconds, shown):
    assert told(seconds, 1, Costs(1), memory=0, disk=0).startswith(f"about {shown}, ")


def test_the_peak_of_memory_is_that_of_this_process():
    assert 50e6 < peak_memory() < 50e9
