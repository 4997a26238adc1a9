"""argparse with one-line errors, and the types of flags. No heavy imports, so that --help answers at once."""

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

LARGEST_COUNT = 2**31 - 1
"""Larger counts have no use, and arrays of their size do not fit into memory."""

LARGEST_SEED = 2**32 - 1
"""The largest that numpy takes."""

_MAY_BE_EMPTY = {"query_instruction_for_retrieval", "passage_instruction_for_retrieval"}


class OneLineErrorParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage, and which drops no value that was given.

    Repeating a flag of several values adds to them; any other flag is refused the second time. Empty values and values
    that are not UTF-8 are refused too: a run would fail on them when it writes its results.

    given: flag -> value, of the flags that the last parse found on the command line. Defaults are not among them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: dict[str, object] = {}
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.register("action", "store_true", functools.partial(_Once, nargs=0, const=True, default=False))
        self.register("action", "store_false", functools.partial(_Once, nargs=0, const=False, default=True))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, after checking that all arguments are text and no value is empty."""
        args = sys.argv[1:] if args is None else list(args)
        self.given.clear()
        self._check_texts(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def print_help(self, file: Any = None) -> None:
        """Print the help; unlike argparse, fail where it cannot be written."""
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
                self.error(f"argument {flag}: its value is empty; give one, or leave the flag out")


class _Once(argparse.Action):
    """Stores its value, records it in the parser's `given`, and refuses to be given twice.

    A flag of several values may be repeated: the first occurrence replaces the default, later ones add to it.
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
            parser.error(f"argument {option_string}: given twice; give it once")
        parser.given[self.dest] = value
        setattr(namespace, self.dest, value)


def new_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help shows the script's docstring and every flag with its default."""
    return OneLineErrorParser(description=docstring, formatter_class=DocstringAndDefaults, allow_abbrev=False)


def add_switch(group: argparse._ActionsContainer, flag: str, text: str) -> None:
    """Add a flag that is False by default, and True when it is given alone. It also takes True or False as a value."""
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
    """The first of the names that means the same model as an earlier one: `models/a/` after `models/a`; else None.

    A link and the folder it points to count as two models.
    """
    seen = set()
    for name in names:
        place = os.path.abspath(name) if os.path.isdir(name) else name.rstrip("/")
        if place in seen:
            return name
        seen.add(place)
    return None


class DocstringAndDefaults(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and adds the default to a flag's help where the help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS) or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"
