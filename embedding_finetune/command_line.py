"""What the three scripts share as programs: one-line errors, exit statuses, logging to stderr."""

import atexit
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

BAD_INPUT = 2
INTERRUPTED = 130


class UserError(Exception):
    """A mistake in what the user gave us: one line that names file:line or flag, and the remedy."""


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Wrap a script's `main`: a UserError ends it with status 2, Ctrl-C with 130, both in one line."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        program = os.path.basename(sys.modules[main.__module__].__file__ or main.__module__)
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"{program}: error: {error}", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from error
        except KeyboardInterrupt:
            print(f"{program}: interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None

    return wrapped


def log_to_stderr() -> None:
    """Send the package's log lines to stderr: stdout carries results only.

    Under torchrun the first process speaks for all: the others log errors alone and show no progress bars. To be
    called before tqdm is imported, which looks at its environment then.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    first_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("embedding_finetune").setLevel(logging.INFO if first_process else logging.ERROR)
    if not first_process:
        os.environ["TQDM_DISABLE"] = "1"


@functools.cache
def scratch_folder() -> str:
    """A folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="embedding_finetune_")
    atexit.register(folder.cleanup)
    return folder.name


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
