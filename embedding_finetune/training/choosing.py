"""Held-out queries in two parts, where some of them choose weights: what chooses does not judge.

The best of several checkpoints looks better than it is on the queries that chose it. So one half of the held-out
queries chooses, and the other half is measured before and after. Both halves are of whole groups, see data/hold_out.py.
"""

from collections.abc import Sequence

from embedding_finetune.command_line import UserError
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.records import HELD_OUT_PART
from embedding_finetune.training.arguments import SCHEDULES_BY_MEASURE, DataArguments, RetrieverTrainingArguments

CHOOSING, JUDGING = "choosing", "judging"
"""The values of HELD_OUT_PART."""
FEWEST_TO_CHOOSE = 100
"""With fewer held-out queries none of them chooses: 50 that judge tell differences of about 0.1 from luck."""
_SMALLEST_PART = FEWEST_TO_CHOOSE // 4
"""Smaller parts come of large groups alone."""


def flag_that_chooses(data_args: DataArguments, args: RetrieverTrainingArguments) -> str | None:
    """The flag that lets held-out queries choose weights which other held-out queries have to judge; None without."""
    if data_args.hold_out is None or data_args.eval_query_file_jsonl_path is not None:
        return None
    return flag_by_measure(args)


def flag_by_measure(args: RetrieverTrainingArguments) -> str | None:
    """The flag by which measures during training decide about the weights that are saved."""
    if args.early_stopping_patience is not None:
        return f"--early_stopping_patience {args.early_stopping_patience}"
    if args.load_best_model_at_end:
        return "--load_best_model_at_end True"
    if args.save_strategy == "best":
        return "--save_strategy best"
    if args.lr_scheduler_type in SCHEDULES_BY_MEASURE:
        return f"--lr_scheduler_type {args.lr_scheduler_type.value}"
    return None


def with_parts(records: Sequence[Record], choosing: Sequence[bool], *, flag: str) -> list[Record]:
    """The records, each saying which part it is in. choosing: for each record. flag: what flag_that_chooses gave.

    Raises UserError where there are too few queries for two parts.
    """
    chosen = sum(choosing)
    smaller = min(chosen, len(records) - chosen)
    remedy = (
        "or leave that flag out, or give queries to judge with as --eval_query_file_jsonl_path: then all that are held "
        "out choose"
    )
    if len(records) < FEWEST_TO_CHOOSE:
        raise UserError(
            f"{flag}: {len(records)} queries are held out, too few for some to choose and others to judge; hold out "
            f"{FEWEST_TO_CHOOSE} or more, {remedy}"
        )
    if smaller < _SMALLEST_PART:
        raise UserError(
            f"{flag}: of {len(records)} held-out queries one part chooses and another judges, and the smaller has "
            f"{smaller}, since groups of rows stay together; hold out more, {remedy}"
        )
    return [{**record, HELD_OUT_PART: CHOOSING if chooses else JUDGING} for record, chooses in zip(records, choosing)]


def part_of(records: Sequence[Record], part: str) -> list[Record]:
    """The records of a part."""
    return [record for record in records if record[HELD_OUT_PART] == part]
