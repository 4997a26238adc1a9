"""The corpus: distinct texts, or documents with ids, by position."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir
from embedding_finetune.data.records import read_passages
from embedding_finetune.data.texts import (
    DIGEST_BYTES,
    TextsOnDisk,
    canonical,
    raw_digests,
    text_digest,
)
from embedding_finetune.files import AnyPath

_TEXTS_PER_READ = 1000


class Corpus:
    """Distinct texts in first-seen order; texts with the same canonical form count as one.

    `texts[p]` is the text at position p as it was first written; `duplicates` counts the repeats. Texts stay on disk.
    They are compared by 128-bit digests, and memory holds one digest for each text. Texts that only `beyond` holds get
    positions from len(corpus) on: they can be scored, but not retrieved.
    """

    def __init__(self, texts: Iterable[str], beyond: Iterable[str] = ()) -> None:
        digests = bytearray()
        sizes = []

        def digested() -> Iterable[str]:
            for part in (texts, beyond):
                for text in part:
                    digests.extend(text_digest(text))
                    yield text
                sizes.append(len(digests) // DIGEST_BYTES)

        self.texts = TextsOnDisk(digested())
        self._digests, first_seen = np.unique(np.frombuffer(digests, dtype="S16"), return_index=True)
        self._size = int((first_seen < sizes[0]).sum())
        self.duplicates = sizes[0] - self._size
        order = np.argsort(first_seen)
        self.texts.keep(first_seen[order])
        self._positions = np.empty_like(order)  # of the sorted digests
        self._positions[order] = np.arange(len(order))
        self._docid_digits = len(str(self._size))

    def __len__(self) -> int:
        return self._size

    def digest(self) -> str:
        """A hash of all texts, whatever their order."""
        return hashlib.blake2b(self._digests.tobytes(), digest_size=DIGEST_BYTES).hexdigest()

    def digest_in_order(self) -> str:
        """A hash of all texts and of their positions."""
        digests = np.empty_like(self._digests)
        digests[self._positions] = self._digests
        return hashlib.blake2b(digests.tobytes(), digest_size=DIGEST_BYTES).hexdigest()

    def positions(self, texts: Sequence[str]) -> np.ndarray:
        """The position of each text, -1 for a text that is not here: (len(texts),) int64."""
        wanted = np.array([text_digest(text) for text in texts], dtype="S16")
        if not len(self._digests) or not len(wanted):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        return np.where(self._digests[places] == wanted, self._positions[places], -1)

    def positions_of_all(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Canonical text -> the positions that have it, one each, for those of the texts that are here."""
        return {
            canonical(text): [position]
            for text, position in zip(texts, self.positions(texts).tolist())
            if 0 <= position < len(self)
        }

    def docid(self, position: int) -> str:
        """A position, zero-padded so that docids sort as positions do; `missing12` from len(corpus) on."""
        return str(position).zfill(self._docid_digits) if position < self._size else f"missing{position}"


class Documents:
    """The documents of a BEIR corpus, each with an id, in ascending order of ids, whatever the order of the file.

    `texts[p]` is the text at position p. Documents without text have positions from len(documents) on: they may be
    right answers, and cannot be found. `distinct` (M,): the positions whose text no later document has. `text_numbers`
    (N,): for each document, the place of its text among these. `duplicates` counts the other documents.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ids: list[str] = []
        empty: list[str] = []
        digests = bytearray()

        def texts() -> Iterable[str]:
            for name, text in beir.read_documents(path):
                (ids if text else empty).append(name)
                if text:
                    digests.extend(raw_digests([text]).tobytes())
                    yield text

        self.texts = TextsOnDisk(texts())
        if not ids:
            raise UserError(f"{path}: no document has a title or a text")
        beir.log_skipped(path, len(empty))
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__))
        self.texts.keep(order)
        self.ids = [*(ids[number] for number in order.tolist()), *sorted(empty)]
        _, last, numbers = np.unique(
            np.frombuffer(digests, dtype="S16")[order][::-1], return_index=True, return_inverse=True
        )
        last = len(order) - 1 - last  # of each text, by digest
        self.distinct = np.sort(last)
        self.text_numbers = np.searchsorted(self.distinct, last[numbers[::-1]])
        self.duplicates = len(order) - len(last)

    def __len__(self) -> int:
        return len(self.texts)

    def positions_of_all(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Canonical text -> the positions of the documents that have it, for those of the texts that are here."""
        wanted = {text_digest(text): canonical(text) for text in texts}
        found: dict[str, list[int]] = {}
        for start in range(0, len(self), _TEXTS_PER_READ):
            for place, text in enumerate(self.texts[start : start + _TEXTS_PER_READ]):
                if (name := wanted.get(text_digest(text))) is not None:
                    found.setdefault(name, []).append(start + place)
        return found

    def docid(self, position: int) -> str:
        """The id of the document at a position."""
        return self.ids[position]


def read_corpus(path: AnyPath, columns: Sequence[str] = ()) -> Corpus | Documents:
    """The passages to search in: the distinct texts of a file, or all documents of a BEIR folder."""
    return Documents(beir.corpus_file(path)) if beir.is_beir(path) else Corpus(read_passages(path, columns))
