"""What the three scripts share as programs: one-line errors, exit statuses, stdout, a scratch folder."""

import atexit
import contextlib
import errno
import functools
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from embedding_finetune import process

P = ParamSpec("P")
T = TypeVar("T")

BAD_INPUT = 2
BROKEN_PIPE = 128 + 13
"""What a shell gives for a program that SIGPIPE ended."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake in what the user gave us: one line that names file:line or flag, and the remedy."""

    status = BAD_INPUT


class UploadError(UserError):
    """The run is finished and all is saved, but it could not be uploaded."""

    status = 1


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Wrap a script's `main`: what a user or the machine did wrong ends it in one line, with a status of its own.

    2 for a UserError and for a disk that cannot be written, 1 for an UploadError, 141 for a reader of stdout that went
    away, 128 + its number for a signal: 130 for Ctrl-C, 143 for SIGTERM.

    Log lines go to stderr. Called from Python, it leaves the process as it was, see process.py.
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
        try:
            with process.as_a_run(), _any_character_on_stdout():
                return main(*args, **kwargs)
        except UserError as error:
            raise end(error.status, f"error: {error}") from error
        except KeyboardInterrupt:
            number = process.received[0] if process.received else signal.SIGINT
            raise end(128 + number, process.ENDING_SIGNALS[signal.Signals(number)]) from None
        except BrokenPipeError:
            _discard_stdout()
            raise SystemExit(BROKEN_PIPE) from None
        except OSError as error:
            if "No usable temporary directory" in str(error):  # tempfile's, where it could write nowhere
                reason = (
                    "error: TMPDIR: nothing can be written there or in /tmp; make room, or set it to another folder"
                )
                raise end(BAD_INPUT, reason) from error
            if error.errno not in _DISK_ERRORS:
                raise
            _discard_stdout()
            where = "" if error.filename is None else f"{error.filename}: "
            raise end(BAD_INPUT, f"error: {where}{error.strerror}; make room, and start again") from error

    return wrapped


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


def scratch_error(error: Exception, what: str) -> UserError:
    """What to tell the user where something could not be written into scratch_folder, or into TMPDIR itself."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UserError(f"TMPDIR: {what} cannot be written there: {reason}; make room, or set TMPDIR to another folder")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
