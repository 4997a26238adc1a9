"""The identity of a text, in several forms, and many texts on disk.

canonical     a string, for comparing a few texts
folded        a string without case and punctuation, for keeping apart what is trained on and what is measured with
text_id       63 bits of the hash of canonical: a number that fits into a tensor, for a batch and for a training set
folded_id     63 bits of the hash of folded
text_digest   128 bits of its hash, for a corpus that holds nothing else: no two of a billion texts share one
raw_digests   128 bits of the hash of a text as it is written, for stored embeddings, which depend on spelling
"""

import copy
import hashlib
import os
import tempfile
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from embedding_finetune.command_line import scratch_error

_BUFFER_BYTES = 2**20
DIGEST_BYTES = 16
"""The size of a digest of text_digest and raw_digests."""
_BETWEEN_WORDS = str.maketrans(dict.fromkeys(".,;:!?'\"()-", " "))

Instructions = Sequence[str | None] | None
"""What stands before each of several texts in place of the instruction that the model or a flag has for them.

None for a text without one of its own, and for texts of which none has one.
"""


def canonical(text: str) -> str:
    """The form in which texts are compared: Unicode NFC, stripped of surrounding whitespace."""
    return unicodedata.normalize("NFC", text).strip()


def folded(text: str) -> str:
    """The form in which texts are the same to a reader: "How do I reset it?" and "how do I  reset it".

    Without case, every run of white space and of . , ; : ! ? ' " ( ) - one space, stripped. Other characters stay:
    `C++` and `C#` are two texts. What would become nothing, such as "?!", keeps its canonical form.

    Texts with one canonical form have one folded form. Case is folded between two normalisations, as the Unicode
    standard has it for caseless matching (section 3.13, D145).
    """
    letters = unicodedata.normalize("NFD", text).casefold().translate(_BETWEEN_WORDS)
    return unicodedata.normalize("NFC", " ".join(letters.split())) or canonical(text)


def text_id(text: str) -> int:
    """A non-negative 63-bit identity of `canonical(text)`, the same in every process and run."""
    return _id(canonical(text))


def folded_id(text: str) -> int:
    """A non-negative 63-bit identity of `folded(text)`, the same in every process and run."""
    return _id(folded(text))


def _id(form: str) -> int:
    return int.from_bytes(hashlib.blake2b(form.encode(), digest_size=8).digest(), "little") >> 1


def text_digest(text: str) -> bytes:
    """16 bytes that stand for `canonical(text)`."""
    return hashlib.blake2b(canonical(text).encode(), digest_size=DIGEST_BYTES).digest()


def raw_digests(texts: Sequence[str], instructions: Instructions = None) -> np.ndarray:
    """Digests (N,) of 16 bytes of the texts as they are written: other spellings may have other tokens.

    A text has another digest with each instruction of its own, also with an empty one.
    """
    return np.array(
        [
            hashlib.blake2b(
                text.encode(),
                digest_size=DIGEST_BYTES,
                key=b"" if instruction is None else hashlib.blake2b(instruction.encode()).digest(),
            ).digest()
            for text, instruction in zip(texts, instructions or [None] * len(texts))
        ],
        dtype="S16",
    )


class TextsOnDisk(Sequence[str]):
    """Texts in a temporary file that ends with the process; memory holds 16 bytes for each.

    The file is read by offset, not mapped: its pages would count as this process's memory. Raises UserError where it
    cannot be written.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # An unnamed file in TMPDIR: the system removes it however the process ends.
        self._file = tempfile.TemporaryFile(buffering=_BUFFER_BYTES)  # noqa: SIM115
        ends = array("q", [0])
        for text in texts:
            ends.append(ends[-1] + self._write(text.encode()))
        try:
            self._file.flush()
        except OSError as error:
            raise scratch_error(error, "texts") from error
        self._starts, self._ends = np.array(ends[:-1]), np.array(ends[1:])

    def _write(self, text: bytes) -> int:
        try:  # of this file alone: the texts come from others, whose errors are not TMPDIR's
            return self._file.write(text)
        except OSError as error:
            raise scratch_error(error, "texts") from error

    def keep(self, indices: np.ndarray) -> None:
        """Forget all texts but those at `indices`, and put these in that order."""
        self._starts, self._ends = self._starts[indices], self._ends[indices]

    def at(self, indices: np.ndarray) -> "TextsOnDisk":
        """The texts at `indices`, in the same file."""
        part = copy.copy(self)
        part.keep(indices)
        return part

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if not isinstance(index, slice):
            start, end = int(self._starts[index]), int(self._ends[index])
            return self._read(start, end).decode()
        starts, ends = self._starts[index].tolist(), self._ends[index].tolist()
        if not starts:
            return []
        first, last = min(starts), max(ends)
        if last - first > _BUFFER_BYTES + 2 * (sum(ends) - sum(starts)):  # far apart
            return [self._read(start, end).decode() for start, end in zip(starts, ends)]
        span = self._read(first, last)
        return [span[start - first : end - first].decode() for start, end in zip(starts, ends)]

    def _read(self, start: int, end: int) -> bytes:
        parts = []
        while start < end:  # one read gives 2 GiB at most
            parts.append(os.pread(self._file.fileno(), end - start, start))
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)
