"""BEIR folders: documents and queries with ids, and which document answers which query, graded.

corpus.jsonl       {"_id": str, "title": str, "text": str} a line
queries.jsonl      {"_id": str, "text": str} a line
qrels/SPLIT.tsv    query-id, corpus-id, score, with a header; or TREC's four columns without one

All may end in `.gz` too. A folder means its corpus, and one of its splits: train.tsv for training, test.tsv for
evaluation. The path of another file in `qrels` means that one. Memory holds ids and judgements, never all texts.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.data import jsonl
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.qrels import Qrels, check_id, check_unicode, read_judged, read_qrels
from embedding_finetune.data.texts import DIGEST_BYTES, TextsOnDisk
from embedding_finetune.files import AnyPath

logger = logging.getLogger(__name__)

_QRELS = "qrels"


class Split(NamedTuple):
    """The files of a BEIR folder, with one of its files of judgements."""

    corpus: Path
    queries: Path
    qrels: Path


def is_beir(path: AnyPath) -> bool:
    """Whether a path is a BEIR folder, or a file in the `qrels` of one."""
    return _is_folder(folder_of(path))


def folder_of(path: AnyPath) -> Path:
    """The folder that a path to be read as BEIR data is in: the path itself, or of a file in `qrels` the folder."""
    path = Path(path)
    folder = path.absolute().parent
    if folder.name != _QRELS or not os.path.isfile(path):
        return path
    return path.parent.parent if path.parent.name == _QRELS else folder.parent


def _is_folder(folder: Path) -> bool:
    """Whether two of its three parts are there: what is missing is then an error, not another format."""
    parts = (_find(folder / "corpus.jsonl"), _find(folder / "queries.jsonl"), os.path.isdir(folder / _QRELS))
    return sum(map(bool, parts)) > 1


def find_split(path: AnyPath, split: str) -> Split:
    """The files of a BEIR folder with the judgements of `split`, or with those of the file in `qrels` that path is.

    Raises UserError naming a file that is not there, and the splits that are.
    """
    folder = folder_of(path)
    qrels = _find(folder / _QRELS / f"{split}.tsv") if folder == Path(path) else Path(path)
    if qrels is None:
        others = sorted((folder / _QRELS).glob("[!.]*.tsv*"))
        there = ", ".join(other.name for other in others)
        remedy = f"{folder / _QRELS} has {there}: give {others[0]}" if others else "there is no other .tsv file either"
        raise UserError(f"{folder}: {_QRELS}/{split}.tsv is not there; {remedy}")
    return Split(_require(folder, "corpus"), _require(folder, "queries"), qrels)


def corpus_file(path: AnyPath) -> Path:
    """The corpus of a BEIR folder, or of the folder of a file in `qrels`."""
    return _require(folder_of(path), "corpus")


def input_files(path: AnyPath) -> list[Path]:
    """The files of a BEIR folder that may be read; no output may replace one of them."""
    folder = folder_of(path)
    found = [_find(folder / f"{name}.jsonl") for name in ("corpus", "queries")]
    return [*(file for file in found if file is not None), *sorted((folder / _QRELS).glob("*"))]


def _find(path: Path) -> Path | None:
    """The file itself, or compressed."""
    return next((file for file in (path, path.with_name(path.name + ".gz")) if os.path.isfile(file)), None)


def _require(folder: Path, name: str) -> Path:
    file = _find(folder / f"{name}.jsonl")
    if file is None:
        raise UserError(f"{folder}: {name}.jsonl is not there, which a BEIR folder has")
    return file


def check_all_found(split: Split, missing_queries: Iterable[str], missing_documents: Iterable[str]) -> None:
    """Raise UserError naming the first line of judgements with an id that its file lacks, if there is any."""
    queries, documents = set(missing_queries), set(missing_documents)
    if not queries and not documents:
        return
    for line, query, document, _ in read_judged(split.qrels):
        if query in queries:
            raise UserError(f"{split.qrels}:{line}: the query {query!r} is not in {split.queries}")
        if document in documents:
            raise UserError(f"{split.qrels}:{line}: the document {document!r} is not in {split.corpus}")


def read_documents(path: AnyPath) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of a corpus; the text is empty where a document has neither title nor text.

    Raises UserError naming file and line.
    """
    for line, name, record in _read_identified(path):
        for field in ("title", "text"):
            _check_string(f'{path}:{line}: "{field}"', record.get(field))
        yield name, title_and_text(record)


def read_texts(path: AnyPath) -> Iterator[str]:
    """The texts of a corpus. A log line counts documents without any. Raises like read_documents."""
    empty = 0
    for _, text in read_documents(path):
        empty += not text
        if text:
            yield text
    log_skipped(path, empty)


def title_and_text(record: Record) -> str:
    """Title and text of a document, joined as BEIR does; empty where there is neither."""
    return f"{record.get('title') or ''} {record.get('text') or ''}".strip()


def log_skipped(path: AnyPath, count: int) -> None:
    """Log how many documents say nothing, if there is any."""
    if count:
        logger.info("%s: %d documents have neither title nor text and are left out", path, count)


def read_judged_queries(split: Split, judgements: Mapping[str, object]) -> Iterator[tuple[int, str, str]]:
    """Yield (line, id, text) of the queries that have judgements. Raises UserError naming file and line."""
    for line, name, record in _read_identified(split.queries):
        if name in judgements:
            text, what = record.get("text"), f'{split.queries}:{line}: "text"'
            _check_string(what, text)
            if not text or not text.strip():
                raise UserError(f"{what} is missing or empty, expected the text of the query")
            yield line, name, text


def read_rows(split: Split) -> Iterator[tuple[int, Record]]:
    """Yield (line of the query, `{"query": str, "pos": [str, ...], "id": str}`) for the queries that have an answer.

    A log line counts queries without any, and documents without title and text. Raises UserError naming file and line.
    """
    judgements = read_qrels(split.qrels)
    texts, places = _judged_texts(split, judgements)
    queries = list(read_judged_queries(split, judgements))
    check_all_found(split, judgements.keys() - {name for _, name, _ in queries}, ())
    without = 0
    for line, name, text in queries:
        answers = [places[document] for document, score in judgements[name].items() if score > 0]
        positives = dict.fromkeys(texts[place] for place in answers if place is not None)
        without += not positives
        if positives:
            yield line, {"query": text, "pos": list(positives), "id": name}
    log_without_answer(split, without, len(queries))


def log_without_answer(split: Split, count: int, total: int) -> None:
    """Log how many queries have no answer, if there is any. Raises UserError where none has one."""
    if count == total:
        raise UserError(f"{split.qrels}: no query has a document with a score above 0")
    if count:
        logger.info(
            "%s: %d of %d queries have no document with a score above 0 and are left out", split.qrels, count, total
        )


def _judged_texts(split: Split, judgements: Qrels) -> tuple[TextsOnDisk, dict[str, int | None]]:
    """The texts of judged documents, and by their ids the place of each among them; None for one without text."""
    judged = {document for documents in judgements.values() for document in documents}
    places: dict[str, int | None] = {}
    empty = 0

    def texts() -> Iterator[str]:
        nonlocal empty
        count = 0
        for name, text in read_documents(split.corpus):
            empty += not text
            if name in judged:
                places[name] = count if text else None
                if text:
                    count += 1
                    yield text

    on_disk = TextsOnDisk(texts())
    log_skipped(split.corpus, empty)
    check_all_found(split, (), judged - places.keys())
    return on_disk, places


def _read_identified(path: AnyPath) -> Iterator[tuple[int, str, Record]]:
    """Yield (line, id, record). Raises UserError for an id that is missing, holds white space, or is there twice."""
    digests = bytearray()
    for line, record in jsonl.read(path):
        place, name = f"{path}:{line}", record.get("_id")
        if type(name) not in (str, int):
            raise UserError(f'{place}: "_id" is missing or no string, which every line of a BEIR file has')
        name = str(name)
        check_id(f'{place}: "_id"', name)
        digests += blake2b(name.encode(), digest_size=DIGEST_BYTES).digest()
        yield line, name, record
    if not digests:
        raise UserError(f"{path}: the file is empty; expected one JSON object per line")
    _check_distinct(path, np.frombuffer(digests, dtype="S16"))


def _check_distinct(path: AnyPath, digests: np.ndarray) -> None:
    """Raise UserError naming the first line whose id is that of an earlier one. digests: (N,), of all ids in order."""
    order = np.argsort(digests, kind="stable")
    repeats = order[1:][digests[order[1:]] == digests[order[:-1]]]
    if not len(repeats):
        return
    second = int(repeats.min())
    first = int(np.flatnonzero(digests == digests[second])[0])
    found = [
        (line, record["_id"]) for number, (line, record) in enumerate(jsonl.read(path)) if number in (first, second)
    ]
    raise UserError(f'{path}:{found[1][0]}: "_id" {found[1][1]!r} is already in line {found[0][0]}')


def _check_string(what: str, value: object) -> None:
    """Raise UserError unless a field is Unicode text, or missing, or null."""
    if isinstance(value, str):
        check_unicode(what, value)
    elif value is not None:
        raise UserError(f"{what} is a {type(value).__name__}, expected a string")
