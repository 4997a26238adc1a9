"""In which order a run goes through its rows, by its flags. Shapes: R rows."""

import math
from typing import Any

import numpy as np

from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.batches import EpochSampler
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.one_file import OneFileSampler
from embedding_finetune.training.rounds import RoundSampler, steps_in_round


def make_sampler(
    args: RetrieverTrainingArguments,
    files: np.ndarray,
    *,
    neighbours: Neighbours | None = None,
    one_file_per_batch: bool = False,
    rounds: int | None = None,
) -> EpochSampler | RoundSampler:
    """What yields the rows of an epoch, or with `rounds` those of a round.

    files: (R,), the number of each row's file. neighbours: those that are to share a batch.
    """
    order: dict[str, Any] = {
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "shuffle": args.train_sampling_strategy == "random",
        "neighbours": neighbours,
    }
    if one_file_per_batch:
        epochs: EpochSampler = OneFileSampler(
            files,
            per_process=args.per_device_train_batch_size,
            processes=args.world_size,
            drop_last=args.dataloader_drop_last,
            **order,
        )
    else:
        epochs = EpochSampler(len(files), **order)
    return epochs if rounds is None else RoundSampler(epochs, length=_keys_in_round(args, len(epochs), rounds))


def _keys_in_round(args: RetrieverTrainingArguments, keys_in_epoch: int, rounds: int) -> int:
    """How many rows a round goes through: whole batches of all processes."""
    batch = args.per_device_train_batch_size * args.world_size
    batches = keys_in_epoch // batch if args.dataloader_drop_last else math.ceil(keys_in_epoch / batch)
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    return steps_in_round(steps, rounds) * args.gradient_accumulation_steps * batch
