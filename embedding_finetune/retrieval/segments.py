"""Segments: the files of an embedding store, and how many small ones become few.

A segment holds some thousand texts' embeddings:

    checksum of the rest (4 bytes) | store (16) | texts n (8) | dimensions H (8) | digests (n * 16) |
    embeddings (n * H float32)

It appears whole, by renaming. Its name is a digest of its texts, so two processes that keep the same texts write the
same file. `store` is a digest of its folder's name, which stands for the store's settings: a segment that somebody puts
into the folder of another model is not read there, and stays.

A segment may go at any moment: another process has merged it into a larger one. Who reads one that is gone gets an
OSError for which `is_gone` holds, and looks again at what there is.
"""

import contextlib
import errno
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from embedding_finetune.data.texts import DIGEST_BYTES
from embedding_finetune.files import atomic_writer

_CHECKSUM, _STORE_AND_SIZES = struct.Struct("<I"), struct.Struct("<16sQQ")
_HEADER_BYTES = _CHECKSUM.size + _STORE_AND_SIZES.size
_READ_BYTES = 2**20

TEXTS_PER_SEGMENT = 8192
"""The most that merging puts into one: it has them in memory."""
SMALL = TEXTS_PER_SEGMENT // 2
"""Segments of fewer texts are merged. Any two of them fit into one: afterwards one at most is small."""
MOST_SMALL = 32
"""So many may lie there. Each costs the start of a run a file to open."""


LeaveOut = Callable[[Path, Exception], None]
"""Is told of a segment that is damaged or cannot be read, and why."""


class FileIdentity(NamedTuple):
    """What tells a file from one that has its path later. Its inode may be used again, so the time is part of it."""

    device: int
    inode: int
    size: int
    modified_ns: int


class DamagedError(Exception):
    """A segment is cut short, or a bit of it has flipped."""

    file: FileIdentity | None = None
    """The file that was read, which may no longer be the one at its path."""


class ForeignError(Exception):
    """A segment is of another store, and somebody has put it here."""


class Segment(NamedTuple):
    """A segment's file, and how many texts it holds."""

    path: Path
    texts: int


def is_gone(error: OSError) -> bool:
    """Whether a file was removed meanwhile; over NFS that may be told as a stale handle."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


def file_at(path: Path) -> FileIdentity | None:
    """Which file is at a path; None where none can be opened."""
    # Opened, not just looked at: NFS asks its server then, while it may answer a stat from what it knew seconds ago.
    try:
        with path.open("rb") as file:
            return _identity(file)
    except OSError:
        return None


def remove_damaged(path: Path, damaged: FileIdentity | None) -> None:
    """Remove a damaged segment, unless there is another file in its place by now. Raises OSError.

    One that another process puts there in the moment between the look and the removal still goes, and its texts are
    encoded again: only a lock could exclude that.
    """
    if damaged is not None and file_at(path) == damaged:
        path.unlink(missing_ok=True)


def write_segment(folder: Path, digests: np.ndarray, embeddings: np.ndarray) -> Path:
    """Write the embeddings (n, H) of texts with these digests (n,). Raises UserError when it cannot be written."""
    raw = digests.tobytes()
    head = _STORE_AND_SIZES.pack(_digest_of(folder), len(digests), embeddings.shape[1])
    vectors = np.ascontiguousarray(embeddings, dtype="<f4").data
    checksum = zlib.crc32(vectors, zlib.crc32(raw, zlib.crc32(head)))
    path = folder / (hashlib.blake2b(raw, digest_size=16).hexdigest() + ".segment")
    with atomic_writer(path) as file:
        for part in (_CHECKSUM.pack(checksum), head, raw, vectors):
            file.write(part)
    return path


def count_texts(path: Path, dimensions: int) -> int:
    """How many texts a segment holds. Raises ForeignError, and DamagedError where its size is not the header's."""
    with _opened(path) as file:
        return _count(path, file, dimensions)


def read_digests(path: Path, dimensions: int) -> np.ndarray:
    """The digests (n,) of a segment. Raises as count_texts does."""
    with _opened(path) as file:
        count = _count(path, file, dimensions)
        return np.frombuffer(file.read(count * DIGEST_BYTES), dtype="S16")


def check(path: Path) -> None:
    """Raise DamagedError unless a segment's checksum is right."""
    with _opened(path) as file:
        head, checksum = file.read(_CHECKSUM.size), 0
        while part := file.read(_READ_BYTES):
            checksum = zlib.crc32(part, checksum)
        if head != _CHECKSUM.pack(checksum):
            raise DamagedError


def read_rows(path: Path, rows: np.ndarray, dimensions: int) -> np.ndarray:
    """The embeddings (len(rows), H) of some rows of a segment. Adjacent rows are read together."""
    order = np.argsort(rows, kind="stable")
    result = np.empty((len(rows), dimensions), dtype=np.float32)
    with _opened(path) as file:
        count, row_bytes = _count(path, file, dimensions), 4 * dimensions
        vectors_at = _HEADER_BYTES + count * DIGEST_BYTES
        for run in np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1):
            raw = os.pread(file.fileno(), len(run) * row_bytes, vectors_at + int(rows[run[0]]) * row_bytes)
            if len(raw) < len(run) * row_bytes:
                raise DamagedError
            result[run] = np.frombuffer(raw, dtype="<f4").reshape(len(run), dimensions)
    return result


def merge_small(segments: Sequence[Segment], dimensions: int, leave_out: LeaveOut) -> None:
    """Merge the small ones among segments of one folder; what they hold stays there at every moment.

    Raises OSError where another process has merged them meanwhile (`is_gone`), and UserError where the disk is full;
    nothing is lost then.

    Several processes may merge at once. A segment is removed only when one with all its texts lies there. Merged ones
    are sorted by digest, so two with the same texts are one file: no two processes remove each the other's.
    """
    group: list[Segment] = []
    for segment in sorted((s for s in segments if s.texts < SMALL), key=lambda s: (s.texts, s.path)):
        if sum(s.texts for s in group) + segment.texts > TEXTS_PER_SEGMENT:
            _merge(group, dimensions, leave_out)
            group = []
        group.append(segment)
    _merge(group, dimensions, leave_out)


def _merge(group: Sequence[Segment], dimensions: int, leave_out: LeaveOut) -> None:
    sources, digests, embeddings = [], [], []
    for path, _ in group:
        try:
            check(path)
            of_texts = read_digests(path, dimensions)
            vectors = read_rows(path, np.arange(len(of_texts)), dimensions)
        except (DamagedError, ForeignError, OSError) as error:
            if isinstance(error, OSError) and is_gone(error):
                raise
            leave_out(path, error)
            continue
        sources.append(path)
        digests.append(of_texts)
        embeddings.append(vectors)
    if len(sources) < 2:
        return
    distinct, rows = np.unique(np.concatenate(digests), return_index=True)
    merged = write_segment(sources[0].parent, distinct, np.concatenate(embeddings)[rows])
    for path in sources:
        if path != merged:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A segment to read. A DamagedError says which file it was."""
    with path.open("rb") as file:
        identity = _identity(file)  # before reading: one that changes meanwhile is not the one that was read
        try:
            yield file
        except DamagedError as error:
            error.file = identity
            raise


def _identity(file: BinaryIO) -> FileIdentity:
    status = os.fstat(file.fileno())
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _digest_of(folder: Path) -> bytes:
    return hashlib.blake2b(folder.name.encode(), digest_size=16).digest()


def _count(path: Path, file: BinaryIO, dimensions: int) -> int:
    """How many texts an open segment holds; the file is left at its digests."""
    header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise DamagedError
    store, count, width = _STORE_AND_SIZES.unpack(header[_CHECKSUM.size :])
    if store != _digest_of(path.parent):
        raise ForeignError
    size = _HEADER_BYTES + count * (DIGEST_BYTES + 4 * width)
    if not count or width != dimensions or os.fstat(file.fileno()).st_size != size:
        raise DamagedError
    return count
