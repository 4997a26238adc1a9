"""The model as it stands, saved where mining and measuring load it as mine_hard_neg.py and evaluate.py would.

So the numbers of a run are theirs, in their precision. Beside it are the embeddings that were computed with these
weights: passages that are measured among and mined from are encoded once.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from embedding_finetune.command_line import scratch_error, scratch_folder
from embedding_finetune.distributed import once_per_machine

Write = Callable[[Path], None]
"""Writes the model as it stands into an empty folder."""


class Snapshot(NamedTuple):
    """model: a folder to load. scratch: a folder for embeddings. Both are temporary, on each machine."""

    model: str
    scratch: str


class Snapshots:
    """Saves a model when it is asked for one and the weights are no longer those of the last time."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._last: tuple[Hashable, Snapshot] | None = None
        self.seconds_of_writing = 0.0

    def of(self, version: Hashable) -> Snapshot:
        """The model as it stands. version: what changes when its weights do. All processes call this together."""
        if self._last is None or self._last[0] != version:
            self.forget()
            self._last = version, Snapshot(*once_per_machine(self._taken))
        return self._last[1]

    def forget(self) -> None:
        """Remove what was saved. All processes call this together."""
        if self._last is None:
            return
        folder = Path(self._last[1].model).parent
        self._last = None
        once_per_machine(lambda: shutil.rmtree(folder, ignore_errors=True))

    def _taken(self) -> tuple[str, str]:
        began = time.monotonic()
        try:
            folder = Path(tempfile.mkdtemp(dir=scratch_folder()))
            model, scratch = folder / "model", folder / "embeddings"
            model.mkdir()
            scratch.mkdir()
            self._write(model)
        except (OSError, SafetensorError) as error:
            raise scratch_error(error, "the model to be measured") from error
        self.seconds_of_writing = time.monotonic() - began
        return str(model), str(scratch)
