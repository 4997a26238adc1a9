"""What a run trains on and is measured with, by its flags."""

import itertools
import logging
from typing import NamedTuple

import datasets

from embedding_finetune.data.beir import is_beir
from embedding_finetune.data.corpus import Corpus, read_corpus
from embedding_finetune.data.judgements import NO_JUDGEMENTS, Judgements, settle_rows
from embedding_finetune.data.records import read_passages, read_queries
from embedding_finetune.data.task import RetrievalTask, load_task, make_task
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.batches import TrainDataset, check_it_can_learn
from embedding_finetune.training.choosing import flag_that_chooses
from embedding_finetune.training.held_out import HeldOut, hold_out
from embedding_finetune.training.rounds import Rounds
from embedding_finetune.training.rows import all_passages, load_rows

logger = logging.getLogger(__name__)

_ALL_NEGATIVES = 10**9
"""As a group size: an example has all negatives of its row."""


class RunData(NamedTuple):
    """Rows to train on, what mines for them, queries that were kept out of them, and queries of --eval_..._path.

    pool: the passages that stay as they are; None where passages are trained.
    """

    dataset: TrainDataset
    rounds: Rounds | None = None
    held_out: HeldOut | None = None
    task: RetrievalTask | None = None
    pool: Corpus | None = None


def read_rows(
    data_args: DataArguments, args: RetrieverTrainingArguments, judgements: Judgements = NO_JUDGEMENTS
) -> datasets.Dataset:
    """All training rows as judged, those too that will be held out."""
    return load_rows(
        data_args.train_data,
        data_args.columns,
        max_rows_per_file=data_args.max_example_num_per_dataset,
        seed=args.seed,
        scores_required=args.distillation_weight > 0,
        may_be_held_out=data_args.hold_out is not None or data_args.recipe is not None,
        hold_out_field=data_args.hold_out_field,
        judgements=judgements,
    )


def prepare(
    rows: datasets.Dataset,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RetrieverTrainingArguments,
    judgements: Judgements = NO_JUDGEMENTS,
) -> RunData:
    """What the flags make of the rows. Raises UserError where nothing could be learned from them."""
    training_rows, held_out = hold_out(rows, data_args, seed=args.seed, chosen_by=flag_that_chooses(data_args, args))
    rounds = make_rounds(model_args, data_args, training_rows)
    dataset = TrainDataset(
        training_rows,
        group_size=_ALL_NEGATIVES if args.freeze_passages else data_args.train_group_size,
        seed=args.seed,
        negatives=None if rounds is None else data_args.selection.negative_number,
    )
    logger.info("%d training rows", len(dataset))
    pool = make_pool(data_args, training_rows) if args.freeze_passages else None
    check_it_can_learn(dataset, args, pool)
    return RunData(dataset, rounds, held_out, load_evaluation(data_args, dataset, rows, judgements), pool)


def load_evaluation(
    data_args: DataArguments,
    dataset: TrainDataset,
    rows: datasets.Dataset | None = None,
    judgements: Judgements = NO_JUDGEMENTS,
) -> RetrievalTask | None:
    """The queries to measure with and the passages to search, if any; warns where training has seen them.

    rows: all rows, where some are held out: their positives are searched too.
    """
    if data_args.eval_query_file_jsonl_path is None:
        return None
    query_file, index_file = data_args.eval_query_file_jsonl_path, data_args.eval_index_file_jsonl_path
    if index_file is None and is_beir(query_file):
        index_file = query_file
    if index_file is not None:
        corpus = read_corpus(index_file, data_args.columns)
        task = load_task(query_file, corpus, data_args.columns, judgements=judgements)
    else:
        queries = [row for row, _ in settle_rows(read_queries(query_file, data_args.columns), judgements, query_file)]
        # Training rows stay on disk: they are read one after the other.
        all_rows = (dataset.rows if rows is None else rows).select_columns(["pos"])
        corpus = Corpus(text for row in itertools.chain(all_rows, queries) for text in row["pos"])
        task = make_task(queries, corpus, judgements)
    known_queries, known_passages = dataset.known_positives.overlap(task)
    if known_queries or known_passages:
        logger.warning(
            "warning: of the evaluation, %d of %d queries and %d of %d relevant passages are also in the training data",
            known_queries,
            len(task.queries),
            known_passages,
            len(task.findable_answers),
        )
    return task


def make_pool(data_args: DataArguments, rows: datasets.Dataset) -> Corpus:
    """The passages that queries are trained against: all of the rows, and those of --candidate_pool."""
    further = () if data_args.candidate_pool is None else read_passages(data_args.candidate_pool, data_args.columns)
    return Corpus(itertools.chain(all_passages(rows), further))


def make_rounds(model_args: ModelArguments, data_args: DataArguments, rows: datasets.Dataset) -> Rounds | None:
    """What mines before each round of training; None where --mining_rounds asks for none."""
    if not data_args.mining_rounds:
        return None
    return Rounds(
        rows,
        () if data_args.candidate_pool is None else read_passages(data_args.candidate_pool, data_args.columns),
        count=data_args.mining_rounds,
        selection=data_args.selection,
        embeddings_dir=data_args.embeddings_dir,
        trust_remote_code=model_args.trust_remote_code,
    )
