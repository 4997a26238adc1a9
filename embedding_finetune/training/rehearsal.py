"""Steps that are made to be timed, and leave nothing behind: neither in weights nor in random numbers."""

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from embedding_finetune.distributed import gather_objects, process_rank, random_numbers_kept
from embedding_finetune.training.batches import EpochSampler
from embedding_finetune.training.rounds import RoundSampler

if TYPE_CHECKING:
    from embedding_finetune.training.pacing import PacedTrainer

_FEWEST_TIMED = 2
"""Beside the first one, which allocates."""


def seconds_of_step(
    trainer: "PacedTrainer", model: nn.Module, sampler: EpochSampler | RoundSampler, *, wanted: float = 0.0
) -> float:
    """Seconds of one of the run's first steps, on average over some. wanted: for how many seconds steps are timed.

    Gradients are set to 0 before the optimizer steps, and so is its rate; one that has stepped before, in a run that is
    resumed, is left alone. All processes call this together.
    """
    args, seconds = trainer.args, list[float]()
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # without accelerate's shell
    is_new = not optimizer.state
    rates = [group["lr"] for group in optimizer.param_groups]
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    batches = _micro_batches(trainer, sampler.epochs if isinstance(sampler, RoundSampler) else sampler)
    with random_numbers_kept():
        drawing = time.monotonic()
        while step := list(itertools.islice(batches, args.gradient_accumulation_steps)):
            began = time.monotonic()
            drawn = began - drawing
            for batch in step:
                trainer.training_step(model, batch)
            if is_new:
                _step_nowhere(optimizer, args.max_grad_norm)
            model.zero_grad()
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            stepped, workers = time.monotonic() - began, args.dataloader_num_workers
            # Workers draw batches while steps are made.
            seconds.append(max(stepped, drawn / workers) if workers else drawn + stepped)
            if gather_objects(len(seconds) > _FEWEST_TIMED and sum(seconds[1:]) >= wanted)[0]:
                break
            drawing = time.monotonic()
    if is_new:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        optimizer.state.clear()
    timed = seconds[1:] or seconds
    return sum(timed) / len(timed)


def _step_nowhere(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
        if max_grad_norm > 0:
            nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()


def _micro_batches(trainer: "PacedTrainer", sampler: EpochSampler) -> Iterator[dict[str, Any]]:
    """Those of an epoch, as this process gets them; none of their texts is counted as cut."""
    size, keys = trainer.args.per_device_train_batch_size, iter(sampler)
    own = slice(process_rank() * size, (process_rank() + 1) * size)
    while of_all := list(itertools.islice(keys, size * trainer.args.world_size)):
        batch = trainer.data_collator([trainer.train_dataset[key] for key in of_all[own] or of_all[:size]])
        batch["cut_texts"][:] = 0
        yield batch
