"""Finetune a bi-encoder on question/passage pairs with a temperature-scaled contrastive loss.

    python finetune.py \\
        --output_dir BAAI/bge-base-en-v1.5_finetuned \\
        --model_name_or_path BAAI/bge-base-en-v1.5 \\
        --train_data augmented_example.jsonl \\
        --learning_rate 1e-5 \\
        --num_train_epochs 5 \\
        --per_device_train_batch_size 1 \\
        --dataloader_drop_last True \\
        --normalized True \\
        --temperature 0.02 \\
        --query_max_len 64 \\
        --passage_max_len 256 \\
        --train_group_size 2 \\
        --logging_steps 10 \\
        --query_instruction_for_retrieval "" \\
        --bf16 True

Or with one flag, which picks the others by your data and model, and prints them.

    python finetune.py --recipe domain --model_name_or_path MODEL --train_data pairs.jsonl --output_dir tuned

The output folder is a checkpoint that transformers and sentence-transformers load too. With --hold_out, which the
recipe sets, the last line on stdout says whether the model is better, and how sure that is. transformers'
TrainingArguments are flags here; docs/flags.md says which have no meaning and are refused.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from embedding_finetune import files
from embedding_finetune.command_line import UserError, command
from embedding_finetune.process import importing

if TYPE_CHECKING:
    from embedding_finetune.data.jsonl import Record
    from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
    from embedding_finetune.training.trainer import RetrievalTrainer
    from embedding_finetune.training.verdict import Verdict

logger = logging.getLogger("embedding_finetune.finetune")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Check everything, load rows and model, train, save the checkpoint, say what was done."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_arguments(argv)

    with importing():
        from embedding_finetune.data.judgements import read_judgements
        from embedding_finetune.distributed import (
            leave_process_group_at_exit,
            once_in_all,
            tell_of_processes_that_were_not_started,
        )
        from embedding_finetune.retrieval.store import tell_size
        from embedding_finetune.training.flag_errors import (
            errors_name_their_flag,
            flags_not_at_default,
            memory_errors_name_the_remedy,
        )
        from embedding_finetune.training.held_out import write_held_out
        from embedding_finetune.training.recipe import with_recipe
        from embedding_finetune.training.run_card import card_of
        from embedding_finetune.training.run_data import prepare, read_rows
        from embedding_finetune.training.run_folder import remove_earlier_runs, resume_point, run_in
        from embedding_finetune.training.same_run import (
            check_same_run,
            warn_of_what_is_lost,
            what_decides,
            what_the_model_decides,
        )
        from embedding_finetune.training.setup import make_trainer
        from embedding_finetune.training.upload import find_repository, make_repository, upload
        from embedding_finetune.training.verdict import judge, keep_base_if_better, next_steps

    checkpoint = resume_point(args)

    leave_process_group_at_exit()
    tell_of_processes_that_were_not_started()
    repository = find_repository(args)
    judgements = read_judgements(data_args.judgements)
    rows = read_rows(data_args, args, judgements)
    tells_costs = data_args.recipe is not None
    if data_args.recipe is not None:
        argv = with_recipe(argv, rows, model_args, data_args, freezes_passages=args.freeze_passages)
        try:
            model_args, data_args, args = parse_arguments(argv)
        except UserError as error:
            raise UserError(f"with the flags that --recipe {data_args.recipe} adds: {error}") from error
    data = prepare(rows, model_args, data_args, args, judgements)

    given = flags_not_at_default(model_args, data_args, args, data_args.selection)
    decided_by = what_decides(given, args, data)
    check_same_run(checkpoint, decided_by)
    warn_of_what_is_lost(checkpoint, args)
    with errors_name_their_flag(given), memory_errors_name_the_remedy(args):
        trainer = make_trainer(model_args, data_args, args, data)
    trainer.tells_costs = tells_costs
    decided_by["decided_by"] |= what_the_model_decides(trainer)
    check_same_run(checkpoint, decided_by)
    trainer.card = card_of(trainer, model_args, data_args, given=given, repository=repository)
    make_repository(repository, args)
    with run_in(args.output_dir, checkpoint, decided_by) if args.should_save else nullcontext() as trainer.run:
        if args.should_save:
            write_held_out(args.output_dir, data.held_out)
        with errors_name_their_flag(given):
            result = trainer.train(resume_from_checkpoint=checkpoint)
        keep_base_if_better(trainer, model_args)
        trainer.save_model()
        if args.should_save:
            remove_earlier_runs(args.output_dir)
        summary = trainer.summary(result.metrics)
        verdict = judge(trainer, data_args)
        tell_size(data_args.embeddings_dir)
        once_in_all(lambda: write_outcome(trainer, model_args, data_args, args, summary, verdict))
    if verdict is not None and trainer.is_world_process_zero():
        for line in next_steps(verdict, trainer, argv):
            logger.info("%s", line)
        print(verdict.line, flush=True)
    upload(repository, args, trainer.written)


def write_outcome(
    trainer: "RetrievalTrainer",
    model_args: "ModelArguments",
    data_args: "DataArguments",
    args: "RetrieverTrainingArguments",
    summary: "Record",
    verdict: "Verdict | None",
) -> None:
    """Write the merged model, where one is wanted, the model card and the summary; tell the summary."""
    from embedding_finetune.training.run_card import with_outcome

    if args.merge_with_base is not None:
        from embedding_finetune.training.setup import save_merged_with_base

        save_merged_with_base(trainer, model_args, args, share=args.merge_with_base)
    assert trainer.card is not None
    trainer.card = with_outcome(trainer.card, trainer, data_args, summary, verdict)
    trainer.create_model_card()
    with files.atomic_writer(os.path.join(args.output_dir, "training_summary.json")) as file:
        document = {**summary, "verdict": None if verdict is None else verdict._asdict()}
        file.write(json.dumps(document, indent=2).encode() + b"\n")
    for name, value in summary.items():
        if name in ("mining_rounds", "hold_out", "frozen_passages"):
            continue  # they were told when they were made
        logger.info("%-18s  %s", name, told(value))


def told(value: object) -> str:
    """A value of the summary as a person reads it."""
    if isinstance(value, dict):
        return "  ".join(f"{name} {told(part)}" for name, part in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple["ModelArguments", "DataArguments", "RetrieverTrainingArguments"]:
    """The flags, checked as far as that needs neither data nor model."""
    with importing():
        from embedding_finetune.training import parser

    return parser.parse_arguments(argv, __doc__)


if __name__ == "__main__":
    main()
