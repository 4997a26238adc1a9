"""What the rows of a file must be: training rows, queries with their answers, passages to search.

Readers yield one validated record per row, read through formats.py. Every error names the place and the field.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir
from embedding_finetune.data.columns import Place
from embedding_finetune.data.fields import (
    are_texts,
    check_instruction,
    check_scores,
    check_text,
    drop_nulls,
    fields_beyond,
    require_scores,
    require_text,
    require_texts,
    require_value,
)
from embedding_finetune.data.formats import read
from embedding_finetune.data.jsonl import Record
from embedding_finetune.files import AnyPath

logger = logging.getLogger(__name__)

HELD_OUT_BY, HELD_OUT_PART = "held_out_by", "held_out_part"
"""Fields of a held-out query: what is new about it, see hold_out.py; whether it chose weights or judges them."""
SCORE_FIELDS = ("pos_scores", "neg_scores")
_PLAIN_FIELDS = {"query", "pos", "neg"}
_QUERY_FIELDS = ("query", "pos", "id", "group", "instruction", HELD_OUT_BY, HELD_OUT_PART)

_SHOWN_FIELDS = 10
"""In one log line."""


def read_training_rows(
    path: AnyPath,
    columns: Sequence[str] = (),
    *,
    scores_required: bool = False,
    field_required: str | None = None,
    known: Iterable[str] = (),
    others_are_kept: bool = False,
) -> Iterator[Record]:
    """Rows `{"query": str, "pos": [str, ...], "neg": [str, ...]}`; `neg` may be missing or null, which is the same.

    They may have `pos_scores` and `neg_scores`, a number for each text; with scores_required they must. An
    `instruction` is put before their query. `known`: other fields that the caller uses. field_required: one of
    them, which says which rows are held out together, see field_value. Log lines tell what other
    fields there are; they are read from all formats with others_are_kept, else not from parquet. A BEIR folder
    gives the queries of its qrels/train.tsv, with an `id`.

    Raises UserError naming file and line, or row, at the first row that is not like this.
    """
    used = {"query", "pos", "neg", "instruction", *known, *(SCORE_FIELDS if scores_required else ())}
    others: Counter[str] = Counter()
    instructed = 0
    fields = dict.fromkeys((*_QUERY_FIELDS, "neg", *SCORE_FIELDS, *known))
    rows = (
        _read_beir(path, "train")
        if beir.is_beir(path)
        else read(path, columns, fields=list(fields), others=others_are_kept)
    )
    for place, record in rows:
        if not _is_plain(record):
            _check_training_row(place, record)
            others.update(fields_beyond(used, record))
            instructed += "instruction" in record
        if field_required is not None:
            require_value(place, record, field_required)
        if scores_required:
            require_scores(place, record)
        yield record
    _log_instructed(path, instructed)
    _log_others(path, others, "kept and written, but not used" if others_are_kept else "ignored")


def _is_plain(record: Record) -> bool:
    """Whether a row has good texts and nothing else. Most have, and this is told by one look."""
    pos, neg = record.get("pos"), record.get("neg", [])
    if not _PLAIN_FIELDS.issuperset(record) or not isinstance(pos, list) or not isinstance(neg, list) or not pos:
        return False
    return are_texts([record.get("query"), *pos, *neg])


def _check_training_row(place: Place, record: Record) -> None:
    drop_nulls(record, "neg", "instruction")
    require_text(place, record, "query")
    require_texts(place, record, "pos")
    if "neg" in record:
        require_texts(place, record, "neg", may_be_empty=True)
    check_instruction(place, record)
    for field in ("pos", "neg"):
        check_scores(place, record, field)


def read_queries(path: AnyPath, columns: Sequence[str] = (), *, may_lack_answers: bool = False) -> Iterator[Record]:
    """Rows `{"query": str, "pos": [str, ...]}` for evaluation; raises like read_training_rows.

    may_lack_answers: whether a `pos` may be empty, for a question that the passages do not answer.

    They may have an `instruction`, a `group` (any string) and an `id` (a string without whitespace or a whole number).
    Either all rows have an `id` or none has, and no two are the same. null is the same as missing. A log line counts
    other fields. `held_out_by` says how finetune.py chose a query, `held_out_part` what it did with it.
    """
    used = {"query", "pos", "id", "group", "instruction", HELD_OUT_BY, HELD_OUT_PART}
    others: Counter[str] = Counter()
    places_of: dict[str, str] = {}
    without_id = instructed = 0
    for place, record in read(path, columns, fields=_QUERY_FIELDS, others=False):
        drop_nulls(record, "id", "group", "instruction")
        require_text(place, record, "query")
        require_texts(place, record, "pos", may_be_empty=may_lack_answers)
        check_instruction(place, record)
        if "group" in record:
            require_text(place, record, "group")
        if "id" in record:
            name = record["id"]
            if isinstance(name, str):
                check_text(place, "id", name)
            if type(name) not in (str, int) or str(name).split() != [str(name)]:
                raise UserError(
                    f"{place}: {place.name('id')} is {name!r}, expected a string without whitespace or a number"
                )
            if str(name) in places_of:
                raise UserError(f"{place}: {place.name('id')} {name!r} is already in {places_of[str(name)]}")
            places_of[str(name)] = str(place)
        else:
            without_id += 1
        if places_of and without_id:
            raise UserError(f'{place}: some rows have an "id" and some do not; give all of them one, or none')
        instructed += "instruction" in record
        others.update(fields_beyond(used, record))
        yield record
    _log_instructed(path, instructed)
    _log_others(path, others, "ignored")


def read_passages(path: AnyPath, columns: Sequence[str] = ()) -> Iterator[str]:
    """The texts of a candidates file: `{"context": [str, ...]}` or `{"text": str}` per line, or BEIR documents.

    A record with an `_id` is a document, see document_text; one without any text is skipped. Log lines count skipped
    documents and other fields. Raises like read_training_rows.
    """
    if beir.is_beir(path):
        yield from beir.read_texts(beir.corpus_file(path))
        return
    others: Counter[str] = Counter()
    found = skipped = 0
    for place, record in read(path, columns, fields=("context", "text", "title", "_id"), others=False):
        drop_nulls(record, "context", "text", "title")
        texts = _passages_of(place, record)
        yield from texts
        found += len(texts)
        skipped += not texts
        used = {"context"} if "context" in record else {"text", "title", "_id"} if "_id" in record else {"text"}
        others.update(fields_beyond(used, record))
    if not found:
        raise UserError(f"{path}: none of the {skipped} documents has a title or text")
    if skipped:
        logger.info("%s: %d documents have neither title nor text, and are skipped", path, skipped)
    _log_others(path, others, "ignored")


def _read_beir(path: AnyPath, split: str) -> Iterator[tuple[Place, Record]]:
    files = beir.find_split(path, split)
    place = Place(files.queries, {})
    for place.number, record in beir.read_rows(files):
        yield place, record


def _passages_of(place: Place, record: Record) -> list[str]:
    if "context" in record:
        require_texts(place, record, "context")
        return record["context"]
    if "_id" in record:
        text = document_text(place, record)
        return [text] if text else []
    if "text" not in record and place.table is not None and "text" in place.layout:
        raise UserError(f"{place}: {place.missing('text', 'a string')}")
    if "text" not in record:
        raise UserError(
            f'{place}: neither "context" nor {place.names_to_find("text")} is there; expected '
            f'{{"context": [str, ...]}} or {{"text": str}}{place.remedy("text")}'
        )
    require_text(place, record, "text")
    return [record["text"]]


def document_text(place: Place, record: Record) -> str:
    """Title and text of a BEIR document `{"_id": str, "title": str, "text": str}`, joined as BEIR joins them.

    Either may be missing, null or empty; without both the text is empty. Raises UserError for what is not Unicode text.
    """
    for field in ("title", "text"):
        if record.get(field) is not None:
            check_text(place, field, record[field], may_be_blank=True)
    return beir.title_and_text(record)


def _log_instructed(path: AnyPath, count: int) -> None:
    if count:
        logger.info("%s: %d queries have an instruction of their own", path, count)


def _log_others(path: AnyPath, others: Counter[str], unused: str) -> None:
    """Log other fields and in how many rows they are; `unused` says what happens to them, such as "ignored"."""
    fields = [f"{json.dumps(name)} in {count} rows" for name, count in others.items()]
    if len(fields) > _SHOWN_FIELDS:
        fields[_SHOWN_FIELDS:] = [f"and {len(fields) - _SHOWN_FIELDS} other fields"]
    if fields:
        logger.info("%s: %s: %s", path, unused, ", ".join(fields))
