"""In which order a run goes through its rows, and how many steps that takes, by its flags. Shapes: R rows."""

import math
from typing import Any

import numpy as np

from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.batches import EpochSampler
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.one_file import OneFileSampler


def epoch_sampler(
    args: RetrieverTrainingArguments,
    files: np.ndarray,
    *,
    neighbours: Neighbours | None = None,
    one_file_per_batch: bool = False,
) -> EpochSampler:
    """What yields the rows of an epoch.

    files: (R,), the number of each row's file. neighbours: those that are to share a batch.
    """
    order: dict[str, Any] = {
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "shuffle": args.train_sampling_strategy == "random",
        "neighbours": neighbours,
    }
    if not one_file_per_batch:
        return EpochSampler(len(files), **order)
    return OneFileSampler(
        files,
        per_process=args.per_device_train_batch_size,
        processes=args.world_size,
        drop_last=args.dataloader_drop_last,
        **order,
    )


def keys_per_step(args: RetrieverTrainingArguments) -> int:
    """How many rows a step takes from the sampler, in all processes."""
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def steps_of_run(args: RetrieverTrainingArguments, keys_in_epoch: int) -> int:
    """How many steps the flags ask for."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_of_epoch(args, keys_in_epoch))


def steps_of_epoch(args: RetrieverTrainingArguments, keys_in_epoch: int) -> int:
    """How many steps go through all rows."""
    batch = args.per_device_train_batch_size * args.world_size
    batches = keys_in_epoch // batch if args.dataloader_drop_last else math.ceil(keys_in_epoch / batch)
    return math.ceil(batches / args.gradient_accumulation_steps)
