"""What the rows of a file must be: training rows, queries with their answers, passages to search.

Readers yield one validated record per row, read through formats.py. Every error names the place and the field.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir
from embedding_finetune.data.columns import Place
from embedding_finetune.data.formats import read
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.texts import canonical
from embedding_finetune.files import AnyPath

logger = logging.getLogger(__name__)

HELD_OUT_BY, HELD_OUT_PART = "held_out_by", "held_out_part"
"""Fields of a held-out query: what is new about it, see hold_out.py; whether it chose weights or judges them."""
SCORE_FIELDS = ("pos_scores", "neg_scores")
_PLAIN_FIELDS = {"query", "pos", "neg"}
_QUERY_FIELDS = ("query", "pos", "id", "group", "instruction", HELD_OUT_BY, HELD_OUT_PART)

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
"""Scores are held as float32."""
_SHOWN_CHARACTERS = 20
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
            others.update(_fields_beyond(used, record))
            instructed += "instruction" in record
        if field_required is not None:
            _check_field(place, record, field_required)
        if scores_required:
            _require_scores(place, record)
        yield record
    _log_instructed(path, instructed)
    _log_others(path, others, "kept and written, but not used" if others_are_kept else "ignored")


def _is_plain(record: Record) -> bool:
    """Whether a row has good texts and nothing else. Most have, and this is told by one look."""
    pos, neg = record.get("pos"), record.get("neg", [])
    if not _PLAIN_FIELDS.issuperset(record) or not isinstance(pos, list) or not isinstance(neg, list) or not pos:
        return False
    return _are_texts([record.get("query"), *pos, *neg])


def _check_training_row(place: Place, record: Record) -> None:
    _drop_nulls(record, "neg", "instruction")
    _require_text(place, record, "query")
    _require_texts(place, record, "pos")
    if "neg" in record:
        _require_texts(place, record, "neg", may_be_empty=True)
    _check_instruction(place, record)
    for field in ("pos", "neg"):
        _check_scores(place, record, field)


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
        _drop_nulls(record, "id", "group", "instruction")
        _require_text(place, record, "query")
        _require_texts(place, record, "pos", may_be_empty=may_lack_answers)
        _check_instruction(place, record)
        if "group" in record:
            _require_text(place, record, "group")
        if "id" in record:
            name = record["id"]
            if isinstance(name, str):
                _check_text(place, "id", name)
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
        others.update(_fields_beyond(used, record))
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
        _drop_nulls(record, "context", "text", "title")
        texts = _passages_of(place, record)
        yield from texts
        found += len(texts)
        skipped += not texts
        used = {"context"} if "context" in record else {"text", "title", "_id"} if "_id" in record else {"text"}
        others.update(_fields_beyond(used, record))
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
        _require_texts(place, record, "context")
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
    _require_text(place, record, "text")
    return [record["text"]]


def document_text(place: Place, record: Record) -> str:
    """Title and text of a BEIR document `{"_id": str, "title": str, "text": str}`, joined as BEIR joins them.

    Either may be missing, null or empty; without both the text is empty. Raises UserError for what is not Unicode text.
    """
    for field in ("title", "text"):
        if record.get(field) is not None:
            _check_text(place, field, record[field], may_be_blank=True)
    return beir.title_and_text(record)


def _require_text(place: Place, record: Record, field: str) -> None:
    if _are_texts([record.get(field)]):
        return
    if _lacks(place, record, field):
        is_of_beir = field == "query" and "_id" in record
        hint = "; of a BEIR folder give the folder itself, whose qrels say what answers a query" if is_of_beir else ""
        raise UserError(f"{place}: {place.missing(field, 'a string')}{hint}")
    _check_text(place, field, record[field])


def _require_texts(place: Place, record: Record, field: str, *, may_be_empty: bool = False) -> None:
    texts = record.get(field)
    if isinstance(texts, list) and texts and _are_texts(texts):
        return
    if _lacks(place, record, field):
        raise UserError(f"{place}: {place.missing(field, 'a list of strings')}")
    if not isinstance(texts, list):
        raise UserError(f"{place}: {place.name(field)} is a {type(texts).__name__}, expected a list of strings")
    if not texts and not may_be_empty:
        raise UserError(f"{place}: {place.name(field)} is empty, expected at least one string")
    for position, text in enumerate(texts):
        _check_text(place, field, text, position)


def _are_texts(values: Sequence[Any]) -> bool:
    """Whether all of the values are Unicode text that says something. One look at good ones, which most are."""
    try:
        together = "".join(values)
        return all(map(str.strip, values)) and (together.isascii() or bool(together.encode()))
    except (TypeError, UnicodeEncodeError):
        return False


def _lacks(place: Place, record: Record, field: str) -> bool:
    """Whether a field is missing, or null in a table, where cells are nothing else."""
    return field not in record or (place.table is not None and record[field] is None)


def _check_instruction(place: Place, record: Record) -> None:
    """An instruction may be empty: then nothing is put before the query."""
    if "instruction" in record and record["instruction"] != "":
        _require_text(place, record, "instruction")


def field_value(value: object) -> str:
    """What a field's value is compared by; a whole number is the same with and without a decimal point."""
    return canonical(str(int(value) if isinstance(value, float) and value.is_integer() else value))


def _check_field(place: Place, record: Record, field: str) -> None:
    """Raise UserError unless a row says in `field` with which others it is to be held out."""
    value = record.get(field)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN is how tables say null
        raise UserError(f"{place}: {place.name(field)} is missing, which --hold_out_by needs in every row")
    if isinstance(value, list | dict):
        raise UserError(
            f"{place}: {place.name(field)} is a {type(value).__name__}, --hold_out_by needs a text or a number"
        )
    if isinstance(value, str):
        _check_text(place, field, value)


def _drop_nulls(record: Record, *fields: str) -> None:
    """Remove those of the fields that are null."""
    for field in fields:
        if record.get(field, field) is None:
            del record[field]


def _fields_beyond(used: Iterable[str], record: Record) -> list[str]:
    """The names of a record's other fields, without those that are null."""
    return [name for name, value in record.items() if name not in used and value is not None]


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


def _require_scores(place: Place, record: Record) -> None:
    for field in ("pos", "neg"):
        if record.get(field) and record.get(f"{field}_scores") is None:
            raise UserError(
                f'{place}: "{field}_scores" is missing, which --distillation_weight needs; '
                "mine_hard_neg.py --save_scores writes it"
            )


def _check_scores(place: Place, record: Record, field: str) -> None:
    scores = record.get(f"{field}_scores")
    if scores is None:
        return
    texts = record.get(field, [])
    numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
    if not numbers or len(scores) != len(texts):
        raise UserError(f'{place}: "{field}_scores" must hold a number for each of the {len(texts)} "{field}"')
    for position, score in enumerate(scores):
        if not -_LARGEST_FLOAT32 <= score <= _LARGEST_FLOAT32:  # NaN is refused too
            raise UserError(
                f'{place}: "{field}_scores"[{position}] is {repr(score)[:_SHOWN_CHARACTERS]}, '
                "expected a finite number that float32 can hold"
            )


def _check_text(
    place: Place, field: str, text: object, position: int | None = None, *, may_be_blank: bool = False
) -> None:
    """Raise UserError unless a field, or the item at a position of its list, is Unicode text that says something."""
    name = place.name(field) if position is None else f"{place.name(field)}[{position}]"
    if not isinstance(text, str):
        raise UserError(f"{place}: {name} is a {type(text).__name__}, expected a string")
    if not text.strip() and not may_be_blank:
        raise UserError(f"{place}: {name} is an empty string, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {name} holds half a surrogate pair, which is not Unicode text") from error
