"""argparse with one-line errors, and the types of flags. Nothing heavy is imported: --help answers at once."""

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: dict[str, object] = {}
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.register("action", "store_true", functools.partial(_Once, nargs=0, const=True, default=False))
        self.register("action", "store_false", functools.partial(_Once, nargs=0, const=False, default=True))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own, after checking that every argument is text and no value is empty."""
        args = sys.argv[1:] if args is None else list(args)
        self.given.clear()
        self._check_texts(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def print_help(self, file: Any = None) -> None:
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

    def __call__(
        self,
        parser: Any,  # an OneLineErrorParser
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        value = self.const if self.nargs == 0 else values
        if self.nargs == "+":
            value = [*parser.given.get(self.dest, ()), *values]
        elif self.dest in parser.given:
            parser.error(f"argument {option_string}: it is given twice; give it once")
        parser.given[self.dest] = value
        setattr(namespace, self.dest, value)


def new_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring and every flag with its default."""
    return OneLineErrorParser(description=docstring, formatter_class=DocstringAndDefaults, allow_abbrev=False)


def add_switch(group: argparse._ActionsContainer, flag: str, text: str) -> None:
    """Add a flag that is False unless it is given, alone or with True or False."""
    group.add_argument(flag, type=boolean, nargs="?", const=True, default=False, metavar="BOOL", help=text)


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


class DocstringAndDefaults(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and names every default that a flag's help does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in text
        return text if silent else f"{text} (default: %(default)s)"
