"""How far a run is, on stderr: a bar in a terminal; elsewhere, under nohup for instance, a plain line now and then."""

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
"""Description -> when the last line about the end of such work was written."""


class Progress:
    """Counts what is done of a total of items, named by `unit`.

    Nothing is shown before `show` or the first `update`, so that work that was done earlier stays quiet. In a terminal
    that is tqdm's bar. Elsewhere it is a line at most every 30 s and one at the end. Work that comes in many short
    pieces of one description has such an end at most every 30 s, too; passing work (leave False) and work that failed
    have none. disable, and the environment's TQDM_DISABLE, show nothing.
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
        """Begin to show it."""
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

    def skip(self, count: int) -> None:
        """Count items that there was nothing to do for."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def update(self, count: int) -> None:
        """Count items that are done now."""
        self.show()
        self.skip(count)
        if self._began is not None and self._bar is None:
            now = self._clock()
            if now - self._last_line >= _SECONDS_BETWEEN_LINES and self.done < self.total:
                self._write_line(now)

    def close(self, *, failed: bool = False) -> None:
        """Show the end."""
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
    """Write a line to stderr, above the bars where there are any."""
    with contextlib.suppress(OSError):  # stderr may be a broken pipe
        tqdm.write(line, file=sys.stderr)
