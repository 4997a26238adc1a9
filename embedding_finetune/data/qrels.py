"""Qrels: which document answers which query, and how well, as BEIR and TREC write them.

BEIR's lines are query-id, corpus-id and score with tabs between them, after a header; TREC's are query, 0, document and
score, without one. A name may end in `.gz`.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from typing import IO, cast

from embedding_finetune.command_line import UserError
from embedding_finetune.files import AnyPath

_HEADER = re.compile(r"(query|q)[-_]?id\t(corpus|document|doc|d)[-_]?id\t(score|relevance|label|grade)", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_LARGEST_SCORE = 2**31 - 1
_SHOWN_CHARACTERS = 20

Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> score; above 0 the document answers the query."""


def read_qrels(path: AnyPath) -> Qrels:
    """The judgements of a file in `qrels`. A pair that is there twice with one score counts once.

    Raises UserError naming file and line for a line with too many or too few columns, a score that is no whole number,
    and a pair that is judged twice with different scores.
    """
    judgements: Qrels = {}
    for line, query, document, score in read_judged(path):
        known = judgements.setdefault(query, {}).setdefault(document, score)
        if known != score:
            raise UserError(
                f"{path}:{line}: query {query!r} and document {document!r} have the score {score}, and "
                f"{known} in an earlier line; keep one of them"
            )
    if not judgements:
        raise UserError(f"{path}: the file is empty; expected lines of query-id, corpus-id and score")
    return judgements


def read_judged(path: AnyPath) -> Iterator[tuple[int, str, str, int]]:
    """Yield (line, query id, document id, score)."""
    is_trec: bool | None = None
    for line, text in _lines(path):
        if is_trec is None:
            is_trec = text.count("\t") != 2
            if _HEADER.fullmatch(text.strip()):
                continue
        cells = text.split() if is_trec else text.split("\t")
        if len(cells) != (4 if is_trec else 3):
            raise UserError(
                f"{path}:{line}: {len(cells)} columns, expected query-id, corpus-id and score with tabs between them, "
                "or TREC's query, 0, document, score"
            )
        query, document, score = cells[0], cells[-2], cells[-1].strip()
        if not _INTEGER.fullmatch(score) or abs(int(score)) > _LARGEST_SCORE:
            raise UserError(
                f"{path}:{line}: the score {score[:_SHOWN_CHARACTERS]!r} is no whole number (of at most 31 bits); a "
                "header is query-id, corpus-id, score"
            )
        check_id(f"{path}:{line}: query-id", query)
        check_id(f"{path}:{line}: corpus-id", document)
        yield line, query, document, int(score)


def _lines(path: AnyPath) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, numbered from 1."""
    line = 0
    try:
        with cast(IO[bytes], gzip.open(path, "rb")) if str(path).endswith(".gz") else open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield line, text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{line + 1}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def check_id(what: str, name: str) -> None:
    """Raise UserError, beginning with `what`, for an id that TREC's files, with spaces between columns, cannot hold."""
    if name.split() != [name] or "\0" in name:
        raise UserError(
            f"{what} is {name!r}; an id with white space, or without a character, cannot stand in TREC files"
        )
    check_unicode(what, name)


def check_unicode(what: str, text: str) -> None:
    """Raise UserError, beginning with `what`, for half a surrogate pair."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half a surrogate pair, which is not Unicode text") from error
