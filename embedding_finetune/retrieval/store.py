"""Embeddings kept on disk between runs, found again by text, model and settings.

A store is a folder for one model and one set of settings. It holds segments of a few thousand texts. A segment is

    checksum (4 bytes) | texts n (8) | dimensions H (8) | digests (n * 16) | embeddings (n * H float32)

and appears whole, by renaming. Its name is a digest of its texts, so two processes that encode the same texts write
the same file. The checksum covers everything after it, and is checked before the segment is first used.
"""

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.data.texts import DIGEST_BYTES, Instructions, raw_digests
from embedding_finetune.files import AnyPath, atomic_writer

logger = logging.getLogger(__name__)

_CHECKSUM, _SIZES = struct.Struct("<I"), struct.Struct("<QQ")
_HEADER_BYTES = _CHECKSUM.size + _SIZES.size
_FORMAT = 1


class EmbeddingStore:
    """The embeddings of one model, pooling, dtype, length and instruction, by text and the instruction of its own.

    root: the folder of --embeddings_dir, or with is_scratch a folder in TMPDIR. settings: everything that decides an
    embedding, the weights' digest included; different settings have different stores. Raises UserError where the folder
    cannot be written.
    """

    def __init__(
        self,
        root: AnyPath,
        settings: Mapping[str, object],
        *,
        dimensions: int,
        is_scratch: bool = False,
    ) -> None:
        text = json.dumps({"format": _FORMAT, **settings}, indent=2, sort_keys=True)
        self.folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.dimensions = dimensions
        self.is_scratch = is_scratch
        self._is_full = False
        self._name = "TMPDIR" if is_scratch else "--embeddings_dir"  # what the user has to change after an error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_writer(self.folder / "settings.json") as file:
                file.write(text.encode() + b"\n")
        except (OSError, UserError) as error:
            raise UserError(f"{self._name} {root}: cannot be written: {first_line(error)}") from error
        self.refresh()

    def refresh(self) -> None:
        """Look for segments that this process or another has written since."""
        self._segments = [path for path in sorted(self.folder.glob("*.segment")) if self._is_complete(path)]
        self._checked: set[int] = set()
        self._damaged: set[int] = set()
        self._index()

    def get(self, texts: Sequence[str], instructions: Instructions = None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (N, H) of texts, and which texts are stored: (N,) bool."""
        embeddings = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        is_stored = np.zeros(len(texts), dtype=bool)
        if not len(self._digests):
            return embeddings, is_stored
        wanted = raw_digests(texts, instructions)
        places = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        matches = np.flatnonzero(self._digests[places] == wanted)
        segments, rows = self._segment_of[places[matches]], self._row_of[places[matches]]
        for segment in np.unique(segments):
            here = segments == segment
            if self._is_sound(segment):
                embeddings[matches[here]] = self._read(segment, rows[here])
                is_stored[matches[here]] = True
        return embeddings, is_stored

    def put(self, texts: Sequence[str], embeddings: np.ndarray, instructions: Instructions = None) -> None:
        """Keep the embeddings (n, H) of texts as one segment.

        Raises UserError when they cannot be written; into a temporary folder nothing more is written then.
        """
        if not len(texts) or self._is_full:
            return
        digests = raw_digests(texts, instructions).tobytes()
        sizes = _SIZES.pack(len(texts), embeddings.shape[1])
        vectors = np.ascontiguousarray(embeddings, dtype="<f4").data
        checksum = zlib.crc32(vectors, zlib.crc32(digests, zlib.crc32(sizes)))
        name = hashlib.blake2b(digests, digest_size=16).hexdigest() + ".segment"
        try:
            with atomic_writer(self.folder / name) as file:
                for part in (_CHECKSUM.pack(checksum), sizes, digests, vectors):
                    file.write(part)
        except UserError as error:
            if not self.is_scratch:
                raise UserError(f"--embeddings_dir: {error}") from error
            # They are encoded again where they are needed again.
            logger.warning("warning: TMPDIR: %s: embeddings are not kept", error)
            self._is_full = True

    def _is_complete(self, path: Path) -> bool:
        """Whether a segment has the size that its header says; any other is removed."""
        try:
            with path.open("rb") as file:
                count, dimensions = _read_sizes(file)
            expected = _HEADER_BYTES + count * (DIGEST_BYTES + 4 * dimensions)
            complete = dimensions == self.dimensions and path.stat().st_size == expected
        except (OSError, struct.error):
            complete = False
        if not complete:
            self._discard(path)
        return complete

    def _index(self) -> None:
        """Sort the digests of all segments for searching, with the segment and the row of each."""
        digests, segments, rows = [np.empty(0, "S16")], [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        for number, path in enumerate(self._segments):
            with path.open("rb") as file:
                count, _ = _read_sizes(file)
                digests.append(np.frombuffer(file.read(count * DIGEST_BYTES), dtype="S16"))
            segments.append(np.full(count, number, dtype=np.int32))
            rows.append(np.arange(count, dtype=np.int32))
        all_digests = np.concatenate(digests)
        order = np.argsort(all_digests, kind="stable")
        self._digests = all_digests[order]
        self._segment_of, self._row_of = np.concatenate(segments)[order], np.concatenate(rows)[order]

    def _is_sound(self, segment: int) -> bool:
        """Whether a segment's checksum is right, checked at its first use. A damaged segment is removed."""
        path = self._segments[segment]
        if segment in self._checked:
            return segment not in self._damaged
        self._checked.add(segment)
        try:
            with path.open("rb") as file:
                expected, checksum = _CHECKSUM.unpack(file.read(_CHECKSUM.size))[0], 0
                while part := file.read(2**20):
                    checksum = zlib.crc32(part, checksum)
        except (OSError, struct.error):
            expected, checksum = 0, None  # the file is gone since it was listed
        if checksum != expected:
            self._discard(path)
            self._damaged.add(segment)
        return checksum == expected

    def _read(self, segment: int, rows: np.ndarray) -> np.ndarray:
        """Rows of a segment: (len(rows), H). Adjacent rows are read together."""
        order = np.argsort(rows, kind="stable")
        result = np.empty((len(rows), self.dimensions), dtype=np.float32)
        with self._segments[segment].open("rb") as file:
            count, _ = _read_sizes(file)
            vectors_at, row_bytes = _HEADER_BYTES + count * DIGEST_BYTES, 4 * self.dimensions
            for run in np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1):
                raw = os.pread(file.fileno(), len(run) * row_bytes, vectors_at + int(rows[run[0]]) * row_bytes)
                result[run] = np.frombuffer(raw, dtype="<f4").reshape(len(run), self.dimensions)
        return result

    def _discard(self, path: Path) -> None:
        logger.warning("warning: %s: %s is damaged; its texts are encoded again", self._name, path)
        path.unlink(missing_ok=True)


def _read_sizes(file: BinaryIO) -> tuple[int, int]:
    """A segment's number of texts and of dimensions. The file is left at its digests."""
    file.seek(_CHECKSUM.size)
    count, dimensions = _SIZES.unpack(file.read(_SIZES.size))
    return count, dimensions
