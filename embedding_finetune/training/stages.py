"""The stages of a run: how many steps each has, and at which rate it learns.

A round of mining is a stage. A run without rounds is one. Each stage has a learning-rate schedule of its own, which
ends where the stage ends.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from embedding_finetune.command_line import UserError
from embedding_finetune.training.arguments import RetrieverTrainingArguments

logger = logging.getLogger(__name__)

_RATE_OF_NEXT_STAGE = 0.5
"""Each stage's learning rate is this share of that of the stage before. benchmarks/mining_quality.py measured two."""

Factor = Callable[[int], float]
"""Step -> the learning rate as a share of --learning_rate."""


class Stages:
    """steps: of each stage. They may be settled again at the beginning of a stage, for itself and those after it."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return sum(self.steps)

    def place(self, step: int) -> tuple[int, int]:
        """The stage that makes a step, both counted from 0, and how many steps of it were made before.

        After the last step that is one stage beyond the last.
        """
        for stage, length in enumerate(self.steps):
            if step < length:
                return stage, step
            step -= length
        return len(self.steps), step

    def settle(self, stage: int, steps: int) -> None:
        """Let this stage and each after it have so many steps."""
        self.steps[stage:] = [steps] * (len(self.steps) - stage)

    def factor(self, factor_of: Callable[[int], Factor]) -> Factor:
        """What factor_of gives for a stage's number of steps, anew in each stage, and at half the rate in each next."""

        def at(step: int) -> float:
            stage, made = self.place(step)
            if stage == len(self.steps):
                stage, made = stage - 1, self.steps[-1]
            return _RATE_OF_NEXT_STAGE**stage * factor_of(self.steps[stage])(made)

        return at


def equal_stages(steps: int, count: int) -> Stages:
    """A run of so many steps in stages of equal length; a rest is left out."""
    if steps < count:
        raise UserError(f"--mining_rounds {count}: the run has {steps} steps; give fewer rounds, or more epochs")
    if steps % count:
        logger.info("%d of %d steps are made: %d rounds are of equal length", steps - steps % count, steps, count)
    return Stages([steps // count] * count)


def schedule_factors(args: RetrieverTrainingArguments) -> Callable[[int], Factor]:
    """Number of steps -> the factor of the schedule that the flags want for a run of so many.

    Raises UserError for a schedule that follows a measure, which no step number tells.
    """

    @cache
    def factor_of(steps: int) -> Factor:
        # Schedules come with an optimizer; this one is not that of the run, whose rates stay as they are.
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if not isinstance(schedule, LambdaLR):
            raise UserError(
                "--mining_rounds and --minutes need an --lr_scheduler_type that depends on the step alone, as linear"
            )
        factor: Factor = schedule.lr_lambdas[0]
        return factor

    return factor_of
