"""Embeddings kept on disk between runs, found again by text, model and settings.

A store is a folder for one model and one set of settings. It holds

    settings.json   what decides an embedding; every run that opens the store writes it anew, so its age is the store's
    model.txt       the name of the model that was last used with it, for people; copies of a model share a store
    *.segment       the embeddings, see segments.py

Other processes may write, merge and remove segments at any time.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from embedding_finetune import process
from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.data.texts import Instructions, raw_digests
from embedding_finetune.distributed import process_rank
from embedding_finetune.files import AnyPath, atomic_writer
from embedding_finetune.retrieval.segment_index import SegmentIndex
from embedding_finetune.retrieval.segments import (
    MOST_SMALL,
    SMALL,
    DamagedError,
    FileIdentity,
    ForeignError,
    Segment,
    check,
    count_texts,
    file_at,
    is_gone,
    merge_small,
    read_digests,
    read_rows,
    remove_damaged,
    write_segment,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FORMAT = 2
_FLAG = "--embeddings_dir"
_LOOKS = 3
"""How often to look again for segments that went while they were looked at."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
"""What a killed atomic_writer leaves."""
_SEGMENT = re.compile(r"[0-9a-f]{32}\.segment")
_STALE_SECONDS = 24 * 3600
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_told_of: set[str] = set()
"""Folders that cannot be written, which the user was told of."""


def make_root(root: AnyPath) -> None:
    """Create the folder of --embeddings_dir where it is not there. Raises UserError where it cannot be."""
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise UserError(f"{_FLAG} {root}: cannot be created: {error.strerror}; give another folder") from error


class EmbeddingStore:
    """The embeddings of one model, pooling, dtype, length and instruction, by text and the instruction of its own.

    root: the folder of --embeddings_dir, or with is_scratch a folder in TMPDIR. settings: everything that decides an
    embedding, the weights' digest included; different settings have different stores. model: its name, for people.

    Where root is there but it or the store's folder in it cannot be written, what is there is read and nothing is kept.
    Raises UserError where root cannot be made, or its disk is full.
    """

    def __init__(
        self,
        root: AnyPath,
        settings: Mapping[str, object],
        *,
        dimensions: int,
        model: str = "",
        is_scratch: bool = False,
    ) -> None:
        text = json.dumps({"format": _FORMAT, **settings}, indent=2, sort_keys=True)
        self.folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.dimensions = dimensions
        self.is_scratch = is_scratch
        self._name = "TMPDIR" if is_scratch else _FLAG  # what the user has to change after an error
        self._keeps = True
        self._left_out: dict[Path, FileIdentity | None] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, content in (("settings.json", text), ("model.txt", model)):
                if content:
                    with atomic_writer(self.folder / name) as file:
                        file.write(content.encode() + b"\n")
            _remove_stale(self.folder)
        except (OSError, UserError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            if not (isinstance(reason, OSError) and reason.errno in _READ_ONLY and os.path.isdir(root)):
                raise UserError(f"{self._name} {root}: cannot be written: {first_line(error)}") from error
            self._keeps = False
            # Where root cannot be written either, that has to change first, and is told once for all models.
            is_ours = os.path.isdir(self.folder) and os.access(root, os.W_OK)
            _tell_that_it_is_read_only(self._name, self.folder if is_ours else root, reason)
        self.refresh()

    @property
    def outlives_the_run(self) -> bool:
        """Whether what is put here is of use to another run."""
        return self._keeps and not self.is_scratch

    def refresh(self) -> None:
        """Look for segments that this process or another has written since."""
        for path, file in list(self._left_out.items()):
            if file_at(path) not in (None, file):  # another process has written it anew
                self._left_out.pop(path, None)
        for _ in range(_LOOKS):
            listed = self._segments()
            there = list(self._read_each(listed, read_digests))
            if len(there) == len({*listed} - self._left_out.keys()):
                break  # else some were merged meanwhile, into one that may not have been listed
        self._index = SegmentIndex.of(there)
        self._small = sum(len(digests) < SMALL for _, digests in there)

    def _segments(self) -> list[Path]:
        # No pipe, which would be waited for, and no file of the user's, which would be taken for a damaged segment.
        try:
            return sorted(
                Path(entry.path)
                for entry in os.scandir(self.folder)
                if _SEGMENT.fullmatch(entry.name) and entry.is_file()
            )
        except OSError as error:
            if is_gone(error):  # it was pruned
                return []
            raise UserError(
                f"{self._name}: {self.folder} cannot be listed: {error.strerror}; give another folder"
            ) from error

    def get(self, texts: Sequence[str], instructions: Instructions = None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (N, H) of texts, and which texts are stored: (N,) bool."""
        embeddings = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        is_stored = np.zeros(len(texts), dtype=bool)
        if len(self._index.digests):
            wanted = raw_digests(texts, instructions)
            for _ in range(_LOOKS):
                if self._look_up(wanted, embeddings, is_stored):
                    break
                self.refresh()  # another process has merged segments
        return embeddings, is_stored

    def keep(self, digests: np.ndarray, embeddings: np.ndarray) -> Path | None:
        """Keep the embeddings (n, H) of texts with these raw_digests (n,) as one segment. Gives its path, if any.

        Raises UserError when they cannot be written; into a temporary folder nothing more is written then.
        """
        if not len(digests) or not self._keeps:
            return None
        try:
            path = write_segment(self.folder, digests, embeddings)
        except UserError as error:
            if not self.is_scratch:
                raise UserError(f"{_FLAG}: {error}") from error
            # They are encoded again where they are needed again.
            logger.warning("warning: TMPDIR: %s: embeddings are not kept", error)
            self._keeps = False
            return None
        self._left_out.pop(path, None)
        self._small += len(digests) < SMALL
        return path

    def tidy(self) -> None:
        """Merge small segments if there are many: parts of blocks of killed runs, or a few queries each."""
        if not self._keeps or self._small <= MOST_SMALL:
            return
        segments = itertools.starmap(Segment, self._read_each(self._segments(), count_texts))
        # Another process merges them, or the disk is full: then they stay as they are.
        with contextlib.suppress(UserError, OSError):
            merge_small(list(segments), self.dimensions, self._leave_out)
        self._small = 0  # as far as this process can help it

    def remove(self, path: Path, count: int) -> None:
        """Remove a segment of so many texts, all of which are in another one."""
        self._small -= count < SMALL
        with contextlib.suppress(OSError):  # then they are there twice
            path.unlink(missing_ok=True)

    def _read_each(self, paths: Sequence[Path], read: Callable[[Path, int], T]) -> Iterator[tuple[Path, T]]:
        """What `read` says of each segment that is there and sound, as far as it can tell."""
        for path in paths:
            if path not in self._left_out:
                try:
                    yield path, read(path, self.dimensions)
                except (DamagedError, ForeignError, OSError) as error:
                    self._leave_out(path, error)

    def _look_up(self, wanted: np.ndarray, embeddings: np.ndarray, is_stored: np.ndarray) -> bool:
        """Fill in what is there of the texts that are not stored yet. Gives whether no segment was gone."""
        index, nothing_gone = self._index, True  # another thread may look for segments
        rows = np.flatnonzero(~is_stored)
        for path, matches, their_rows in index.places(wanted[rows]):
            if path in self._left_out:
                continue
            try:
                if path not in index.checked:
                    check(path)
                    index.checked.add(path)
                embeddings[rows[matches]] = read_rows(path, their_rows, self.dimensions)
                is_stored[rows[matches]] = True
            except (DamagedError, ForeignError, OSError) as error:
                self._leave_out(path, error)
                nothing_gone = nothing_gone and not (isinstance(error, OSError) and is_gone(error))
        return nothing_gone

    def _leave_out(self, path: Path, error: Exception) -> None:
        """Say that a segment is damaged, and remove it; or why else it is not read, and leave it."""
        if isinstance(error, OSError) and is_gone(error):
            return
        why = "was written for another folder" if isinstance(error, ForeignError) else "is damaged"
        if isinstance(error, OSError):
            why = f"cannot be read ({error.strerror})"
        logger.warning("warning: %s: %s %s; its texts are encoded again", self._name, path, why)
        self._left_out[path] = error.file if isinstance(error, DamagedError) else file_at(path)
        if isinstance(error, DamagedError):
            with contextlib.suppress(OSError):  # on a read-only disk for instance
                remove_damaged(path, error.file)


def tell_size(root: AnyPath | None) -> None:
    """Log how large the folder of --embeddings_dir is; under torchrun the first process does."""
    if root is None or not os.path.isdir(root) or process_rank() != 0:
        return
    files, size = 0, 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):  # another process has merged it
                size += os.stat(os.path.join(folder, name)).st_size
                files += 1
    logger.info("%s %s holds %.1f MB in %d files", _FLAG, root, size / 1e6, files)


def _tell_that_it_is_read_only(name: str, folder: AnyPath, error: OSError) -> None:
    """Say it once: a run opens several stores in one folder."""
    if str(folder) not in _told_of:
        _told_of.add(str(folder))
        process.put_back.callback(_told_of.discard, str(folder))
        logger.warning(
            "warning: %s %s: cannot be written (%s): what is there is read, nothing new is kept",
            name,
            folder,
            error.strerror,
        )


def _remove_stale(folder: Path) -> None:
    """Remove what killed writers left. A running one finishes its file within seconds, but clocks may differ."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and path.stat().st_mtime < time.time() - _STALE_SECONDS:
                path.unlink()
