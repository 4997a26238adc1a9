"""Reading and writing JSON Lines: every error names `path:line`, and a file appears whole or not at all.

Readers yield one validated record per line. They skip blank lines and accept a byte-order mark. Names that end in `.gz`
are read and written compressed.
"""

import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from embedding_finetune.command_line import UserError
from embedding_finetune.files import AnyPath, atomic_writer

logger = logging.getLogger(__name__)

Record = dict[str, Any]

DATA_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SCORE_FIELDS = ("pos_scores", "neg_scores")

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
"""Scores are held as float32."""
_GZIP_MAGIC = b"\x1f\x8b"
"""The first bytes of a gzip file."""
_SHOWN_CHARACTERS = 20
_SHOWN_FIELDS = 10
"""In one log line."""


def read_training_rows(
    path: AnyPath, *, scores_required: bool = False, known: Iterable[str] = (), unused: str = "ignored"
) -> Iterator[Record]:
    """Rows `{"query": str, "pos": [str, ...], "neg": [str, ...]}`; `neg` may be missing or null, which is the same.

    They may have `pos_scores` and `neg_scores`, a number for each text; with scores_required they must. Other fields
    are kept. A log line counts them, except those in `known`, and says with `unused` what happens to them.

    Raises UserError naming `path:line` at the first row that is not like this.
    """
    used = {"query", "pos", "neg", *known, *(SCORE_FIELDS if scores_required else ())}
    others: Counter[str] = Counter()
    for line, record in read(path):
        _drop_nulls(record, "neg")
        _require_text(path, line, record, "query")
        _require_texts(path, line, record, "pos")
        if "neg" in record:
            _require_texts(path, line, record, "neg", may_be_empty=True)
        for field in ("pos", "neg"):
            _check_scores(path, line, record, field)
            if scores_required and record.get(field) and record.get(f"{field}_scores") is None:
                raise UserError(
                    f'{path}:{line}: "{field}_scores" is missing, which --distillation_weight needs; '
                    "mine_hard_neg.py --save_scores writes it"
                )
        others.update(_fields_beyond(used, record))
        yield record
    _log_others(path, others, unused)


def read_queries(path: AnyPath) -> Iterator[Record]:
    """Rows `{"query": str, "pos": [str, ...]}` for evaluation; raises like read_training_rows.

    They may have a `group` (any string) and an `id` (a string without whitespace or a whole number). Either all rows
    have an `id` or none has, and no two are the same. null is the same as missing. A log line counts other fields.
    """
    used = {"query", "pos", "id", "group"}
    others: Counter[str] = Counter()
    lines_of: dict[str, int] = {}
    without_id = 0
    for line, record in read(path):
        _drop_nulls(record, "id", "group")
        _require_text(path, line, record, "query")
        _require_texts(path, line, record, "pos")
        if "group" in record:
            _require_text(path, line, record, "group")
        if "id" in record:
            name = record["id"]
            if isinstance(name, str):
                _check_text(path, line, '"id"', name)
            if type(name) not in (str, int) or str(name).split() != [str(name)]:
                raise UserError(f'{path}:{line}: "id" is {name!r}, expected a string without whitespace or a number')
            if lines_of.setdefault(str(name), line) != line:
                raise UserError(f'{path}:{line}: "id" {name!r} is already in line {lines_of[str(name)]}')
        else:
            without_id += 1
        if lines_of and without_id:
            raise UserError(f'{path}:{line}: some rows have an "id" and some do not; give all of them one, or none')
        others.update(_fields_beyond(used, record))
        yield record
    _log_others(path, others, "ignored")


def read_passages(path: AnyPath) -> Iterator[str]:
    """The texts of a candidates file, `{"context": [str, ...]}` or `{"text": str}` per line.

    A log line counts other fields. Raises like read_training_rows.
    """
    others: Counter[str] = Counter()
    for line, record in read(path):
        _drop_nulls(record, "context", "text")
        if "context" in record:
            used = "context"
            _require_texts(path, line, record, "context")
            yield from record["context"]
        elif "text" in record:
            used = "text"
            _require_text(path, line, record, "text")
            yield record["text"]
        else:
            raise UserError(
                f'{path}:{line}: neither "context" nor "text" is there; '
                'expected {"context": [str, ...]} or {"text": str}'
            )
        others.update(_fields_beyond({used}, record))
    _log_others(path, others, "ignored")


def data_files(path: AnyPath) -> list[Path]:
    """The data files at `path`: the file itself, or a folder's visible JSON files, sorted by name."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    files = [child for child in children if child.is_file() and _is_data_file(child.name)]
    subfolders = {child.name: count for child in children if (count := _count_data_files(child))}
    if not files:
        hint = f"; subfolders are not read: give {path / next(iter(subfolders))}" if subfolders else ""
        raise UserError(f"{path}: the folder holds no {', '.join('*' + s for s in DATA_SUFFIXES)} file{hint}")
    if subfolders:
        counts = ", ".join(f"{name} ({count} data files)" for name, count in subfolders.items())
        logger.warning("warning: %s: subfolders are not read: %s", path, counts)
    ignored = [child.name for child in children if child not in files and child.name not in subfolders]
    if ignored:
        logger.info("%s: not read: %s", path, ", ".join(ignored))
    return files


def _is_data_file(name: str) -> bool:
    return name.endswith(DATA_SUFFIXES) and not name.startswith(".")


def _count_data_files(folder: Path) -> int:
    """How many data files a visible folder holds, at any depth; 0 for a file."""
    if folder.name.startswith(".") or not folder.is_dir():
        return 0
    return sum(_is_data_file(name) for _, _, names in os.walk(folder) for name in names)


def read(path: AnyPath) -> Iterator[tuple[int, Record]]:
    """Yield (line number from 1, record) for every line of a file that is not blank.

    Raises UserError when the file is missing, unreadable or not UTF-8, when it holds no record, and at a line that is
    not one JSON object.
    """
    line, is_empty = 0, True
    try:
        with _open_for_reading(path) as file:
            for line, raw in enumerate(file, start=1):
                record = _parse(path, line, raw)
                if record is not None:
                    is_empty = False
                    yield line, record
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}:{line + 1}: cannot be read: {reason}") from error
    if is_empty:
        raise UserError(f"{path}: the file is empty; expected one JSON object per line")


def write(path: AnyPath, records: Iterable[Record]) -> None:
    """Write records as JSON Lines. A run that is killed leaves the old file or the new one."""
    with atomic_writer(path) as file:
        for record in records:
            file.write(_line_of(record))


def _line_of(record: Record) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in an unused field: ASCII escapes keep it
        return json.dumps(record).encode() + b"\n"


def _open_for_reading(path: AnyPath) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if str(path).endswith(".gz") else open(path, "rb")


def _parse(path: AnyPath, line: int, raw: bytes) -> Record | None:
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        if line == 1 and raw.startswith(_GZIP_MAGIC):
            raise UserError(f"{path}: the file is compressed; give it a name that ends in .gz") from error
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    if not text:
        return None
    try:
        record = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if line == 1 and text.startswith("["):
            raise UserError(f"{path}:1: the file is one JSON array; expected one object per line") from error
        reason = str(error).replace("line 1 column", "column")  # json counts lines within this one
        raise UserError(f"{path}:{line}: not valid JSON ({reason}); expected one object per line") from error
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


def _require_text(path: AnyPath, line: int, record: Record, field: str) -> None:
    if field not in record:
        raise UserError(f'{path}:{line}: "{field}" is missing, expected a string')
    _check_text(path, line, f'"{field}"', record[field])


def _require_texts(path: AnyPath, line: int, record: Record, field: str, *, may_be_empty: bool = False) -> None:
    if field not in record:
        raise UserError(f'{path}:{line}: "{field}" is missing, expected a list of strings')
    texts = record[field]
    if not isinstance(texts, list):
        raise UserError(f'{path}:{line}: "{field}" is a {type(texts).__name__}, expected a list of strings')
    if not texts and not may_be_empty:
        raise UserError(f'{path}:{line}: "{field}" is empty, expected at least one string')
    for position, text in enumerate(texts):
        _check_text(path, line, f'"{field}"[{position}]', text)


def _drop_nulls(record: Record, *fields: str) -> None:
    """Remove those of the fields that are null."""
    for field in fields:
        if field in record and record[field] is None:
            del record[field]


def _fields_beyond(used: Iterable[str], record: Record) -> list[str]:
    """The names of a record's other fields, without those that are null."""
    return [name for name, value in record.items() if name not in used and value is not None]


def _log_others(path: AnyPath, others: Counter[str], unused: str) -> None:
    """Log other fields and in how many rows they are; `unused` says what happens to them, such as "ignored"."""
    fields = [f"{json.dumps(name)} in {count} rows" for name, count in others.items()]
    if len(fields) > _SHOWN_FIELDS:
        fields[_SHOWN_FIELDS:] = [f"and {len(fields) - _SHOWN_FIELDS} other fields"]
    if fields:
        logger.info("%s: %s: %s", path, unused, ", ".join(fields))


def _check_scores(path: AnyPath, line: int, record: Record, field: str) -> None:
    scores = record.get(f"{field}_scores")
    if scores is None:
        return
    texts = record.get(field, [])
    numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
    if not numbers or len(scores) != len(texts):
        raise UserError(f'{path}:{line}: "{field}_scores" must hold a number for each of the {len(texts)} "{field}"')
    for position, score in enumerate(scores):
        if not -_LARGEST_FLOAT32 <= score <= _LARGEST_FLOAT32:  # NaN is refused too
            raise UserError(
                f'{path}:{line}: "{field}_scores"[{position}] is {repr(score)[:_SHOWN_CHARACTERS]}, '
                "expected a finite number that float32 can hold"
            )


def _check_text(path: AnyPath, line: int, name: str, text: object) -> None:
    if not isinstance(text, str):
        raise UserError(f"{path}:{line}: {name} is a {type(text).__name__}, expected a string")
    if not text.strip():
        raise UserError(f"{path}:{line}: {name} is an empty string, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}:{line}: {name} holds half a surrogate pair, which is not Unicode text") from error
