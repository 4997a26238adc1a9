"""What finetune.py's flags make of data and model: the trainer, and the merged weights."""

import dataclasses
import logging
import os
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError
from embedding_finetune.model.adapters import AdapterBase, add_adapters, as_base, find_adapter, merged, mix_with
from embedding_finetune.model.attention import leave_out_cudnn_attention
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.card import write_card
from embedding_finetune.model.checkpoint import EmbeddingConfig, save_checkpoint
from embedding_finetune.model.checks import check_training
from embedding_finetune.model.encoding_kernels import choose_dtype
from embedding_finetune.model.folder import model_replaced
from embedding_finetune.model.limits import (
    check_instructions,
    check_max_length,
    first_position,
    freeze_position_embeddings,
    length_limit,
)
from embedding_finetune.model.loading import load_backbone, weights_digest
from embedding_finetune.model.modules import load_projection
from embedding_finetune.model.packing import pack_if_possible
from embedding_finetune.model.sub_batches import Layout, layout_for
from embedding_finetune.model.tokens import first_rows
from embedding_finetune.model.training_kernels import has_dropout, set_dropout, use_cheap_dropout
from embedding_finetune.model.training_queries import read_training_queries, write_training_queries
from embedding_finetune.retrieval.arguments import EncodingOptions
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.batches import EmbedCollator, TrainDataset
from embedding_finetune.training.loss import LossOptions, RetrievalLoss
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.row_columns import instructions_of
from embedding_finetune.training.rows import training_files
from embedding_finetune.training.run_data import RunData
from embedding_finetune.training.trainer import RetrievalTrainer

logger = logging.getLogger(__name__)


def make_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RetrieverTrainingArguments,
    data: RunData,
) -> RetrievalTrainer:
    """Load the model, check that it can be trained as the flags say, and put it together with data and arguments."""
    dataset, rounds, held_out, task = data
    one_file = has_one_file_per_batch(data_args, dataset, args)
    most, files = data_args.neighbours_in_batch, dataset.files if one_file else None
    neighbours_in = partial(Neighbours, most=most, files=files) if most else None
    neighbours = None if neighbours_in is None or rounds is not None else neighbours_in(dataset.rows)
    backbone, tokenizer, config = load_base(model_args)
    adapter_base = base_of_adapter(model_args, args, backbone)
    length_to_save = check_lengths(backbone, tokenizer, config, data_args)
    limit = length_limit(backbone, tokenizer)
    backbone = prepare_for_training(backbone, config, args)
    config = config.with_flags(
        pooling=args.sentence_pooling_method,
        normalized=args.normalized,
        query_instruction=data_args.query_instruction_for_retrieval,
        passage_instruction=data_args.passage_instruction_for_retrieval,
    )
    lengths = {"query_max_len": data_args.query_max_len, "passage_max_len": data_args.passage_max_len}
    check_instructions(tokenizer, config, **lengths)
    projection = load_projection(model_args.model_name_or_path, config, cache_dir=model_args.cache_dir)
    bi_encoder = BiEncoder(backbone, config, projection=projection)
    loss = make_loss(bi_encoder, args)
    check_training(bi_encoder, tokenizer, limit=limit, what=f"--model_name_or_path {model_args.model_name_or_path}")
    collator = EmbedCollator(
        tokenizer,
        config,
        group_size=dataset.group_size,
        **lengths,
        layout=training_layout(backbone, tokenizer, args, limit=limit, longest=max(lengths.values())),
        with_teacher=args.distillation_weight > 0,
    )
    collator.query.check_instructions(tokenizer, first_rows(instructions_of(dataset.rows)))
    trained_before = read_training_queries(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
    if held_out is not None and (known := held_out.count_queries_among(trained_before)):
        logger.warning(
            "warning: %d of %d held-out queries are in the training data of %s: it was trained on their answers",
            *(known, len(held_out.records), model_args.model_name_or_path),
        )
    return RetrievalTrainer(
        loss,
        args,
        train_dataset=dataset,
        data_collator=collator,
        saved_config=dataclasses.replace(config, max_seq_length=length_to_save, backbone_folder=""),
        trained_before=trained_before,
        neighbours=neighbours,
        rounds=rounds,
        neighbours_in=neighbours_in,
        one_file_per_batch=one_file,
        task=task,
        held_out=held_out,
        encoding=EncodingOptions(
            embeddings_dir=data_args.embeddings_dir, trust_remote_code=model_args.trust_remote_code
        ),
        adapter_base=adapter_base,
    )


def has_one_file_per_batch(data_args: DataArguments, dataset: TrainDataset, args: RetrieverTrainingArguments) -> bool:
    """Whether batches are to hold rows of one file only, and there are several files.

    Raises UserError where --dataloader_drop_last would leave out all rows of a file.
    """
    rows_of_files = np.bincount(dataset.files)
    if not data_args.one_file_per_batch:
        return False
    if np.count_nonzero(rows_of_files) == 1:
        logger.info("--one_file_per_batch changes nothing: all rows are in one file")
        return False
    if dataset.group_size == 1 and rows_of_files.max() == 1:
        raise UserError(
            "--one_file_per_batch: no query would have a negative: no row has any, and every file has one row; "
            'mine "neg" with mine_hard_neg.py, or leave the flag out'
        )
    batch = args.per_device_train_batch_size * args.world_size
    never_full = (rows_of_files > 0) & (rows_of_files < batch)
    if args.dataloader_drop_last and never_full.any():
        number = int(np.argmax(never_full))
        raise UserError(
            f"--one_file_per_batch with --dataloader_drop_last True would never train on "
            f"{training_files(data_args.train_data)[number]}: its {rows_of_files[number]} rows do not fill a batch of "
            f"{batch}; lower --per_device_train_batch_size, or leave --dataloader_drop_last out"
        )
    return True


def load_base(model_args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EmbeddingConfig]:
    """The model that training starts from."""
    return load_backbone(
        model_args.model_name_or_path,
        flag="--model_name_or_path",
        config_name=model_args.config_name,
        tokenizer_name=model_args.tokenizer_name,
        cache_dir=model_args.cache_dir,
        trust_remote_code=model_args.trust_remote_code,
    )


def base_of_adapter(
    model_args: ModelArguments, args: RetrieverTrainingArguments, backbone: PreTrainedModel
) -> AdapterBase | None:
    """What adapters say of the model that they belong to; None where none are trained.

    Raises UserError where they alone are saved, and it is an adapter itself: no other tool loads an adapter of one.
    """
    if args.lora_rank is None:
        return None
    name = model_args.model_name_or_path
    if args.save_adapter_only and find_adapter(name, cache_dir=model_args.cache_dir) is not None:
        raise UserError(
            f"--save_adapter_only: {name} is an adapter itself, and is merged into its base before training; leave the "
            "flag out to save a whole model"
        )
    return as_base(name, weights_digest(backbone))


def check_lengths(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EmbeddingConfig,
    data_args: DataArguments,
) -> int:
    """Check the length flags against the model.

    Returns the max_seq_length to save: the checkpoint's own, or the longest training length if that is larger.
    """
    limit = length_limit(backbone, tokenizer)
    check_max_length("--query_max_len", data_args.query_max_len, limit)
    check_max_length("--passage_max_len", data_args.passage_max_len, limit)
    length_of_checkpoint = min(config.max_seq_length or limit, limit)
    return max(data_args.query_max_len, data_args.passage_max_len, length_of_checkpoint)


def prepare_for_training(
    backbone: PreTrainedModel, config: EmbeddingConfig, args: RetrieverTrainingArguments
) -> PreTrainedModel:
    """The backbone to train: with the dropout that is wanted, and cheap; frozen where it is to stay; with adapters.

    A log line says where a flag has nothing to act on. Raises UserError for adapters that the model cannot have.
    """
    if args.dropout is not None:
        set_dropout(backbone, args.dropout)
    use_cheap_dropout(backbone)
    leave_out_cudnn_attention()
    if args.fix_position_embedding:
        freeze_position_embeddings(backbone)
    if args.negatives_cross_device and args.world_size == 1:
        logger.info("--negatives_cross_device changes nothing in a run of one process; start several with torchrun")
    if args.lora_rank is None:
        return backbone
    if args.save_adapter_only and config.modules:
        raise UserError("--save_adapter_only: the model's modules after pooling are trained too; leave it out")
    if args.lora_rank > backbone.config.hidden_size:
        raise UserError(
            f"--lora_rank {args.lora_rank}: the model's hidden states have {backbone.config.hidden_size} dimensions"
        )
    return add_adapters(backbone, args.lora_rank, seed=args.seed)


def training_layout(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: RetrieverTrainingArguments,
    *,
    limit: int,
    longest: int,
) -> Layout:
    """How the texts of a batch are laid out; where they are packed, the backbone is prepared for it.

    limit: the most tokens that the model takes. longest: the most tokens that a text has.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(args.mixed_precision), torch.float32)
    position = first_position(backbone)
    packs = not has_dropout(backbone) and pack_if_possible(
        backbone, tokenizer, args.device, dtype, first_position=position, limit=limit
    )
    if dtype == torch.float32 and choose_dtype("auto", args.device) != dtype and args.device.type == "cuda":
        logger.info("training in float32: with --bf16 True this GPU is several times as fast")
    if packs:
        logger.info("texts are trained end to end, without padding")
    return layout_for(
        args.device,
        tokenizer,
        limit=longest,
        tokens_per_sub_batch=args.tokens_per_sub_batch,
        hidden_size=backbone.config.hidden_size,
        recompute=args.recompute_sub_batches,
        packed_from=position if packs else None,
    )


def make_loss(bi_encoder: BiEncoder, args: RetrieverTrainingArguments) -> RetrievalLoss:
    """The loss as the flags want it. Raises UserError for dimensions that the embeddings do not have."""
    options = LossOptions(
        temperature=args.temperature,
        use_inbatch_neg=args.use_inbatch_neg,
        mask_known_positives=args.mask_known_positives,
        negatives_cross_device=args.negatives_cross_device,
        false_negative_margin=args.false_negative_margin,
        matryoshka=matryoshka_weights(bi_encoder.dimensions, args),
        distillation_weight=args.distillation_weight,
        teacher_temperature=args.teacher_temperature,
    )
    return RetrievalLoss(bi_encoder, options, recompute_sub_batches=args.recompute_sub_batches)


def matryoshka_weights(whole: int, args: RetrieverTrainingArguments) -> dict[int, float]:
    """Dimensions -> weight of the loss of embeddings cut to them; those of `whole` embeddings are always among them."""
    dims = args.matryoshka_dims or []
    if dims and max(dims) > whole:
        raise UserError(f"--matryoshka_dims {max(dims)}: the model's embeddings have {whole} dimensions")
    return {whole: 1.0, **dict(zip(dims, args.matryoshka_weights or [1.0] * len(dims)))}


def save_merged_with_base(
    trainer: RetrievalTrainer, model_args: ModelArguments, args: RetrieverTrainingArguments, *, share: float
) -> None:
    """Save share * tuned + (1 - share) * base weights in the folder `merged`: they keep more of what the base knew.

    To be called when training is over: without adapters the trainer's own weights are overwritten.
    """
    base, _, config = load_base(model_args)
    backbone, projection = merged(trainer.bi_encoder.backbone), trainer.bi_encoder.projection
    mix_with(backbone.cpu(), base, share)
    mix_with(
        projection.cpu(),
        load_projection(model_args.model_name_or_path, config, cache_dir=model_args.cache_dir),
        share,
    )
    folder = os.path.join(args.output_dir, "merged")
    with model_replaced(folder) as staging:
        save_checkpoint(staging, backbone, trainer.processing_class, trainer.saved_config, projection)
        write_training_queries(staging, trainer.training_queries)
        if trainer.card is not None:
            note = f"These are {share:g} of the tuned and {1 - share:g} of the base's weights."
            write_card(staging, dataclasses.replace(trainer.facts_of_card(trainer.card), repository=None, note=note))
    logger.info("%g of the tuned and %g of the base weights: %s", share, 1 - share, folder)
