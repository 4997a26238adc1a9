"""`--recipe domain`: the flags that suit the data and the model, where the user gave none. docs/recipes.md has reasons.

`facts_of` measures data and model; `domain` decides what follows from that, and reads nothing.
"""

import itertools
import logging
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from embedding_finetune.data.hold_out import how_many
from embedding_finetune.data.jsonl import Record
from embedding_finetune.distributed import world_size
from embedding_finetune.mining.arguments import CHOICE_FLAGS
from embedding_finetune.model.encoding_kernels import choose_dtype
from embedding_finetune.model.limits import length_limit
from embedding_finetune.training.all_rows import by_flag
from embedding_finetune.training.arguments import DataArguments, ModelArguments
from embedding_finetune.training.learner import load_base
from embedding_finetune.training.row_columns import read_column

logger = logging.getLogger(__name__)

_TEXTS_LOOKED_AT = 2000
_QUANTILE = 0.99
"""Of the texts' lengths in tokens: that of almost all of them."""
_LENGTHS_ARE_MULTIPLES_OF = 16

_FEWEST_ROWS_TO_HOLD_OUT = 100
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 2000
_FEWEST_HELD_OUT_TO_CHOOSE = 200
"""Half of them choose, see choosing.py."""
_ABOUT_CHOOSING = {"eval_strategy", "load_best_model_at_end"}
_USELESS_BESIDE = {
    "max_steps": {"num_train_epochs", "dropout"},
    "minutes": {"num_train_epochs", "dropout"},
    "num_train_epochs": {"dropout"},
    "fp16": {"bf16"},
    "lr_scheduler_type": {"warmup_steps"},
    "hold_out_by": _ABOUT_CHOOSING,
    "eval_query_file_jsonl_path": {"hold_out", "hold_out_by", *_ABOUT_CHOOSING},
    "save_strategy": {"save_total_limit", *_ABOUT_CHOOSING},
    "save_steps": {"save_strategy", "save_total_limit", *_ABOUT_CHOOSING},
    "eval_strategy": {"save_strategy", "save_total_limit", *_ABOUT_CHOOSING},
}
"""A flag that a user gives -> flags of the recipe that it replaces, or that go with those that it replaces."""
_MANY_ROWS = 5000
"""From here on a batch of 128 is a small part of the rows."""
_EPOCHS_TIMES_ROOT_OF_ROWS = 200
"""8 epochs of 600 rows, 1.2 of 26,000: the number of steps grows with the root of the number of rows."""
_MOST_EPOCHS = 20
_EPOCHS_WITHOUT_DROPOUT = 10
_TIMES_THE_RATE = 3
"""Queries alone are trained at so many times the rate of both."""


class Facts(NamedTuple):
    """What the recipe depends on.

    rows, queries: numbers of training rows, and of distinct queries. query_tokens, passage_tokens: the lengths of
    almost all texts, with their special tokens. longest: what the model takes. parameters: of the model. bfloat16:
    whether the hardware computes in it natively. processes: that share a batch. hold_out: how many queries are to be
    held out, where the user says it. freezes_passages: whether queries alone are trained.
    """

    rows: int
    queries: int
    query_tokens: int
    passage_tokens: int
    longest: int
    parameters: int
    bfloat16: bool
    processes: int = 1
    hold_out: int | None = None
    freezes_passages: bool = False


def facts_of(
    rows: datasets.Dataset,
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    holds_none_out: bool = False,
    freezes_passages: bool = False,
) -> Facts:
    """Measure rows, as rows.load_rows gives them, and the model that training starts from.

    holds_none_out, freezes_passages: whether the user wants that.
    """
    backbone, tokenizer, config = load_base(model_args, route="query" if freezes_passages else None)
    numbers = np.unique(np.linspace(0, len(rows) - 1, _TEXTS_LOOKED_AT).astype(int))
    sample = rows.select_columns(["query", "pos"])[numbers]
    instructions = (
        (given if given is not None else saved)
        for given, saved in (
            (data_args.query_instruction_for_retrieval, config.query_instruction),
            (data_args.passage_instruction_for_retrieval, config.passage_instruction),
        )
    )
    query_tokens, passage_tokens = (
        _length_of_most(tokenizer, instruction, texts)
        for instruction, texts in zip(instructions, (sample["query"], itertools.chain(*sample["pos"])))
    )
    limit = length_limit(backbone, tokenizer)
    queries = len(np.unique(read_column(rows, "query_id")))
    held_out = 0 if holds_none_out else None if data_args.hold_out is None else how_many(data_args.hold_out, queries)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return Facts(
        rows=len(rows),
        queries=queries,
        query_tokens=query_tokens,
        passage_tokens=passage_tokens,
        longest=min(config.max_seq_length or limit, limit),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        bfloat16=choose_dtype("auto", device) == torch.bfloat16,
        processes=world_size(),
        hold_out=held_out,
        freezes_passages=freezes_passages,
    )


def _length_of_most(tokenizer: PreTrainedTokenizerBase, instruction: str, texts: Iterable[str]) -> int:
    ids = tokenizer([instruction + text for text in texts], verbose=False)["input_ids"]
    return int(np.quantile([len(tokens) for tokens in ids], _QUANTILE, method="higher"))


def domain(facts: Facts) -> Record:
    """flag -> value of the recipe for data and model like these."""
    if facts.freezes_passages:
        return _queries_alone(facts)
    batch = 128 if facts.rows >= _MANY_ROWS else 32
    epochs = _epochs(facts)
    flags: Record = {
        **_held_out(facts),
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "mining_rounds": 2,
        "range_for_sampling": "0-10",
        "negative_number": 9,  # one of the ten is the positive
        "sampling_strategy": "top",
        "train_group_size": 1,
        "neighbours_in_batch": 7,
        "per_device_train_batch_size": max(batch // facts.processes, 1),
        "num_train_epochs": epochs,
        "learning_rate": _learning_rate(facts.parameters),
        "warmup_steps": 0.1,
        "temperature": 0.05,
        "query_max_len": _padded(facts.query_tokens, facts.longest),
        "passage_max_len": _padded(facts.passage_tokens, facts.longest),
    }
    if epochs <= _EPOCHS_WITHOUT_DROPOUT:
        flags["dropout"] = 0.0
    if facts.processes > 1:
        flags["negatives_cross_device"] = True  # then they train as one process does
    return flags | ({"bf16": True} if facts.bfloat16 else {})


def _queries_alone(facts: Facts) -> Record:
    """The recipe for passages that keep their embeddings. Queries are short: a batch of 256 costs little."""
    batch = 256 if facts.rows >= _MANY_ROWS else 32
    flags: Record = {
        **_held_out(facts),
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "per_device_train_batch_size": max(batch // facts.processes, 1),
        "num_train_epochs": _epochs(facts),
        "learning_rate": float(f"{_TIMES_THE_RATE * _learning_rate(facts.parameters):.1e}"),
        "warmup_steps": 0.1,
        "temperature": 0.03,
        "dropout": 0.0,
        "query_max_len": _padded(facts.query_tokens, facts.longest),
    }
    return flags | ({"bf16": True} if facts.bfloat16 else {})


def _epochs(facts: Facts) -> float:
    return float(f"{min(_EPOCHS_TIMES_ROOT_OF_ROWS / facts.rows**0.5, _MOST_EPOCHS):.2g}")


def _held_out(facts: Facts) -> Record:
    count = facts.hold_out
    if count is None:
        is_enough = facts.rows >= _FEWEST_ROWS_TO_HOLD_OUT
        count = min(round(_HELD_OUT_SHARE * facts.queries), _MOST_HELD_OUT) if is_enough else 0
    if not count:
        return {}
    flags: Record = {"hold_out": count, "hold_out_by": "question"}
    if count >= _FEWEST_HELD_OUT_TO_CHOOSE:
        flags |= {"eval_strategy": "epoch", "load_best_model_at_end": True}
    return flags


def _learning_rate(parameters: int) -> float:
    """Larger models are finetuned at smaller rates."""
    for most, rate in ((50_000_000, 1e-4), (200_000_000, 5e-5)):
        if parameters <= most:
            return rate
    return 2e-5


def _padded(tokens: int, longest: int) -> int:
    multiple = _LENGTHS_ARE_MULTIPLES_OF
    return min(-(-tokens // multiple) * multiple, longest)


def with_recipe(
    argv: Sequence[str],
    rows: datasets.Dataset,
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    freezes_passages: bool = False,
) -> list[str]:
    """A command line's flags without --recipe, and with those of the recipe that are not given; logs them."""
    given = {name for name, _ in by_flag(argv)}
    holds_none_out = "hold_out" in given and data_args.hold_out is None
    facts = facts_of(rows, model_args, data_args, holds_none_out=holds_none_out, freezes_passages=freezes_passages)
    flags = completed(argv, domain(facts))
    logger.info(
        "recipe: %d rows, %d queries; 99%% of the queries have at most %d tokens, of the passages %d; %d parameters",
        *(facts.rows, facts.queries, facts.query_tokens, facts.passage_tokens, facts.parameters),
    )
    if facts.rows < _FEWEST_ROWS_TO_HOLD_OUT and not given & {"hold_out", "eval_query_file_jsonl_path"}:
        logger.info(
            "recipe: nothing is held out: %d rows are too few to judge a model by; measure it with evaluate.py on "
            "other questions",
            facts.rows,
        )
    logger.info("recipe: python finetune.py %s", shlex.join(flags))
    return flags


def completed(argv: Sequence[str], recipe: Mapping[str, object]) -> list[str]:
    """A command line's flags without --recipe, and with those of the recipe that it neither has nor makes useless."""
    given = list(by_flag(argv))
    left_out = {name for name, _ in given}.union(*(_USELESS_BESIDE.get(name, ()) for name, _ in given))
    if any(name == "mining_rounds" and words[-1].rpartition("=")[2] == "0" for name, words in given):
        left_out |= {*CHOICE_FLAGS, "neighbours_in_batch"}
    kept = [word for name, words in given if name != "recipe" for word in words]
    return [*kept, *(word for flag in recipe if flag not in left_out for word in (f"--{flag}", str(recipe[flag])))]
