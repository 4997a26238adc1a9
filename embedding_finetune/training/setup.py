"""The model as finetune.py's flags want it: what it starts from, what is trained, and its mean with the base."""

import logging
import os

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError
from embedding_finetune.model.adapters import add_adapters, merged, mix_with
from embedding_finetune.model.bi_encoder import embedding_dimensions
from embedding_finetune.model.checkpoint import EmbeddingConfig, save_checkpoint
from embedding_finetune.model.folder import model_replaced
from embedding_finetune.model.loading import (
    check_max_length,
    freeze_position_embeddings,
    length_limit,
    load_backbone,
    load_projection,
)
from embedding_finetune.model.training_kernels import use_cheap_dropout
from embedding_finetune.model.training_queries import write_training_queries
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.trainer import RetrievalTrainer

logger = logging.getLogger(__name__)


def settle_lengths(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EmbeddingConfig,
    data_args: DataArguments,
) -> int:
    """Check the length flags against the model; the max_seq_length that the finished model gets.

    It keeps the one it came with, and takes at least what it was trained on.
    """
    limit = length_limit(backbone, tokenizer)
    check_max_length("--query_max_len", data_args.query_max_len, limit)
    check_max_length("--passage_max_len", data_args.passage_max_len, limit)
    own_length = min(config.max_seq_length or limit, limit)
    return max(data_args.query_max_len, data_args.passage_max_len, own_length)


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


def settle_parameters(
    backbone: PreTrainedModel, config: EmbeddingConfig, args: RetrieverTrainingArguments
) -> PreTrainedModel:
    """Make dropout cheap, freeze what is to stay, add adapters, and say so where a flag has nothing to act on."""
    use_cheap_dropout(backbone)
    if args.fix_position_embedding:
        freeze_position_embeddings(backbone)
    if args.negatives_cross_device and args.world_size == 1:
        logger.info("--negatives_cross_device changes nothing in a run of one process; start several with torchrun")
    if args.lora_rank is None:
        return backbone
    if args.save_adapter_only and config.dense:
        raise UserError("--save_adapter_only: the model's Dense modules are trained too; leave it out")
    if args.lora_rank > backbone.config.hidden_size:
        raise UserError(
            f"--lora_rank {args.lora_rank}: the model's hidden states have {backbone.config.hidden_size} dimensions"
        )
    return add_adapters(backbone, args.lora_rank, seed=args.seed)


def matryoshka_weights(
    backbone: PreTrainedModel, config: EmbeddingConfig, args: RetrieverTrainingArguments
) -> dict[int, float]:
    """Dimensions -> weight of the loss of embeddings cut to them; whole embeddings are always among them."""
    whole, dims = embedding_dimensions(backbone, config), args.matryoshka_dims or []
    if dims and max(dims) > whole:
        raise UserError(f"--matryoshka_dims {max(dims)}: the model's embeddings have {whole} dimensions")
    return {whole: 1.0, **dict(zip(dims, args.matryoshka_weights or [1.0] * len(dims)))}


def save_merged_with_base(
    trainer: RetrievalTrainer, model_args: ModelArguments, args: RetrieverTrainingArguments, *, share: float
) -> None:
    """Save share * tuned + (1 - share) * base weights beside the tuned ones: what was forgotten comes back in part."""
    base, _, config = load_base(model_args)
    backbone, projection = merged(trainer.model.backbone), trainer.model.projection
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
    logger.info("%g of the tuned and %g of the base weights: %s", share, 1 - share, folder)
