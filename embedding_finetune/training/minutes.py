"""How many steps fit into --minutes, and what a run costs in time, memory and disk.

Time counts from the beginning of the training, with the first evaluation and all mining, to the last step. What comes
after it, the last evaluation and the saving of the model, is not counted.
"""

import math
import resource
import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from embedding_finetune.training.arguments import RetrieverTrainingArguments

_AIM = 0.96
"""The share of --minutes that is planned for: steps differ, and the machine may get slower."""
_GIGABYTE = 1e9


class Costs(NamedTuple):
    """Seconds of a step, of mining before a round, of an evaluation, and of a checkpoint."""

    step: float
    mining: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0


class Work(NamedTuple):
    """What is done beside a number of steps, from the beginning of a stage on, whose mining is done.

    stages: that are left, of equal length. steps_per_epoch: None where an epoch is a stage. made: steps of the stages
    before.
    """

    args: RetrieverTrainingArguments
    stages: int = 1
    steps_per_epoch: int | None = None
    made: int = 0

    def seconds(self, steps: int, costs: Costs) -> float:
        """Of so many further steps, with the checkpoint after the last and without the evaluation there."""
        mining, evaluations = (self.stages - 1) * costs.mining, self.evaluations(steps) * costs.evaluation
        return steps * costs.step + mining + evaluations + self.checkpoints(steps) * costs.checkpoint

    def evaluations(self, steps: int) -> int:
        """How often is measured before the last of so many further steps."""
        return self._times(steps, self.args.eval_strategy, self.args.eval_steps, after=self.args.eval_delay)

    def checkpoints(self, steps: int) -> int:
        """How many are written with so many further steps; at most, where only the best are."""
        strategy, every = self.args.save_strategy, self.args.save_steps
        if strategy == "best":
            strategy, every = self.args.eval_strategy, self.args.eval_steps
        if strategy == "no":
            return 0
        return self._times(steps, strategy, every) + 1  # and at the end

    def _times(self, steps: int, strategy: str, every: float | None, *, after: float = 0) -> int:
        """How often something is done before the last step. after: of steps, or of epochs where it is done in these."""
        if strategy == "epoch" and self.steps_per_epoch is None:
            return self.stages - 1
        if strategy == "epoch":
            unit, first = self.steps_per_epoch or 1, after
        elif strategy == "steps" and every:
            unit = int(every) if every >= 1 else max(math.ceil((self.made + steps) * every), 1)
            first = after / unit
        else:
            return 0
        last, done = max(self.made + steps - 1, 0) // unit, self.made // unit
        return max(last - max(done, math.ceil(first) - 1), 0)


class Clock:
    """What was spent of --minutes, in this process and in those that a run was resumed from. limit: in seconds."""

    def __init__(self, minutes: float, *, now: Callable[[], float] = time.monotonic) -> None:
        self.limit = minutes * 60
        self._now = now
        self._began = now()

    def start(self, *, spent: float = 0.0) -> None:
        """Count from here on, after so many seconds."""
        self._began = self._now() - spent

    @property
    def spent(self) -> float:
        """Seconds."""
        return self._now() - self._began

    @property
    def left(self) -> float:
        """Seconds that may be planned for."""
        return _AIM * self.limit - self.spent

    def needed(self, seconds: float) -> float:
        """Minutes that would leave so many seconds from now on, rounded up."""
        return math.ceil((self.spent + seconds) / _AIM / 60 * 100) / 100

    @property
    def is_over(self) -> bool:
        """Whether the last second is spent."""
        return self.spent >= self.limit


def steps_within(seconds: float, costs: Costs, work: Work) -> int:
    """So many steps that each stage can have within so many seconds, and no one more; below 1 where nothing fits."""
    most = max(int(seconds / (costs.step * work.stages)), 0)
    return bisect_right(range(most + 1), seconds, key=lambda steps: work.seconds(steps * work.stages, costs)) - 1


def peak_memory() -> int:
    """The most bytes that this process has held so far: on its accelerator, or where it has none, of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bytes_on_disk(model: nn.Module, *, checkpoints: int) -> int:
    """Of the finished model, and of checkpoints, which hold two numbers of the optimizer's for each that is trained."""
    parameters = list(model.parameters())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in parameters)
    return weights + checkpoints * (weights + sum(8 * tensor.numel() for tensor in parameters if tensor.requires_grad))


def told(seconds: float, steps: int, costs: Costs, *, memory: int, disk: int) -> str:
    """What a run will take, as one line. seconds: of all of it."""
    parts = [f"about {_duration(seconds)}, {steps} steps of {_duration(costs.step)}"]
    if costs.mining:
        parts.append(f"{_duration(costs.mining)} a mining")
    if costs.evaluation:
        parts.append(f"{_duration(costs.evaluation)} an evaluation")
    return f"{', '.join(parts)}; {memory / _GIGABYTE:.1f} GB of memory, {disk / _GIGABYTE:.1f} GB of disk"


def _duration(seconds: float) -> str:
    units = ((1, "s"), (60, "minutes"), (3600, "hours"))
    unit, name = next((unit for unit in units if seconds < 100 * unit[0]), units[-1])
    value = seconds / unit
    return f"{value:.{0 if value >= 10 else 1}f} {name}" if value >= 1 else f"{value:.2g} {name}"
