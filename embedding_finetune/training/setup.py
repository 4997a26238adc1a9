"""What finetune.py's flags make of data and model: the trainer with its loss and batches, and the merged weights."""

import dataclasses
import logging
import os
from functools import partial

import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.distributed import gather_objects
from embedding_finetune.model.adapters import merged, mix_with
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.card import write_card
from embedding_finetune.model.checkpoint import save_checkpoint
from embedding_finetune.model.folder import model_replaced
from embedding_finetune.model.modules import load_projection
from embedding_finetune.model.tokens import first_rows, text_kinds
from embedding_finetune.model.training_queries import read_training_queries, write_training_queries
from embedding_finetune.retrieval.arguments import EncodingOptions
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.batches import EmbedCollator, TrainDataset
from embedding_finetune.training.frozen import FrozenPassages
from embedding_finetune.training.hardest import STEPS, Hardest, fits
from embedding_finetune.training.learner import Learner, load_base, load_learner, loss_options
from embedding_finetune.training.loss import RetrievalLoss
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.pool_loss import PoolLoss
from embedding_finetune.training.query_batches import Numbers, QueryCollator
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
    dataset, held_out = data.dataset, data.held_out
    one_file = has_one_file_per_batch(data_args, dataset, args)
    most, files = data_args.neighbours_in_batch, dataset.files if one_file else None
    neighbours_in = partial(Neighbours, most=most, files=files) if most else None
    neighbours = None if neighbours_in is None or data.rounds is not None else neighbours_in(dataset.rows)
    learner = load_learner(model_args, data_args, args)
    encoding = EncodingOptions(
        embeddings_dir=data_args.embeddings_dir,
        trust_remote_code=model_args.trust_remote_code,
        cache_dir=model_args.cache_dir,
    )
    frozen = None if data.pool is None else freeze(data.pool, learner, model_args, data_args, args, encoding)
    loss, collator = together(learner, args, dataset) if frozen is None else queries_alone(learner, args, frozen)
    collator.query.check_instructions(learner.tokenizer, first_rows(instructions_of(dataset.rows)))
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
        saved_config=learner.saved_config,
        trained_before=trained_before,
        neighbours=neighbours,
        rounds=data.rounds,
        neighbours_in=neighbours_in,
        one_file_per_batch=one_file,
        task=data.task,
        held_out=held_out,
        encoding=encoding,
        adapter_base=learner.adapter_base,
        frozen=frozen,
    )


def together(
    learner: Learner, args: RetrieverTrainingArguments, dataset: TrainDataset
) -> tuple[RetrievalLoss, EmbedCollator]:
    """The loss and batches of queries and passages that are trained together."""
    collator = EmbedCollator(
        learner.tokenizer,
        learner.config,
        group_size=dataset.group_size,
        **learner.lengths,
        layout=learner.layout(args, longest=max(learner.lengths.values())),
        with_teacher=args.distillation_weight > 0,
    )
    return make_loss(learner.bi_encoder, args), collator


def make_loss(bi_encoder: BiEncoder, args: RetrieverTrainingArguments) -> RetrievalLoss:
    """The loss as the flags want it. Raises UserError for dimensions that the embeddings do not have."""
    options = loss_options(bi_encoder, args)
    return RetrievalLoss(bi_encoder, options, recompute_sub_batches=args.recompute_sub_batches)


def queries_alone(
    learner: Learner, args: RetrieverTrainingArguments, frozen: FrozenPassages
) -> tuple[PoolLoss, QueryCollator]:
    """The loss and batches of queries whose passages stay as they are."""
    layout = learner.layout(args, longest=learner.lengths["query_max_len"])
    query, passage = text_kinds(learner.config, **learner.lengths)
    collator = QueryCollator(learner.tokenizer, query, passage, Numbers(frozen.pool), layout=layout)
    pool, options = frozen.embeddings, loss_options(learner.bi_encoder, args)
    is_whole = all(gather_objects(fits(pool.nbytes, args.device)))  # where one process searches, all do
    loss = PoolLoss(
        learner.bi_encoder,
        options,
        pool.on(args.device) if is_whole and args.device.type != "cpu" else pool,
        recompute_sub_batches=args.recompute_sub_batches,
    )
    if is_whole:
        logger.info("each query is trained against all %d passages of the pool, which keep their embeddings", len(pool))
    else:
        logger.info(
            "the embeddings of %d passages take %.1f GB, more than half of the memory: each query is trained against "
            "the hardest of them, which are found anew every %d steps or sooner",
            *(len(pool), pool.nbytes / 1e9, STEPS),
        )
        frozen.hardest = Hardest(loss, pool, collator.numbers)
    return loss, collator


def freeze(
    pool: Corpus,
    learner: Learner,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RetrieverTrainingArguments,
    encoding: EncodingOptions,
) -> FrozenPassages:
    """The pool as the model embeds it before training, by the flags about embedding passages."""
    if data_args.candidate_pool is None:
        logger.info("the pool is the passages of the rows alone: --candidate_pool adds those of the whole index")
    options = dataclasses.replace(
        encoding,
        sentence_pooling_method=args.sentence_pooling_method,
        normalized=args.normalized,
        passage_instruction_for_retrieval=data_args.passage_instruction_for_retrieval,
        passage_max_len=data_args.given_passage_max_len,
    )
    return FrozenPassages(pool, model_args.model_name_or_path, options, dimensions=learner.bi_encoder.dimensions)


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
