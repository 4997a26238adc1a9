"""What the three scripts share as programs: one-line errors, exit statuses, logging to stderr."""

import atexit
import contextlib
import errno
import functools
import gc
import io
import logging
import os
import shutil
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
BROKEN_PIPE = 128 + 13
"""What a shell gives for a program that SIGPIPE ended."""
_ENDING_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if os.name == "posix":
    _ENDING_SIGNALS[signal.SIGHUP] = "hung up"
_SECONDS_TO_INSIST = 1
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake in what the user gave us: one line that names file:line or flag, and the remedy."""


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Wrap a script's `main`: what a user or the machine did wrong ends it in one line, with a status of its own.

    2 for a UserError and for a disk that cannot be written, 141 for a reader of stdout that went away, 128 + its
    number for a signal: 130 for Ctrl-C, 143 for SIGTERM.

    Called from Python, it leaves the process as it was: signal handlers, logging, stdout, progress bars, environment.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        program = os.path.basename(getattr(sys.modules[main.__module__], "__file__", None) or main.__module__)

        def end(status: int, reason: object) -> SystemExit:
            with contextlib.suppress(OSError):  # stderr may be the broken pipe
                print(f"{program}: {reason}", file=sys.stderr)
            return SystemExit(status)

        if os.name != "posix":
            raise end(BAD_INPUT, "error: this runs on Linux and macOS only; on Windows use WSL")
        _skip_garbage_collection_at_exit()
        _received.clear()
        try:
            with _libraries_as_they_were(), _signals_raised_as_keyboard_interrupt(), _any_character_on_stdout():
                return main(*args, **kwargs)
        except UserError as error:
            raise end(BAD_INPUT, f"error: {error}") from error
        except KeyboardInterrupt:
            number = _received[0] if _received else signal.SIGINT
            raise end(128 + number, _ENDING_SIGNALS[signal.Signals(number)]) from None
        except BrokenPipeError:
            _discard_stdout()
            raise SystemExit(BROKEN_PIPE) from None
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            _discard_stdout()
            where = "" if error.filename is None else f"{error.filename}: "
            raise end(BAD_INPUT, f"error: {where}{error.strerror}; make room, and start again") from error

    return wrapped


@functools.cache
def _skip_garbage_collection_at_exit() -> None:
    """Python would take a second to look through all that torch and transformers hold."""
    atexit.register(gc.freeze)


@contextmanager
def _libraries_as_they_were() -> Iterator[None]:
    """Put back what a run switches for the whole process: logging, progress bars, torch's compiler."""
    root, package = logging.getLogger(), logging.getLogger("embedding_finetune")
    handlers, levels = root.handlers[:], (root.level, package.level)
    tqdm_disabled = os.environ.get("TQDM_DISABLE")
    bars = {name: _are_bars_shown(name) for name in ("transformers", "datasets")}
    freezing = getattr(sys.modules.get("torch._inductor.config"), "freezing", False)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])
        if tqdm_disabled is None:
            os.environ.pop("TQDM_DISABLE", None)
        for name, shown in bars.items():
            if shown and not _are_bars_shown(name):
                _show_bars(name)
        if "torch._inductor.config" in sys.modules:
            sys.modules["torch._inductor.config"].freezing = freezing  # type: ignore[attr-defined]


def _are_bars_shown(library: str) -> bool:
    """Whether a library, imported or not, shows progress bars."""
    if library not in sys.modules:
        return True
    if library == "datasets":
        return bool(sys.modules["datasets"].are_progress_bars_disabled() is False)
    return bool(sys.modules["transformers"].logging.is_progress_bar_enabled())


def _show_bars(library: str) -> None:
    if library == "datasets":
        sys.modules["datasets"].enable_progress_bars()
    else:
        sys.modules["transformers"].logging.enable_progress_bar()


_received: list[int] = []
"""Ending signals that came, by number."""
_holding: list[None] = []
"""An entry for each `uninterrupted` block that is running."""


@contextmanager
def _signals_raised_as_keyboard_interrupt() -> Iterator[None]:
    """Let every ending signal raise KeyboardInterrupt; one that is ignored, as nohup ignores SIGHUP, stays ignored.

    It is raised again, second by second, until the run is ending: Python drops what is raised in some places, in the
    hooks of a fork for instance, and the run would go on as if nothing had happened.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, _: object) -> None:
        if os.getpid() != owner:  # a worker that was forked later ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_INSIST)
        if number == signal.SIGALRM and isinstance(sys.exc_info()[1], KeyboardInterrupt):
            return  # the run is ending: what cleans up has its time
        if number != signal.SIGALRM:
            _received.append(number)
        if not _holding:
            raise KeyboardInterrupt

    told = sys.unraisablehook

    def tell_others(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):  # which is raised again, and needs no traceback
            told(dropped)

    before = {number: signal.getsignal(number) for number in (*_ENDING_SIGNALS, signal.SIGALRM)}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, interrupt)
    sys.unraisablehook = tell_others
    try:
        yield
    finally:
        sys.unraisablehook = told
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in heeded:
            signal.signal(number, before[number])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let ending signals wait until the block is done.

    For steps that must be taken together or not at all, and for imports: some C extensions swallow a KeyboardInterrupt
    while they are imported.
    """
    before = len(_received)
    _holding.append(None)
    try:
        yield
    finally:
        _holding.pop()
    if len(_received) > before and not _holding:
        raise KeyboardInterrupt


@contextmanager
def importing() -> Iterator[None]:
    """For blocks of heavy imports: signals wait, and the garbage collector is off, which would take half a second."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        with uninterrupted():
            yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _any_character_on_stdout() -> Iterator[None]:
    """Write what stdout's encoding lacks as an escape, and see in time whether all could be written."""
    stdout = sys.stdout
    errors = stdout.errors if isinstance(stdout, io.TextIOWrapper) else None
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if stdout is not None:
            stdout.flush()
        if isinstance(stdout, io.TextIOWrapper):
            stdout.reconfigure(errors=errors)


def _discard_stdout() -> None:
    """Send what is left for stdout nowhere: Python would fail on it once more when it ends."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be no such file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
    folder = tempfile.mkdtemp(prefix="embedding_finetune_")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a worker that was forked ends before its owner, which goes on to use the folder
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
