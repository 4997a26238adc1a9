"""How far a run is, on stderr: a bar in a terminal; elsewhere, for instance under nohup, a plain line now and then."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30
_ended: dict[str, float] = {}
"""Description -> when the last line about the end of work with this description was written."""


class Progress:
    """Counts how many of `total` items are done; `unit` names an item.

    Nothing is shown before `show` or the first `update`, so that work that was done earlier stays quiet. A terminal
    shows tqdm's bar. Elsewhere a line is written at most every 30 s, and one at the end. Pieces of work with the same
    description write such a last line at most every 30 s; work with leave=False and work that failed write none.
    With disable, or with TQDM_DISABLE in the environment, nothing is shown.
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        *,
        leave: bool = True,
        disable: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = 0
        self._description = description
        self._unit = unit
        self._leave = leave
        self._disabled = disable or os.environ.get("TQDM_DISABLE", "") not in ("", "0")
        self._clock = clock
        self._bar: tqdm[Any] | None = None
        self._began: float | None = None  # None: nothing is shown yet
        self._last_line = 0.0

    def show(self) -> None:
        """Start showing the progress."""
        if self._disabled or self._began is not None or sys.stderr is None:
            return
        self._began = self._last_line = self._clock()
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self._description,
                unit=self._unit,
                leave=self._leave,
                dynamic_ncols=True,
            )

    def expect(self, total: int) -> None:
        """Count to another total from here on."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def skip(self, count: int) -> None:
        """Count items that needed no work."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def update(self, count: int) -> None:
        """Count items that were just done."""
        self.show()
        self.skip(count)
        if self._began is not None and self._bar is None:
            now = self._clock()
            if now - self._last_line >= _SECONDS_BETWEEN_LINES and self.done < self.total:
                self._write_line(now)

    def close(self, *, failed: bool = False) -> None:
        """Show that the work has ended."""
        if self._bar is not None:
            self._bar.close()
        elif self._began is not None and self._leave and not failed:
            now = self._clock()
            if now - _ended.get(self._description, -_SECONDS_BETWEEN_LINES) >= _SECONDS_BETWEEN_LINES:
                _ended[self._description] = now
                self._write_line(now)
        self._began = self._bar = None

    def _write_line(self, now: float) -> None:
        self._last_line = now
        seconds = now - (now if self._began is None else self._began)
        write_line(f"{self._description}: {self.done} of {self.total} in {seconds:.0f} s")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def write_line(line: str) -> None:
    """Write a line to stderr, above any bars."""
    with contextlib.suppress(OSError):  # stderr may be a broken pipe
        tqdm.write(line, file=sys.stderr)
