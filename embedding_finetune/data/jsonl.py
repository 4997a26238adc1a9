"""Reading and writing JSON Lines: every error names `path:line`, and a file appears whole or not at all.

A file may also be one array of objects. Blank lines are skipped, a byte-order mark is accepted. Names that end in `.gz`
are read and written compressed.
"""

import base64
import codecs
import datetime
import decimal
import gzip
import io
import json
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from embedding_finetune.command_line import UserError
from embedding_finetune.files import AnyPath, atomic_writer

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")

_GZIP_MAGIC = b"\x1f\x8b"
"""The first bytes of a gzip file."""
_PART_BYTES = 2**20
_BLANK = re.compile(r"[ \t\n\r]*")
_CUT_CHARACTERS = 16
"""Where the end of a part cuts a value, json sees an error at most so many characters before the end."""


def read(path: AnyPath) -> Iterator[tuple[int, Record]]:
    """Yield (line number from 1, record) for every line of a file that is not blank.

    Of a file that is one array, the line is that where an object begins. Raises UserError when the file is missing,
    unreadable or not UTF-8, and at a line that is not one JSON object.
    """
    line = 0
    try:
        with open_for_reading(path) as file:
            for line, record in (_read_array if _is_array(file) else _read_lines)(path, file):
                yield line, record
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}:{line + 1}: cannot be read: {reason}") from error


def _is_array(file: io.BufferedReader) -> bool:
    """Whether the first character of a file that was just opened is a bracket. Nothing is read: it may be a pipe."""
    return file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _read_lines(path: AnyPath, file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    for line, raw in enumerate(file, start=1):
        record = _parse(path, line, raw)
        if record is not None:
            yield line, record


def _read_array(path: AnyPath, file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    """The objects of one array, with the lines where they begin."""
    text = _Text(path, file)
    text.skip("[")
    while text.next_character() != "]":
        line = text.line
        record = text.take_value()
        yield line, _require_object(path, line, record)
        if text.next_character() == ",":
            text.skip(",")
            if text.next_character() != "]":
                continue
            raise UserError(f"{path}:{text.line}: not valid JSON (a comma before the end of the array)")
        if text.next_character() != "]":
            raise UserError(f"{path}:{text.line}: not valid JSON (expected , or ] after an object)")
    text.skip("]")
    if text.next_character():
        raise UserError(f"{path}:{text.line}: not valid JSON (more text after the end of the array)")


class _Text:
    """The text of a file, of which a part at a time is held."""

    def __init__(self, path: AnyPath, file: IO[bytes]) -> None:
        self.line = 1
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held = ""
        self._position = 0

    def next_character(self) -> str:
        """The next character that is not white space, empty at the end of the file."""
        while True:
            match = _BLANK.match(self._held, self._position)
            self._move_to(match.end() if match else self._position)
            if self._position < len(self._held) or not self._read_more():
                return self._held[self._position : self._position + 1]

    def skip(self, character: str) -> None:
        """Go on after a character that next_character gave."""
        self.next_character()
        self._position += len(character)

    def take_value(self) -> object:
        """The JSON value that begins at the next character."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._position)
            except json.JSONDecodeError as error:
                cut = "Unterminated string" in error.msg or error.pos > len(self._held) - _CUT_CHARACTERS
                if cut and self._read_more():
                    continue
                line = self.line + self._held.count("\n", self._position, error.pos)
                raise UserError(f"{self._path}:{line}: not valid JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self._path}:{self.line}: not valid JSON ({error})") from error
            self._move_to(end)
            return value

    def _move_to(self, position: int) -> None:
        self.line += self._held.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        """Hold as much text again as is held beyond the position, at least a part; whether there was any."""
        left = len(self._held) - self._position
        raw = self._file.read(max(_PART_BYTES, left))
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self.line + self._held.count("\n", self._position) + raw.count(b"\n", 0, error.start)
            raise UserError(f"{self._path}:{line}: not UTF-8; save the file as UTF-8") from error
        self._held, self._position = self._held[self._position :] + more, 0
        return bool(raw)


def write(path: AnyPath, records: Iterable[Record]) -> None:
    """Write records as JSON Lines. A run that is killed leaves the old file or the new one."""
    with atomic_writer(path) as file:
        for record in records:
            file.write(_line_of(record))


def _line_of(record: Record) -> bytes:
    try:
        return _encode(record).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in an unused field: ASCII escapes keep it
        return json.dumps(record, default=_as_json).encode() + b"\n"


def _as_json(value: Any) -> object:
    """What stands for a value of a parquet column that JSON has no type for.

    Dates and times become ISO text, bytes base64, durations seconds, and decimals text, which keeps all their digits.
    """
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"no JSON for a {type(value).__name__}")


_encode = json.JSONEncoder(ensure_ascii=False, default=_as_json).encode
"""json.dumps would make an encoder for each record."""


def open_for_reading(path: AnyPath) -> io.BufferedReader:
    """A file of bytes, unpacked where its name ends in `.gz`. Raises UserError where only its content is compressed."""
    if str(path).lower().endswith(".gz"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(path, "rb")), _PART_BYTES)
    file = open(path, "rb")  # noqa: SIM115
    if file.peek(1).startswith(_GZIP_MAGIC):
        file.close()
        raise UserError(f"{path}: the file is compressed; give it a name that ends in .gz")
    return file


def _parse(path: AnyPath, line: int, raw: bytes) -> Record | None:
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    if not text:
        return None
    try:
        record, end = _DECODER.raw_decode(text)
        if end < len(text):
            _DECODER.decode(text)  # says what is wrong
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 column", "column")  # json counts lines within this one
        raise UserError(f"{path}:{line}: not valid JSON ({reason}); expected one object per line") from error
    return _require_object(path, line, record)


def _require_object(path: AnyPath, line: int, record: object) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"{path}:{line}: a JSON {type(record).__name__}, expected an object")
    return record


def _without_repeated_names(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'"{repeated}" is there twice')
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeated_names)
