"""The command that trains on all rows, those that were held out too, with what a run has settled."""

import os
import shlex
from collections.abc import Iterator, Sequence

from embedding_finetune.training.arguments import SCHEDULES_BY_MEASURE, RetrieverTrainingArguments

_ABOUT_HELD_OUT = set(
    "hold_out hold_out_by candidate_pool early_stopping_patience load_best_model_at_end metric_for_best_model "
    "greater_is_better resume_from_checkpoint".split()
)
_ABOUT_MEASURING = {"eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval"}
"""Flags that need queries to measure with."""


def command_on_all_rows(
    argv: Sequence[str],
    args: RetrieverTrainingArguments,
    *,
    best_step: int | None,
    steps: int,
    epochs: float,
    rounds: int | None = None,
) -> str | None:
    """The command line without what is about held-out rows, and with the length that chose itself, into a new folder.

    argv: this run's flags. best_step: None where no step was chosen. steps, epochs: how far the run came. The length is
    in epochs, of which all rows take more steps, unless the run had --max_steps. rounds: how many of mining were made
    until best_step, if any were. None for a learning rate that follows a measure: without held-out rows it could not.
    """
    flags = list(by_flag(argv))
    measures_still = any(name == "eval_query_file_jsonl_path" for name, _ in flags)
    if args.lr_scheduler_type in SCHEDULES_BY_MEASURE and not measures_still:
        return None
    dropped = _ABOUT_HELD_OUT | {"output_dir"} | (set() if measures_still else _ABOUT_MEASURING)
    if args.freeze_passages or any(name == "mining_rounds" for name, _ in flags):
        dropped -= {"candidate_pool"}  # it is mined from, or trained against
    if args.save_strategy == "best":
        dropped |= {"save_strategy", "save_total_limit"}
    words = []
    if best_step is not None or args.minutes is not None:
        dropped |= {"max_steps", "num_train_epochs", "minutes"}
        last = steps if best_step is None else best_step
        by_steps = args.max_steps > 0
        words = ["--max_steps", str(last)] if by_steps else ["--num_train_epochs", f"{last * epochs / steps:.4g}"]
    if rounds is not None:
        dropped |= {"mining_rounds"}
        words += ["--mining_rounds", str(rounds)]
    kept = [word for name, group in flags if name not in dropped for word in group]
    output = f"{os.path.normpath(args.output_dir)}_all_rows"
    return shlex.join([*_program(args), *kept, *words, "--output_dir", output])


def _program(args: RetrieverTrainingArguments) -> list[str]:
    if args.world_size == 1:
        return ["python", "finetune.py"]
    return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(args.world_size)), "finetune.py"]


def by_flag(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag's name, as its field is called, and its words, itself first."""
    group: list[str] = []
    for word in [*map(str, argv), "--"]:
        if word.startswith("--") and group:
            name = group[0].removeprefix("--").partition("=")[0].replace("-", "_")
            yield name.removeprefix("no_"), group
            group = []
        group.append(word)
