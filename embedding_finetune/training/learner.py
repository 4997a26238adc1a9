"""The model that is trained, by finetune.py's flags: loaded, checked, and prepared for training."""

import dataclasses
import logging
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError
from embedding_finetune.model.adapters import AdapterBase, add_adapters, as_base, find_adapter
from embedding_finetune.model.attention import leave_out_cudnn_attention
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.checks import check_training
from embedding_finetune.model.encoding_kernels import choose_dtype
from embedding_finetune.model.limits import (
    check_instructions,
    check_max_length,
    first_position,
    freeze_position_embeddings,
    length_limit,
)
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.modules import load_projection
from embedding_finetune.model.packing import pack_if_possible
from embedding_finetune.model.pretrained import weights_digest
from embedding_finetune.model.routes import Route
from embedding_finetune.model.sub_batches import Layout, layout_for
from embedding_finetune.model.training_kernels import has_dropout, set_dropout, use_cheap_dropout
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.loss import LossOptions

logger = logging.getLogger(__name__)


class Learner(NamedTuple):
    """The model that is trained, ready for it. limit: the most tokens that it takes. lengths: by kind of text.

    saved_config: what checkpoints say of it.
    """

    bi_encoder: BiEncoder
    tokenizer: PreTrainedTokenizerBase
    config: EmbeddingConfig
    saved_config: EmbeddingConfig
    limit: int
    lengths: dict[str, int]
    adapter_base: AdapterBase | None

    def layout(self, args: RetrieverTrainingArguments, *, longest: int) -> Layout:
        """How the texts of a batch are laid out. longest: the most tokens that one has."""
        return training_layout(self.bi_encoder.backbone, self.tokenizer, args, limit=self.limit, longest=longest)


def load_learner(model_args: ModelArguments, data_args: DataArguments, args: RetrieverTrainingArguments) -> Learner:
    """The model to train, checked, with dropout and adapters as the flags say: that of queries, if passages stay."""
    backbone, tokenizer, config = load_base(model_args, route="query" if args.freeze_passages else None)
    adapter_base = base_of_adapter(model_args, args, backbone)
    limit = length_limit(backbone, tokenizer)
    own = min(config.max_seq_length or limit, limit)
    lengths = {"query_max_len": data_args.query_max_len, "passage_max_len": data_args.passage_max_len}
    if args.freeze_passages:
        lengths["passage_max_len"] = own  # it is not to embed any
    for flag, length in lengths.items():
        check_max_length(f"--{flag}", length, limit)
    backbone = prepare_for_training(backbone, config, args)
    config = config.with_flags(
        pooling=args.sentence_pooling_method,
        normalized=args.normalized,
        query_instruction=data_args.query_instruction_for_retrieval,
        passage_instruction=data_args.passage_instruction_for_retrieval,
    )
    check_instructions(tokenizer, config, **lengths)
    projection = load_projection(model_args.model_name_or_path, config, cache_dir=model_args.cache_dir)
    bi_encoder = BiEncoder(backbone, config, projection=projection)
    check_training(bi_encoder, tokenizer, limit=limit, what=f"--model_name_or_path {model_args.model_name_or_path}")
    saved = dataclasses.replace(config, max_seq_length=max(own, *lengths.values()), backbone_folder="")
    return Learner(bi_encoder, tokenizer, config, saved, limit, lengths, adapter_base)


def load_base(
    model_args: ModelArguments, *, route: Route | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EmbeddingConfig]:
    """The model that training starts from. route: which one of a checkpoint that has two."""
    return load_backbone(
        model_args.model_name_or_path,
        flag="--model_name_or_path",
        route=route,
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


def loss_options(bi_encoder: BiEncoder, args: RetrieverTrainingArguments) -> LossOptions:
    """The loss as the flags want it. Raises UserError for dimensions that the embeddings do not have."""
    return LossOptions(
        temperature=args.temperature,
        use_inbatch_neg=args.use_inbatch_neg,
        mask_known_positives=args.mask_known_positives,
        negatives_cross_device=args.negatives_cross_device,
        false_negative_margin=args.false_negative_margin,
        matryoshka=matryoshka_weights(bi_encoder.dimensions, args),
        distillation_weight=args.distillation_weight,
        teacher_temperature=args.teacher_temperature,
    )


def matryoshka_weights(whole: int, args: RetrieverTrainingArguments) -> dict[int, float]:
    """Dimensions -> weight of the loss of embeddings cut to them; those of `whole` embeddings are always among them."""
    dims = args.matryoshka_dims or []
    if dims and max(dims) > whole:
        raise UserError(f"--matryoshka_dims {max(dims)}: the model's embeddings have {whole} dimensions")
    return {whole: 1.0, **dict(zip(dims, args.matryoshka_weights or [1.0] * len(dims)))}
