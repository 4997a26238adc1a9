"""A loss that is no number ends the run, on a GPU some steps later; largest is what was seen."""

from collections import deque

import numpy as np
import pytest
import torch
from helpers.pretend_cuda import PretendTensor, pretend_cuda

from embedding_finetune.command_line import UserError
from embedding_finetune.training.loss_watch import LossWatch

ROWS = np.array([4, 7])


def watch():
    return LossWatch(rows_are_of="counted from 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_on_a_cpu_a_loss_that_is_no_number_is_told_at_once_with_step_and_rows(value):
    losses = watch()
    losses.look_at(torch.tensor(2.0), step=1, rows=ROWS)
    with pytest.raises(UserError, match=rf"the loss is {value} at step 2, in a batch of the rows 5, 8 \(co"):
        losses.look_at(torch.tensor(value), step=2, rows=ROWS)
    assert losses.largest == 2.0


class Event:
    """An event of a device that is `lag` steps behind."""

    lag, recorded = 1, deque()

    def record(self):
        Event.recorded.append(self)

    def query(self):
        return len(Event.recorded) - Event.recorded.index(self) > Event.lag

    def synchronize(self):
        Event.lag = 0


def test_on_a_gpu_it_is_told_as_soon_as_the_device_has_come_so_far_and_nobody_waits(monkeypatch):
    losses = watch()
    with pretend_cuda(monkeypatch) as recorded:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        for step, value in enumerate([1.0, 3.0, float("nan")], start=1):
            losses.look_at(PretendTensor(torch.tensor(value)), step=step, rows=ROWS + step)
        assert losses.largest == 1.0  # the second one is not there yet
        losses.look_at(PretendTensor(torch.tensor(2.0)), step=4, rows=ROWS)
        with pytest.raises(UserError, match="the loss is nan at step 3, in a batch of the rows 8, 11 "):
            losses.look_at(PretendTensor(torch.tensor(2.0)), step=5, rows=ROWS)
        assert recorded.waits == {}
    assert losses.largest == 3.0


def test_at_the_end_and_before_a_checkpoint_all_are_waited_for(monkeypatch):
    losses = watch()
    with pretend_cuda(monkeypatch):
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(Event, "lag", 1)
        losses.look_at(PretendTensor(torch.tensor(float("nan"))), step=1, rows=ROWS)
        with pytest.raises(UserError, match="at step 1"):
            losses.look_back(wait=True)
