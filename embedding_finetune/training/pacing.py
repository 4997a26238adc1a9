"""A trainer in stages: with mining before each of its rounds, and as many steps as fit into --minutes.

To transformers' Trainer a round is an epoch. Here is decided when a round begins, how many steps it has, and where a
run that is resumed goes on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.trainer_utils import TrainOutput

from embedding_finetune.command_line import UserError
from embedding_finetune.distributed import gather_objects
from embedding_finetune.model.card import CardFacts
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.batches import EpochSampler, TrainDataset
from embedding_finetune.training.callbacks import EndOfMinutes
from embedding_finetune.training.checkpointing import CheckpointingTrainer
from embedding_finetune.training.minutes import (
    Clock,
    Costs,
    Work,
    bytes_on_disk,
    peak_memory,
    steps_within,
    told,
)
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.rehearsal import seconds_of_step
from embedding_finetune.training.rounds import RoundSampler
from embedding_finetune.training.run_folder import Run, read_run
from embedding_finetune.training.sampling import epoch_sampler, keys_per_step, steps_of_epoch, steps_of_run
from embedding_finetune.training.stages import Stages, equal_stages, schedule_factors

logger = logging.getLogger(__name__)

_TIMED_SHARE, _TIMED_SECONDS = 0.02, 20
"""Steps are timed for this share of --minutes, and for so long at most."""
_NO_LIMIT = 10**9
"""Epochs of a run that its steps alone end."""


class PacedTrainer(CheckpointingTrainer):
    """Trains in stages, if the run has rounds or minutes; else as long as transformers would.

    neighbours: the rows that are to share a batch with each row; neighbours_in: what finds them in the rows of a round.
    one_file_per_batch: whether only rows of one file share a batch. tells_costs: whether the run says before its first
    step what it will take.
    """

    args: RetrieverTrainingArguments
    train_dataset: TrainDataset
    neighbours: Neighbours | None = None
    neighbours_in: Callable[[Dataset], Neighbours] | None = None
    one_file_per_batch: bool = False
    tells_costs: bool = False

    _sampler: EpochSampler | RoundSampler
    _stages: Stages | None = None
    _clock: Clock | None = None
    _seconds_of_step: float | None = None
    _seconds_of_mining: float = 0.0
    seconds_measuring: float = 0.0
    """That all evaluations in this process took."""
    seconds_of_measurement: float = 0.0
    """Of the longest: others may have found embeddings that it computed."""

    def _start_clock(self, checkpoint: str | None) -> None:
        """Count --minutes from now on, and what was spent before a checkpoint."""
        if self.args.minutes is None:
            return
        self._clock, self._stages = Clock(self.args.minutes), Stages([1] * self._count_stages())
        if checkpoint is not None:
            seconds, steps, self.seconds_of_measurement = _kept_with(checkpoint, stages=self._count_stages())
            self._stages = Stages(steps)
            self._clock.start(spent=seconds)
        self.add_callback(EndOfMinutes(self._clock))

    def facts_of_run(self, run: Run) -> Run:
        """What a checkpoint says about the run: of --minutes too, what was spent and what was settled."""
        if self._clock is None or self._stages is None:
            return run
        spent = {"seconds": self._clock.spent, "evaluation": self.seconds_of_measurement}
        return {**run, "minutes": {**spent, "steps": self._stages.steps}}

    def mines_with_weights_that_are_measured(self) -> bool:
        """Whether the weights as they are have been mined with, or will be."""
        return self.rounds is not None and (self.state.global_step == 0 or self.args.eval_strategy == "epoch")

    def _count_stages(self) -> int:
        return 1 if self.rounds is None else self.rounds.count

    # Length and rate

    def _get_train_sampler(self, train_dataset: object = None) -> EpochSampler | RoundSampler:
        files = self.train_dataset.files
        epochs = epoch_sampler(self.args, files, neighbours=self.neighbours, one_file_per_batch=self.one_file_per_batch)
        if self.rounds is None:
            self._sampler = epochs
        else:
            if self._stages is None:
                self._stages = equal_stages(steps_of_run(self.args, len(epochs)), self.rounds.count)
            self._sampler = RoundSampler(epochs, self._stages, keys_per_step=keys_per_step(self.args))
        return self._sampler

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[int, ...]:
        """As transformers does it, with the epochs and steps of a run in stages."""
        values = super().set_initial_training_values(args, dataloader)
        if self._stages is None:
            return values
        _, steps, examples, samples, batch, batches, _ = values
        epochs = _NO_LIMIT if self.rounds is None else self.rounds.count
        return epochs, steps, examples, samples, batch, batches, self._stages.total

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(*args)
        if self.rounds is None or self._stages is None:
            return epoch, batches
        stage, made = self._stages.place(self.state.global_step)
        return stage, made * self.args.gradient_accumulation_steps

    def _finalize_training(self, trial: object, num_train_samples: float, start_time: float) -> TrainOutput:
        if self._stages is not None:
            # Of all steps that are planned by now: transformers takes the share that was made.
            planned = self.state.max_steps / max(self.state.global_step, 1)
            num_train_samples = self.epochs_made() * len(self.train_dataset) * planned
        return super()._finalize_training(trial, num_train_samples, start_time)

    @property
    def epochs(self) -> EpochSampler:
        """What orders the rows of an epoch."""
        return self._sampler.epochs if isinstance(self._sampler, RoundSampler) else self._sampler

    def epochs_made(self) -> float:
        """How often the run has gone through the rows, as --num_train_epochs counts: an epoch is a number of steps."""
        if self._stages is None or self.rounds is None:
            return float(self.state.epoch or 0)
        assert isinstance(self._sampler, RoundSampler)
        return self.state.global_step / steps_of_epoch(self.args, len(self._sampler.epochs))

    def facts_of_card(self, card: CardFacts) -> CardFacts:
        """What the card says, with the steps and epochs so far."""
        return replace(card, steps=self.state.global_step, epochs=self.epochs_made())

    def rounds_until(self, step: int) -> int | None:
        """How many rounds were made until a step; None in a run without rounds."""
        if self.rounds is None or self._stages is None:
            return None
        stage, made = self._stages.place(step)
        return stage + (made > 0)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As transformers does it; in a run in stages each has a schedule of its own."""
        if self._stages is None:
            return super().create_scheduler(num_training_steps, optimizer)
        factor = self._stages.factor(schedule_factors(self.args))
        self.lr_scheduler = schedule = LambdaLR(optimizer or self.optimizer, factor)
        return schedule

    # A round, and how many steps it has

    def _run_epoch(self, model: nn.Module, epoch: int, **kwargs: Any) -> None:
        # In a resumed run of several processes neither transformers nor accelerate would reach it.
        self._sampler.set_epoch(epoch)
        if self.state.global_step >= self.state.max_steps:  # resumed from its last step, in the middle of an epoch
            self.control.should_training_stop = True
            return
        checkpoint = kwargs["resume_from_checkpoint"] if epoch == kwargs["epochs_trained"] else None
        is_new = checkpoint is None or not kwargs["steps_trained_in_current_epoch"]
        if self.frozen is not None and self.frozen.hardest is not None:
            if checkpoint is not None:
                self.frozen.hardest.read(checkpoint)
            self.frozen.hardest.refresh()
        if self.rounds is not None:
            if is_new and self._is_too_late_to_mine(epoch):
                return
            self._begin_round(checkpoint, is_new=is_new)
        if is_new and (self.rounds is not None or epoch == 0):
            self._pace(model, epoch, steps_per_epoch=kwargs["num_update_steps_per_epoch"])
        if self.control.should_training_stop:
            return
        if self.rounds is not None and self._stages is not None:
            steps = self._stages.steps[epoch]
            kwargs["num_update_steps_per_epoch"] = steps
            kwargs["steps_in_epoch"] = steps * self.args.gradient_accumulation_steps
        self.forget_snapshot()  # the weights are about to change
        first, began = self.state.global_step, time.monotonic() - self._seconds_beside_steps()
        super()._run_epoch(model=model, epoch=epoch, **kwargs)
        if made := self.state.global_step - first:
            self._seconds_of_step = (time.monotonic() - self._seconds_beside_steps() - began) / made

    def _seconds_beside_steps(self) -> float:
        return self.seconds_measuring + sum(self.seconds_of_checkpoints)

    def _begin_round(self, checkpoint: str | None, *, is_new: bool) -> None:
        """Give the rows the negatives of a round: newly mined, or kept with the checkpoint that is resumed from."""
        assert self.rounds is not None
        assert isinstance(self._sampler, RoundSampler)
        began = time.monotonic()
        if checkpoint is not None:
            self.rounds.read(checkpoint)
        rows = self.rounds.mine(self.snapshot()) if is_new else self.rounds.rows_with_negatives()
        self.train_dataset.rows = rows
        if self.neighbours_in is not None:
            try:
                self._sampler.epochs.neighbours = self.neighbours_in(rows)
            except UserError as error:
                if len(self.rounds.audits) == 1:
                    raise
                # What was trained so far is worth more than the rest of the recipe.
                logger.warning("warning: this round's batches are drawn at random: %s", error)
                self._sampler.epochs.neighbours = None
        self._seconds_of_mining = time.monotonic() - began
        if self.args.eval_strategy != "epoch":
            # For the next round the passages will not have been encoded to be measured among.
            self._seconds_of_mining += self.seconds_of_measurement

    def _is_too_late_to_mine(self, stage: int) -> bool:
        """Whether a round that begins has no time left for a step; then the run ends."""
        if self._clock is None or stage == 0:
            return False
        if too_late := gather_objects(self._clock.left < self._seconds_of_mining)[0]:
            self._end_before(stage)
        return too_late

    def _end_before(self, stage: int) -> None:
        logger.warning("warning: --minutes %g are over before round %d", self.args.minutes, stage + 1)
        self.control.should_training_stop = True

    def _pace(self, model: nn.Module, stage: int, *, steps_per_epoch: int) -> None:
        """Decide how many steps a stage that begins has; before the first step tell what the run will take."""
        if self._clock is None and not (self.tells_costs and self.state.global_step == 0):
            return
        if self._seconds_of_step is None:
            wanted = 0.0 if self._clock is None else min(_TIMED_SHARE * self._clock.limit, _TIMED_SECONDS)
            self._seconds_of_step = seconds_of_step(self, model, self._sampler, wanted=wanted)
            if self.frozen is not None and self.frozen.hardest is not None:
                self._seconds_of_step += self.frozen.hardest.seconds_of_step
        costs = Costs(
            self._seconds_of_step, self._seconds_of_mining, self.seconds_of_measurement, self.seconds_of_checkpoint()
        )
        work = Work(
            self.args,
            stages=self._count_stages() - stage,
            steps_per_epoch=steps_per_epoch if self.rounds is None else None,
            made=self.state.global_step,
        )
        if self._clock is not None:
            self._settle(stage, gather_objects(steps_within(self._clock.left, costs, work))[0], costs, work)
        if self.state.global_step == 0:
            steps = self.state.max_steps
            # The next is written before the last is removed.
            kept = min(work.checkpoints(steps), (self.args.save_total_limit or steps) + 1)
            disk = bytes_on_disk(self.bi_encoder, checkpoints=kept)
            seconds = work.seconds(steps, costs) + costs.evaluation  # the last one too
            logger.info("from here on: %s", told(seconds, steps, costs, memory=peak_memory(), disk=disk))

    def _settle(self, stage: int, steps: int, costs: Costs, work: Work) -> None:
        """Let a stage that begins have so many steps, or as many as were settled before if these are fewer."""
        assert self._stages is not None
        assert self._clock is not None
        if stage:
            steps = min(steps, self._stages.steps[stage])
        if steps < 1 and stage:
            self._end_before(stage)
            return
        if steps < 1:
            needed = self._clock.needed(work.seconds(self._count_stages(), costs))
            raise UserError(f"--minutes {self.args.minutes:g}: no time is left for a step; give {needed:g} or more")
        self._stages.settle(stage, steps)
        self.state.max_steps = self._stages.total
        self.state.compute_steps(self.args, self.state.max_steps)
        schedule = self.lr_scheduler
        for group, rate, factor in zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
            group["lr"] = rate * factor(schedule.last_epoch)
        if self.args.get_warmup_steps(steps) >= steps:
            logger.warning(
                "warning: the warm-up does not end within %d steps: give --warmup_steps as a share, such as 0.1", steps
            )
        what = "" if self.rounds is None else f" in round {stage + 1} of {self.rounds.count}"
        passes = steps * keys_per_step(self.args) / len(self.train_dataset)
        logger.info("--minutes %g: time for %d steps%s, %.2g times all rows", self.args.minutes, steps, what, passes)


def _kept_with(checkpoint: str, *, stages: int) -> tuple[float, list[int], float]:
    """What was spent until a checkpoint, the steps of each stage that were settled, the seconds of an evaluation."""
    try:
        kept = (read_run(Path(checkpoint)) or {})["minutes"]
        seconds, steps = float(kept["seconds"]), [int(count) for count in kept["steps"]]
        evaluation = float(kept["evaluation"])
        if not (0 <= seconds < float("inf") and len(steps) == stages and min(steps) > 0):
            raise ValueError("impossible numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint}: does not say what was spent of --minutes, or is damaged; give another checkpoint"
        ) from error
    return seconds, steps, evaluation
