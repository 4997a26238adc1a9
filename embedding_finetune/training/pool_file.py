"""The embeddings of a pool in a temporary file that all processes of a machine share.

It is read by offset, not mapped: its pages would count as each process's memory. The system keeps in memory what it has
room for.

Shapes: N passages, n of them at a time, H dimensions.
"""

import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from embedding_finetune.command_line import scratch_folder

_BYTES_AT_ONCE = 2**30
"""The system reads and writes 2 GiB at most."""

_ROWS_AT_ONCE = 2**16


class PoolFile:
    """Embeddings (N, H) float32; it is indexed as a tensor is, by a slice or by places (n,), and gives a tensor (n, H).

    path: a file of `new_file`, which each process opens for itself.
    """

    def __init__(self, path: str, shape: tuple[int, int]) -> None:
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return self.shape[0] * self._row

    @property
    def _row(self) -> int:
        return 4 * self.shape[1]

    def __getitem__(self, index: slice | np.ndarray) -> Tensor:
        if isinstance(index, slice):
            first, stop, _ = index.indices(len(self))
            block = np.empty((max(stop - first, 0), self.shape[1]), dtype=np.float32)
            self._read(block, first)
            return torch.from_numpy(block)
        rows = np.empty((len(index), self.shape[1]), dtype=np.float32)
        for first, last in _runs(index):
            self._read(rows[first:last], int(index[first]))
        return torch.from_numpy(rows)

    def on(self, device: torch.device) -> Tensor:
        """All embeddings on a device, without a copy of them all on the way: (N, H)."""
        whole = torch.empty(self.shape, device=device)
        for first in range(0, len(self), _ROWS_AT_ONCE):
            whole[first : first + _ROWS_AT_ONCE] = self[first : first + _ROWS_AT_ONCE].to(device)
        return whole

    def write(self, first: int, block: np.ndarray) -> None:
        """Put a block (n, H) float32 at a place."""
        content = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        self._file.seek(first * self._row)
        while len(content):
            content = content[self._file.write(content[:_BYTES_AT_ONCE].data) :]

    def _read(self, rows: np.ndarray, first: int) -> None:
        """Fill contiguous rows (n, H) with those from a place on."""
        content = rows.reshape(-1).view(np.uint8)
        self._file.seek(first * self._row)
        while len(content):
            read = self._file.readinto(content[:_BYTES_AT_ONCE].data)
            if not read:
                raise OSError(f"the file of embeddings has become shorter than {self.nbytes} bytes")
            content = content[read:]


def _runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where stretches of consecutive places begin and end."""
    if not len(places):
        return
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)])


def new_file(size: int) -> str:
    """A file of so many bytes, for which there is room: that is known before an hour of encoding, not after it."""
    descriptor, path = tempfile.mkstemp(dir=scratch_folder())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    finally:
        os.close(descriptor)
    return path
