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

The output folder is a checkpoint that transformers and sentence-transformers load too. All of
transformers' TrainingArguments are flags here.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedding_finetune import jsonl
from embedding_finetune.command_line import (
    UserError,
    command,
    first_line,
    log_to_stderr,
)

if TYPE_CHECKING:
    from embedding_finetune.training_arguments import (
        DataArguments,
        ModelArguments,
        RetrieverTrainingArguments,
    )

logger = logging.getLogger("embedding_finetune.finetune")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Check everything, load rows and model, train, save the checkpoint."""
    log_to_stderr()
    model_args, data_args, args = parse_arguments(argv)

    from embedding_finetune.allocator import keep_freed_memory
    from embedding_finetune.data import EmbedCollator, TrainDataset, load_rows
    from embedding_finetune.dropout import use_cheap_dropout
    from embedding_finetune.model import (
        BiEncoder,
        check_max_length,
        freeze_position_embeddings,
        length_limit,
        load_backbone,
    )
    from embedding_finetune.trainer import RetrievalTrainer

    keep_freed_memory()
    rows = load_rows(
        data_args.train_data,
        max_rows_per_file=data_args.max_example_num_per_dataset,
        seed=args.seed,
    )
    dataset = TrainDataset(rows, group_size=data_args.train_group_size, seed=args.seed)
    logger.info("%d training rows", len(dataset))

    backbone, tokenizer, config = load_backbone(
        model_args.model_name_or_path,
        flag="--model_name_or_path",
        config_name=model_args.config_name,
        tokenizer_name=model_args.tokenizer_name,
        cache_dir=model_args.cache_dir,
        trust_remote_code=model_args.trust_remote_code,
    )
    limit = length_limit(backbone, tokenizer)
    check_max_length("--query_max_len", data_args.query_max_len, limit)
    check_max_length("--passage_max_len", data_args.passage_max_len, limit)
    use_cheap_dropout(backbone)
    if args.fix_position_embedding:
        freeze_position_embeddings(backbone)
    config = config.with_flags(
        pooling=args.sentence_pooling_method,
        normalized=args.normalized,
        query_instruction=data_args.query_instruction_for_retrieval,
        passage_instruction=data_args.passage_instruction_for_retrieval,
    )
    # The finished model keeps the length it came with, and takes at least what it was trained on.
    trained_length = max(data_args.query_max_len, data_args.passage_max_len)
    saved_config = dataclasses.replace(
        config,
        max_seq_length=max(trained_length, min(config.max_seq_length or limit, limit)),
        backbone_folder="",
    )
    trainer = RetrievalTrainer(
        BiEncoder(
            backbone,
            config,
            temperature=args.temperature,
            use_inbatch_neg=args.use_inbatch_neg,
            mask_known_positives=args.mask_known_positives,
            tokens_per_sub_batch=args.tokens_per_sub_batch,
        ),
        args,
        train_dataset=dataset,
        data_collator=EmbedCollator(
            tokenizer,
            config,
            group_size=data_args.train_group_size,
            query_max_len=data_args.query_max_len,
            passage_max_len=data_args.passage_max_len,
        ),
        saved_config=saved_config,
    )
    trainer.train(resume_from_checkpoint=resume_point(args))
    trainer.save_model()
    logger.info("the finetuned model is in %s", args.output_dir)


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple["ModelArguments", "DataArguments", "RetrieverTrainingArguments"]:
    """The flags, checked as far as that needs neither data nor model."""
    from transformers import HfArgumentParser

    from embedding_finetune.arguments import OneLineErrorParser
    from embedding_finetune.training_arguments import (
        DataArguments,
        ModelArguments,
        RetrieverTrainingArguments,
        check_loss_is_not_zero,
        check_output_dir,
    )

    class Parser(HfArgumentParser, OneLineErrorParser):
        """transformers' parser of dataclasses, with our one-line errors."""

    parser = Parser(
        (ModelArguments, DataArguments, RetrieverTrainingArguments),
        description=__doc__,
        allow_abbrev=False,
    )
    try:
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    except (ValueError, ImportError) as error:
        raise UserError(f"{first_line(error)} (--help lists the flags)") from error
    check_output_dir(args)
    check_loss_is_not_zero(data_args, args)
    jsonl.require_file("--train_data", data_args.train_data, folder_allowed=True)
    return model_args, data_args, args


def resume_point(args: "RetrieverTrainingArguments") -> str | bool | None:
    """What --resume_from_checkpoint asks for: a checkpoint folder, True for the last one, or nothing."""
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    return True if asked.lower() == "true" else asked


if __name__ == "__main__":
    main()
