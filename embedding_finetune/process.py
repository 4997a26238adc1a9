"""What a run switches for the whole process, each in one place, and puts back when it ends.

That is logging and progress bars, ending signals, the garbage collector, malloc, and on macOS OpenMP's check. A library
that imports the package and calls none of the scripts finds nothing switched. One thing stays: at its exit the process
does not collect garbage.
"""

import atexit
import ctypes
import functools
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

ENDING_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if os.name == "posix":
    ENDING_SIGNALS[signal.SIGHUP] = "hung up"
_SECONDS_TO_INSIST = 1
_SEVERAL_OPENMP = "KMP_DUPLICATE_LIB_OK"

put_back = ExitStack()
"""What is to be undone when the run ends."""
received: list[int] = []
"""Ending signals that came during the run, by number."""
failures: list[type[BaseException]] = []
"""What ended the latest run early, by its class; empty where it returned, or has not ended."""
_holding: list[None] = []
"""An entry for each `uninterrupted` block that is running."""


@contextmanager
def as_a_run() -> Iterator[None]:
    """Let the process behave as a run of one of the scripts for the block, and as before when it ends."""
    received.clear()
    failures.clear()
    _skip_garbage_collection_at_exit()
    with put_back, _log_on_stderr(), _signals_raised_as_keyboard_interrupt():
        try:
            yield
        except BaseException as error:
            failures.append(type(error))
            raise


@functools.cache
def _skip_garbage_collection_at_exit() -> None:
    """Python would take a second to look through all that torch and transformers hold."""
    atexit.register(gc.freeze)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Send the package's log lines to stderr: stdout carries results only.

    Under torchrun the first process speaks for all: the others log errors alone and show no progress bars.
    """
    root, package = logging.getLogger(), logging.getLogger("embedding_finetune")
    handlers, levels = root.handlers[:], (root.level, package.level)
    tqdm_disabled = os.environ.get("TQDM_DISABLE")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    first_process = os.environ.get("RANK", "0") == "0"
    package.setLevel(logging.INFO if first_process else logging.ERROR)
    if not first_process:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])
        os.environ.pop("TQDM_DISABLE", None)
        if tqdm_disabled is not None:
            os.environ["TQDM_DISABLE"] = tqdm_disabled


@contextmanager
def importing() -> Iterator[None]:
    """For a script's blocks of heavy imports, and what they ask for.

    Signals wait; the garbage collector is off, which would take half a second. Afterwards, until the run ends, the
    collector leaves out what was imported, the libraries show no progress bars, and malloc is ready for large tensors.
    """
    _let_libraries_bring_their_own_openmp()
    was_on = gc.isenabled()
    gc.disable()
    try:
        with uninterrupted():
            yield
    finally:
        if was_on:
            gc.enable()
    _keep_imports_from_the_collector()
    _hide_progress_bars()
    _reuse_large_blocks()


def _let_libraries_bring_their_own_openmp() -> None:
    """On macOS torch and faiss each load a libomp of their own, and the second would abort the process."""
    if sys.platform == "darwin" and _SEVERAL_OPENMP not in os.environ:
        os.environ[_SEVERAL_OPENMP] = "TRUE"
        put_back.callback(os.environ.pop, _SEVERAL_OPENMP, None)


def _keep_imports_from_the_collector() -> None:
    """Let the garbage collector leave out what was imported: reading rows took twice as long with it."""
    if not gc.get_freeze_count():
        put_back.callback(gc.unfreeze)
    gc.freeze()


def _hide_progress_bars() -> None:
    """Hide those of the libraries that are imported: ours are enough."""
    if "transformers" in sys.modules:
        bars = sys.modules["transformers"].logging
        if bars.is_progress_bar_enabled():
            bars.disable_progress_bar()
            put_back.callback(bars.enable_progress_bar)
    if "datasets" in sys.modules:
        datasets = sys.modules["datasets"]
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            put_back.callback(datasets.enable_progress_bars)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_BLOCK, _DEFAULT_BLOCK = 2**30, 2**17  # bytes


def _reuse_large_blocks() -> None:
    """Let malloc keep and reuse freed blocks of up to a gigabyte; does nothing where the C library is not glibc.

    glibc maps every large tensor anew from the kernel and gives it back when it is freed; the kernel zeroes its pages
    each time. On a CPU that took about a seventh of a training step. What malloc was set to cannot be read: when the
    run ends, it gets its documented default.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        mallopt(parameter, _BLOCK)
        put_back.callback(mallopt, parameter, _DEFAULT_BLOCK)


def give_back_free_memory() -> None:
    """Give the kernel the freed memory that malloc keeps, between parts of a run that need blocks of other sizes."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another libc than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def _signals_raised_as_keyboard_interrupt() -> Iterator[None]:
    """Let every ending signal raise KeyboardInterrupt; one that is ignored, as nohup ignores SIGHUP, stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*ENDING_SIGNALS, signal.SIGALRM)}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    interrupt = _Interrupt()
    for number in heeded:
        signal.signal(number, interrupt)
    try:
        with _dropped_interrupts_untold():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in heeded:
            signal.signal(number, before[number])


class _Interrupt:
    """A signal handler that raises KeyboardInterrupt, again each second until the run is ending.

    Python drops what is raised in some places, in the hooks of a fork for instance, and the run would go on as if
    nothing had happened.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()

    def __call__(self, number: int, _: object) -> None:
        if os.getpid() != self._owner:  # a worker that was forked later ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_INSIST)
        if number == signal.SIGALRM and isinstance(sys.exc_info()[1], KeyboardInterrupt):
            return  # the run is ending: what cleans up has its time
        if number != signal.SIGALRM:
            received.append(number)
        if not _holding:
            raise KeyboardInterrupt


@contextmanager
def _dropped_interrupts_untold() -> Iterator[None]:
    """Keep Python from printing a traceback for a KeyboardInterrupt that it drops: it is raised again."""
    told = sys.unraisablehook

    def tell_others(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            told(dropped)

    sys.unraisablehook = tell_others
    try:
        yield
    finally:
        sys.unraisablehook = told


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let ending signals wait until the block is done.

    For steps that must be taken together or not at all, and for imports: some C extensions swallow a KeyboardInterrupt
    while they are imported.
    """
    before = len(received)
    _holding.append(None)
    try:
        yield
    finally:
        _holding.pop()
    if len(received) > before and not _holding:
        raise KeyboardInterrupt
