"""What the three scripts share as programs: one-line errors, exit statuses, logging to stderr."""

import atexit
import functools
import gc
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

BAD_INPUT = 2
INTERRUPTED = 130
_SECONDS_TO_INSIST = 5


class UserError(Exception):
    """A mistake in what the user gave us: one line that names file:line or flag, and the remedy."""


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Wrap a script's `main`: a UserError ends it with status 2, Ctrl-C with 130, both in one line.

    Python's garbage collector, which would take half a second of the imports and a whole one of the process's end,
    rests until loading.load_backbone has a model, and again when the process ends.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        program = os.path.basename(sys.modules[main.__module__].__file__ or main.__module__)
        gc.disable()
        atexit.register(gc.freeze)
        try:
            with _insistent_ctrl_c():
                return main(*args, **kwargs)
        except UserError as error:
            print(f"{program}: error: {error}", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from error
        except KeyboardInterrupt:
            print(f"{program}: interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        finally:
            gc.enable()

    return wrapped


@contextmanager
def _insistent_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt again every few seconds until it ends the block.

    Some C extensions swallow it while they are imported, and a run would go on as if nothing had been pressed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def interrupt(*_: object) -> None:
        if os.getpid() == owner:  # workers that are forked later end when their owner does
            signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_INSIST)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


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
