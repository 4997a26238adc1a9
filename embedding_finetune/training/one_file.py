"""Batches that hold rows of one file only, for --one_file_per_batch.

Negatives of a query are then passages of its own file: of its task, language or customer. A batch is what shares
negatives: the rows of all processes in one micro-batch.

Shapes: R rows, n rows of a batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from embedding_finetune.training.batches import Draw, EpochSampler, Key


class OneFileSampler(EpochSampler):
    """As EpochSampler, but in batches of one file each, drawn in proportion to the files' rows.

    A file's rows are cut into as few batches as can hold them, whose sizes differ by one at most; with drop_last into
    full ones, and what is left is not used in this epoch. The order of all batches is random. It depends on the size of
    a batch, and not on the number of processes that share it.

    Every batch takes up per_process * processes places, so that whoever cuts the places into micro-batches, deals them
    out to processes or skips some of them finds whole batches. A batch of fewer rows is dealt out evenly, and the other
    places are None. Where processes get unequal shares, each weighs its loss by its share: their mean is that of one
    process with all rows.

    files: (R,), the number of each row's file.
    """

    def __init__(
        self, files: np.ndarray, *, per_process: int, processes: int, drop_last: bool = False, **options: Any
    ) -> None:
        super().__init__(len(files), **options)
        self.files = files
        self.per_process = per_process
        self.processes = processes
        self.drop_last = drop_last

    @property
    def batch_size(self) -> int:
        """The rows of a full batch."""
        return self.per_process * self.processes

    def __len__(self) -> int:
        return sum(self._count_batches(rows) for rows in np.bincount(self.files).tolist()) * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        batches = self.batches()
        return (place for batch in batches for place in self._places(batch))

    def batches(self) -> list[np.ndarray]:
        """The batches of the epoch, each (n,) row numbers."""
        rng = self.rng()
        order = self.order(rng)
        by_file = order[np.argsort(self.files[order], kind="stable")]  # (R,)
        batches = []
        for rows in np.split(by_file, np.cumsum(np.bincount(self.files))[:-1]):
            count = self._count_batches(len(rows))
            if count:
                batches += np.array_split(rows[: count * self.batch_size], count)
        return [batches[number] for number in rng.permutation(len(batches))] if self.shuffle else batches

    def _count_batches(self, rows: int) -> int:
        """How many batches a file of so many rows is cut into."""
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def _places(self, batch: np.ndarray) -> Iterator[Key]:
        """The places that a batch takes up, those of the first process first."""
        rows, count = batch.tolist(), len(batch)
        for process in range(self.processes):
            share = rows[count * process // self.processes : count * (process + 1) // self.processes]
            weight = len(share) * self.processes / count
            # A process without a share takes part with a row that weighs nothing.
            yield from (Draw(self.epoch, index, weight) for index in share or rows[:1])
            yield from [None] * (self.per_process - max(len(share), 1))
