"""Flags of mine_hard_neg.py and evaluate.py. Imports nothing heavy: --help and a bad flag answer at once.

The flags of finetune.py are the dataclasses of training_arguments.py.
"""

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

DTYPES = ("auto", "float32", "bfloat16", "float16")

POOLING_METHODS = ("cls", "mean", "lasttoken")
"""`cls`: the first token's state; `mean`: the mean over tokens; `lasttoken`: the last token's state."""


LARGEST_COUNT = 2**31 - 1
"""Counts above this have no meaning, and do not fit into the arrays that they would size."""

LARGEST_SEED = 2**32 - 1
"""numpy takes no greater one."""

_MAY_BE_EMPTY = {"query_instruction_for_retrieval", "passage_instruction_for_retrieval"}


class OneLineErrorParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage, and that loses nothing it was given.

    A flag of several values extends when it is repeated; any other is refused the second time. Values that are empty,
    or not UTF-8, are refused too: a run would fail on them when it writes its results.

    given: flag -> value of what the last parse found on the command line, defaults left out.
    """

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.given: dict[str, object] = {}
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.register("action", "store_true", functools.partial(_Once, nargs=0, const=True, default=False))
        self.register("action", "store_false", functools.partial(_Once, nargs=0, const=False, default=True))

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        self.given.clear()
        self._check_texts(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def print_help(self, file: TextIO | None = None) -> None:
        """Print the help; unlike argparse's own, fail where it cannot be written."""
        print(self.format_help(), end="", file=file)

    def _check_texts(self, args: Sequence[str]) -> None:
        flag = ""
        for text in args:
            if text.startswith("--"):
                flag = text.partition("=")[0]
            try:
                text.encode()
            except UnicodeEncodeError:
                self.error(f"argument {flag}: {text!r} is not UTF-8; rename it")
            if "\0" in text:
                self.error(f"argument {flag}: {text!r} holds a null character")
            if text in ("", f"{flag}=") and flag[2:].replace("-", "_") not in _MAY_BE_EMPTY:
                self.error(f"argument {flag}: its value is empty; leave it out, or give one")


class _Once(argparse.Action):
    """Stores its values, records them in the parser's `given`, and refuses to be given twice.

    A flag of several values extends instead, from nothing: its default is replaced at the first occurrence.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        value = self.const if self.nargs == 0 else values
        if self.nargs == "+":
            value = [*parser.given.get(self.dest, ()), *values]
        elif self.dest in parser.given:
            parser.error(f"argument {option_string}: it is given twice; give it once")
        parser.given[self.dest] = value
        setattr(namespace, self.dest, value)


def new_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring and every flag with its default."""
    return OneLineErrorParser(description=docstring, formatter_class=_DocstringAndDefaults, allow_abbrev=False)


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags about turning texts into embeddings and searching them."""
    group = parser.add_argument_group("encoding")
    checkpoint = "(default: what the checkpoint says, else %s)"
    group.add_argument(
        "--sentence_pooling_method",
        choices=POOLING_METHODS,
        help="how token states become one vector " + checkpoint % "cls",
    )
    group.add_argument(
        "--normalized", type=boolean, metavar="BOOL", help="scale embeddings to length 1 " + checkpoint % "True"
    )
    group.add_argument(
        "--query_instruction_for_retrieval", metavar="TEXT", help="put before each query " + checkpoint % '""'
    )
    group.add_argument(
        "--passage_instruction_for_retrieval", metavar="TEXT", help="put before each passage " + checkpoint % '""'
    )
    length = "%s are cut to this many tokens (default: the checkpoint's max_seq_length, else its tokenizer's)"
    group.add_argument("--query_max_len", type=positive_int, metavar="N", help=length % "queries")
    group.add_argument("--passage_max_len", type=positive_int, metavar="N", help=length % "passages")
    group.add_argument(
        "--truncate_dim",
        type=positive_int,
        metavar="N",
        help="keep the first N dimensions of embeddings, as models trained with --matryoshka_dims allow",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision of the model; auto: bfloat16 where the hardware computes it natively, else float32. "
        "Pooling, normalisation and scores are float32 always",
    )
    group.add_argument(
        "--tokens_per_batch",
        type=positive_int,
        metavar="N",
        help="padded tokens that go through the model at once (default: 4096 on CPU, 65536 elsewhere)",
    )
    group.add_argument(
        "--torch_compile",
        **_SWITCH,
        help="compile the model; on a CPU this needs g++, and gained nothing where it was measured",
    )
    group.add_argument(
        "--embeddings_dir",
        metavar="DIR",
        help="keep embeddings there and take what earlier runs with the same weights and settings left",
    )
    group.add_argument("--use_gpu_for_searching", **_SWITCH, help="search with faiss-gpu on all GPUs")
    group.add_argument("--trust_remote_code", **_SWITCH, help="run code that comes with the model")
    group.add_argument("--cache_dir", metavar="DIR", help="where models from the hub are kept")


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of mine_hard_neg.py about which candidates become negatives."""
    group = parser.add_argument_group("choosing negatives")
    group.add_argument(
        "--range_for_sampling",
        type=rank_range,
        default="10-210",
        metavar="A-B",
        help="sample from the ranks [A, B) of each query's ranking, counted from 0",
    )
    group.add_argument("--negative_number", type=positive_int, default=15, metavar="N", help="negatives per row")
    group.add_argument(
        "--sampling_strategy",
        choices=("random", "top"),
        default="random",
        help="draw negatives from the range, or take its best",
    )
    group.add_argument("--max_score", type=finite_number, metavar="X", help="only negatives that score at most X")
    group.add_argument("--min_score", type=finite_number, metavar="X", help="only negatives that score at least X")
    group.add_argument(
        "--absolute_margin", type=margin, metavar="M", help="only negatives that score at most positive - M"
    )
    group.add_argument(
        "--relative_margin",
        type=margin,
        metavar="R",
        help="only negatives that score at most positive - R * |positive|; of several positives the lowest counts",
    )
    group.add_argument(
        "--near_duplicate_threshold",
        type=cosine_threshold,
        metavar="T",
        help="no passages whose embedding has a cosine of at least T to that of a positive",
    )
    group.add_argument(
        "--keep_existing_negatives", **_SWITCH, help='keep the "neg" of the input, and add to it up to the number'
    )
    group.add_argument("--seed", type=seed, default=42, metavar="N", help="seed of the sampling")


def add_mining_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of mine_hard_neg.py about what it writes."""
    group = parser.add_argument_group("output")
    group.add_argument("--save_scores", **_SWITCH, help='write "pos_scores" and "neg_scores" beside "pos" and "neg"')
    group.add_argument("--drop_rows_without_negatives", **_SWITCH, help="do not write rows that got no negative")
    group.add_argument("--report_file", metavar="FILE", help="write the audit there as JSON")
    group.add_argument("--show_examples", type=positive_int, metavar="N", help="print N mined rows, drawn at random")


def boolean(text: str) -> bool:
    """True or False, as transformers' own flags spell them."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def positive_int(text: str) -> int:
    """A whole number from 1 to LARGEST_COUNT."""
    if not re.fullmatch(r"\+?0*[0-9]{1,10}", text) or not 1 <= int(text) <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {LARGEST_COUNT}")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to LARGEST_SEED."""
    if not re.fullmatch(r"\+?0*[0-9]{1,10}", text) or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {LARGEST_SEED}")
    return int(text)


def finite_number(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def margin(text: str) -> float:
    """A number that is not negative."""
    value = finite_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: a margin is at least 0")
    return value


def cosine_threshold(text: str) -> float:
    """A number in (0, 1]."""
    value = finite_number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def rank_range(text: str) -> tuple[int, int]:
    """`a-b` with 0 <= a < b: the ranks [a, b), counted from 0."""
    match = re.fullmatch(r"0*([0-9]{1,10})-0*([0-9]{1,10})", text)
    if not match or not int(match[1]) < int(match[2]) <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a-b with 0 <= a < b <= {LARGEST_COUNT}, for example 2-10")
    return int(match[1]), int(match[2])


def repeated_model(names: Sequence[str]) -> str | None:
    """A name among these that is an earlier one, written otherwise, as `models/a/` is `models/a`; links are names."""
    seen = set()
    for name in names:
        place = os.path.abspath(name) if os.path.isdir(name) else name.rstrip("/")
        if place in seen:
            return name
        seen.add(place)
    return None


_SWITCH = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}


class _DocstringAndDefaults(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and names every default that a flag's help does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in text
        return text if silent else f"{text} (default: %(default)s)"
