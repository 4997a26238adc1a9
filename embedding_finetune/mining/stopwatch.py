"""How long each part of a run takes."""

import time
from collections import defaultdict


class Stopwatch:
    """Runs from the moment it is made; `seconds` holds the time spent on each kind of work, by name.

    A lap takes all the time since the lap before it, so the laps add up to the whole run.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.monotonic()

    @property
    def total(self) -> float:
        """Seconds of all laps."""
        return sum(self.seconds.values())

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.monotonic()
        self.seconds[name] += now - self._last
        self._last = now
