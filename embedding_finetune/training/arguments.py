"""Flags of finetune.py: three dataclasses, of which the last passes transformers' own flags through.

Each checks itself when it is made, and settles its defaults. What only all three together tell, and what was given on
the command line, is checked in training/parser.py.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from embedding_finetune import files
from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.data.columns import ALSO_CALLED, COLUMNS_HELP, parse_columns
from embedding_finetune.data.hold_out import KINDS
from embedding_finetune.data.judgements import JUDGEMENTS_HELP, check_judgement_paths
from embedding_finetune.distributed import check_launch
from embedding_finetune.mining.arguments import SelectionOptions
from embedding_finetune.model.adapters import check_peft
from embedding_finetune.training.flags import check_launcher, check_numbers
from embedding_finetune.training.optimizer import check_activation_checkpointing, check_optimizer, check_schedule

EVAL_MEASURES, EVAL_CUTOFFS = ("MRR", "Hit"), (1, 5, 10)
EVAL_METRICS = {f"{measure}@{cutoff}" for measure in EVAL_MEASURES for cutoff in EVAL_CUTOFFS}

SCHEDULES_BY_MEASURE = ("reduce_lr_on_plateau", "greedy")


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What to start from."""

    model_name_or_path: str = field(metadata={"help": "model folder or hub name, or NAME@REVISION"})
    config_name: str | None = _flag(None, "folder or hub name of another config.json")
    tokenizer_name: str | None = _flag(None, "folder or hub name of another tokenizer")
    cache_dir: str | None = _flag(None, "where models from the hub are kept")
    trust_remote_code: bool = _flag(False, "run code that comes with the model")


@dataclass
class DataArguments:
    """What to train on."""

    train_data: list[str] = field(
        metadata={"help": "files of training rows, or folders of such files; they are one data set", "metavar": "FILE"}
    )
    columns: list[str] = field(default_factory=list, metadata={"help": COLUMNS_HELP, "metavar": "ROLE=COLUMN"})
    judgements: list[str] = field(default_factory=list, metadata={"help": JUDGEMENTS_HELP, "metavar": "FILE"})
    recipe: Literal["domain"] | None = _flag(
        None,
        "give every flag that is not given the value that suits data and model, and print the command line: `domain`, "
        "for finding your passages by your questions",
    )
    train_group_size: int = _flag(8, "passages per query: one positive, the rest negatives")
    neighbours_in_batch: int = _flag(
        0,
        "draw up to this many rows into a row's batch whose positives are among its negatives: hard negatives "
        "that cost nothing to encode",
    )
    mining_rounds: int = _flag(
        0,
        "cut training into this many rounds of equal length, and before each mine negatives with the model as it "
        "stands, among all positives and --candidate_pool; each further round has half the learning rate",
    )
    embeddings_dir: str | None = _flag(
        None,
        "with --mining_rounds or --freeze_passages: keep embeddings there, and reuse those of earlier runs with the "
        "same weights",
    )
    one_file_per_batch: bool = _flag(
        False, "a batch holds rows of one file only, drawn in proportion to the files' rows"
    )
    query_max_len: int = _flag(32, "queries are cut to this many tokens")
    passage_max_len: int = _flag(128, "passages are cut to this many tokens")
    max_example_num_per_dataset: int | None = _flag(
        None, "at most this many rows of each file, drawn with --seed (default: all)"
    )
    query_instruction_for_retrieval: str | None = _flag(
        None, 'put before each query (default: what the checkpoint says, else "")'
    )
    passage_instruction_for_retrieval: str | None = _flag(
        None, 'put before each passage (default: what the checkpoint says, else "")'
    )

    hold_out: float | None = _flag(
        None,
        "keep this share of the queries (below 1), or this many (from 1 on), out of training, and measure with them; "
        "rows that belong together stay together (0: none, with --recipe too)",
    )
    hold_out_by: str = _flag(
        "passage",
        "what is new about the queries that --hold_out keeps back: `passage`, no training row has a passage that "
        "answers them; `question`, training may know their passages; or a field of the rows, such as customer, whose "
        "rows stay together",
    )
    candidate_pool: str | None = _flag(
        None,
        "further passages, beside those of the training data: with --hold_out to search among, with --mining_rounds to "
        "mine from, with --freeze_passages to train against",
    )
    eval_query_file_jsonl_path: str | None = _flag(
        None, 'rows {"query": str, "pos": [str, ...]} to measure retrieval with, before training and during it'
    )
    eval_index_file_jsonl_path: str | None = _flag(
        None,
        "the passages they are searched among (default: every positive of training and evaluation rows, or the BEIR "
        "folder's own corpus)",
    )

    given_passage_max_len: int | None = field(default=None, init=False)
    """--passage_max_len, where it was given: passages that stay frozen have else their model's own length;
    training/parser.py sets it."""
    selection: SelectionOptions = field(default=SelectionOptions(), init=False)
    """The flags of mine_hard_neg.py about choosing negatives, for --mining_rounds; training/parser.py sets it."""

    def __post_init__(self) -> None:
        check_numbers(self)
        self.hold_out = self.hold_out or None
        if self.eval_index_file_jsonl_path is not None and self.eval_query_file_jsonl_path is None:
            raise UserError("--eval_index_file_jsonl_path needs --eval_query_file_jsonl_path")
        parse_columns(self.columns)
        if self.hold_out_field in ("query", "pos", "neg"):
            raise UserError(
                f"--hold_out_by {self.hold_out_by}: give `passage`, `question`, or a field that says which rows belong "
                "together, such as a document or a customer"
            )
        if isinstance(self.train_data, str):  # from Python
            self.train_data = [self.train_data]
        for path in self.train_data:
            files.require_data("--train_data", path)
        for flag in ("eval_query_file_jsonl_path", "eval_index_file_jsonl_path", "candidate_pool"):
            if getattr(self, flag) is not None:
                files.require_data(f"--{flag}", getattr(self, flag))
        check_judgement_paths(self.judgements)
        if self.embeddings_dir is not None:
            files.require_folder("--embeddings_dir", self.embeddings_dir, may_be_read_only=True)

    @property
    def hold_out_field(self) -> str | None:
        """The field whose rows are held out together, by the suite's own name; None for `passage` and `question`."""
        if self.hold_out_by in KINDS:
            return None
        roles = {column: role for role, column in {**ALSO_CALLED, **parse_columns(self.columns)}.items()}
        return roles.get(self.hold_out_by, self.hold_out_by)


@dataclass
class RetrieverTrainingArguments(TrainingArguments):
    """How to train: transformers' TrainingArguments and what is particular to a bi-encoder."""

    temperature: float = _flag(0.02, "scores are divided by it before the softmax")
    normalized: bool | None = _flag(None, "scale embeddings to length 1 (default: what the checkpoint says, else True)")
    sentence_pooling_method: Literal["cls", "mean", "lasttoken"] | None = _flag(
        None, "how token states become one vector (default: what the checkpoint says, else cls)"
    )
    use_inbatch_neg: bool = _flag(True, "the other passages of the batch are negatives too")
    mask_known_positives: bool = _flag(
        True, "a text known to answer a query is never its negative, nor is a text counted twice"
    )
    negatives_cross_device: bool = _flag(
        False, "under torchrun, the passages of all processes are negatives, not only this one's"
    )
    false_negative_margin: float | None = _flag(
        None,
        "a passage of another row of the batch that scores above the query's own positive + this is likely an answer "
        "that nobody labelled, and no negative in that step (default: none is left out)",
    )
    dropout: float | None = _flag(
        None, "the probability of dropout while training, 0 for none; the saved model keeps its own (default: its own)"
    )
    tokens_per_sub_batch: int | None = _flag(
        None,
        "padded tokens that go through the model at once, sorted by length; changes speed and memory, "
        "not the result (default: 1024 on CPU, 65536 elsewhere)",
    )
    recompute_sub_batches: bool = _flag(
        False,
        "keep no activations of a sub-batch, compute them again for the backward pass: memory that does "
        "not grow with the batch, for about a third more time",
    )
    minutes: float | None = _flag(
        None,
        "train for so long instead of --num_train_epochs; the first evaluation and mining are part of it, the last "
        "evaluation is not. Steps are timed, and the learning rate ends where the time does",
    )
    early_stopping_patience: int | None = _flag(
        None, "stop after this many evaluations without a better --metric_for_best_model"
    )
    matryoshka_dims: list[int] | None = field(
        default=None,
        metadata={
            "help": "train embeddings cut to these dimensions too, such as 256 64; then --truncate_dim cuts them"
        },
    )
    matryoshka_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "weight of the loss at each of --matryoshka_dims (default: 1 each, as whole embeddings have)"
        },
    )
    distillation_weight: float = _flag(
        0.0, "weight of the divergence from a teacher, whose pos_scores and neg_scores every row must carry"
    )
    teacher_temperature: float = _flag(1.0, "the teacher's scores are divided by it before the softmax")
    merge_with_base: float | None = _flag(
        None, "also save W * tuned + (1 - W) * base weights, in the folder merged of the output folder"
    )
    lora_rank: int | None = _flag(None, "train low-rank adapters of this rank instead of all weights; needs peft")
    save_adapter_only: bool = _flag(False, "with --lora_rank: save the adapter alone, not the merged model")
    freeze_passages: bool = _flag(
        False,
        "passages keep the embeddings that the model gives them now, so that an index stays valid: only the model of "
        "queries is trained, against all passages of the data and --candidate_pool at once",
    )
    fix_position_embedding: bool = _flag(False, "do not train the position embeddings")
    overwrite_output_dir: bool = _flag(False, "write into an output folder that is not empty")

    uploads: bool = field(default=False, init=False)
    """Whether --push_to_hub was given: the suite uploads once, at the end, transformers at every save."""

    @property
    def rows_share_negatives(self) -> bool:
        """Whether the passages of other rows are a row's negatives."""
        several = self.per_device_train_batch_size > 1 or (self.negatives_cross_device and self.world_size > 1)
        return self.use_inbatch_neg and several

    def __post_init__(self) -> None:
        check_launch()
        check_launcher()
        check_numbers(self)
        _set_defaults(self)
        self.uploads = bool(self.push_to_hub)  # type: ignore[has-type]
        self.push_to_hub = False
        super().__post_init__()
        if self.mixed_precision == "fp16" and self.use_cpu:
            raise UserError("--fp16 needs a GPU; --bf16 True works without one")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise UserError(
                f"--train_sampling_strategy {self.train_sampling_strategy}: only random and sequential are supported"
            )
        if self.n_gpu > 1:
            # transformers would cut the batch up over them with nn.DataParallel: texts here, their indices there.
            raise UserError(
                f"{self.n_gpu} GPUs are visible to one process: start it with "
                f"torchrun --nproc-per-node {self.n_gpu}, or show it one with CUDA_VISIBLE_DEVICES=0"
            )
        _check_matryoshka(self)
        _check_adapters(self)
        _check_metric(self)
        _check_mode_of_schedule(self)
        check_optimizer(self)
        check_schedule(self)
        check_activation_checkpointing(self)
        _check_reporting(self)


def _set_defaults(args: RetrieverTrainingArguments) -> None:
    """Where transformers' defaults, or what it makes of missing values, do not fit a bi-encoder."""
    if not torch.accelerator.is_available():
        args.use_cpu = True  # else transformers refuses --bf16 on a machine without an accelerator
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # the one unused part, a pooler, is frozen
    if args.early_stopping_patience is not None:
        args.load_best_model_at_end = args.eval_strategy != "no"
    by_measure = args.lr_scheduler_type in SCHEDULES_BY_MEASURE
    if args.load_best_model_at_end or args.save_strategy == "best" or by_measure:
        args.metric_for_best_model = args.metric_for_best_model or "eval_MRR@10"
    if by_measure:
        # Every measure is better when it is greater; transformers' default follows a loss.
        given = args.lr_scheduler_kwargs or {}
        args.lr_scheduler_kwargs = {"mode": "max", **(json.loads(given) if isinstance(given, str) else given)}


def _check_mode_of_schedule(args: RetrieverTrainingArguments) -> None:
    """Raise UserError for a schedule that would lower the learning rate when the measure rises."""
    if args.lr_scheduler_type in SCHEDULES_BY_MEASURE and args.lr_scheduler_kwargs["mode"] != "max":
        raise UserError('--lr_scheduler_kwargs {"mode": ...}: every measure is better when it is greater')


def _check_metric(args: RetrieverTrainingArguments) -> None:
    """Raise UserError for a --metric_for_best_model that evaluation does not give."""
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in EVAL_METRICS:
        raise UserError(f"--metric_for_best_model {metric}: must be one of {', '.join(sorted(EVAL_METRICS))}")


def _check_reporting(args: RetrieverTrainingArguments) -> None:
    """Raise UserError where --report_to names a tool that is not installed."""
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(f"--report_to: {first_line(error)}") from error


def _check_matryoshka(args: RetrieverTrainingArguments) -> None:
    dims, weights = args.matryoshka_dims, args.matryoshka_weights
    if weights is not None and len(weights) != len(dims or ()):
        raise UserError("--matryoshka_weights: give as many as --matryoshka_dims")
    if dims is not None and len(set(dims)) < len(dims):
        raise UserError(f"--matryoshka_dims {' '.join(map(str, dims))}: different numbers are needed")


def _check_adapters(args: RetrieverTrainingArguments) -> None:
    if args.lora_rank is not None:
        check_peft("--lora_rank")
    elif args.save_adapter_only:
        raise UserError("--save_adapter_only: there is no adapter without --lora_rank")
    if args.save_adapter_only and args.merge_with_base is not None:
        raise UserError("--merge_with_base makes a whole model; leave out --save_adapter_only")
