"""What one field of a row must hold: a text, a list of texts, scores. Every error names the place and the field."""

from collections.abc import Iterable, Sequence
from typing import Any

from embedding_finetune.command_line import UserError
from embedding_finetune.data.columns import Place
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.texts import canonical

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
"""Scores are held as float32."""
_SHOWN_CHARACTERS = 20


def are_texts(values: Sequence[Any]) -> bool:
    """Whether all of the values are Unicode text that says something. One look at good ones, which most are."""
    try:
        together = "".join(values)
        return all(map(str.strip, values)) and (together.isascii() or bool(together.encode()))
    except (TypeError, UnicodeEncodeError):
        return False


def require_text(place: Place, record: Record, field: str) -> None:
    """Raise UserError unless a record has a text in a field."""
    if are_texts([record.get(field)]):
        return
    if _lacks(place, record, field):
        is_of_beir = field == "query" and "_id" in record
        hint = "; of a BEIR folder give the folder itself, whose qrels say what answers a query" if is_of_beir else ""
        raise UserError(f"{place}: {place.missing(field, 'a string')}{hint}")
    check_text(place, field, record[field])


def require_texts(place: Place, record: Record, field: str, *, may_be_empty: bool = False) -> None:
    """Raise UserError unless a record has a list of texts in a field."""
    texts = record.get(field)
    if isinstance(texts, list) and texts and are_texts(texts):
        return
    if _lacks(place, record, field):
        raise UserError(f"{place}: {place.missing(field, 'a list of strings')}")
    if not isinstance(texts, list):
        raise UserError(f"{place}: {place.name(field)} is a {type(texts).__name__}, expected a list of strings")
    if not texts and not may_be_empty:
        raise UserError(f"{place}: {place.name(field)} is empty, expected at least one string")
    for position, text in enumerate(texts):
        check_text(place, field, text, position)


def check_text(
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


def _lacks(place: Place, record: Record, field: str) -> bool:
    """Whether a field is missing, or null in a table, where cells are nothing else."""
    return field not in record or (place.table is not None and record[field] is None)


def check_instruction(place: Place, record: Record) -> None:
    """An instruction may be empty: then nothing is put before the query."""
    if "instruction" in record and record["instruction"] != "":
        require_text(place, record, "instruction")


def require_scores(place: Place, record: Record) -> None:
    """Raise UserError unless a training row has scores for all its texts."""
    for field in ("pos", "neg"):
        if record.get(field) and record.get(f"{field}_scores") is None:
            raise UserError(
                f'{place}: "{field}_scores" is missing, which --distillation_weight needs; '
                "mine_hard_neg.py --save_scores writes it"
            )


def check_scores(place: Place, record: Record, field: str) -> None:
    """Raise UserError where the scores of a field of texts, if it has any, are not a number for each text."""
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


def require_value(place: Place, record: Record, field: str) -> None:
    """Raise UserError unless a row says in `field` with which others it is to be held out."""
    value = record.get(field)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN is how tables say null
        raise UserError(f"{place}: {place.name(field)} is missing, which --hold_out_by needs in every row")
    if isinstance(value, list | dict):
        raise UserError(
            f"{place}: {place.name(field)} is a {type(value).__name__}, --hold_out_by needs a text or a number"
        )
    if isinstance(value, str):
        check_text(place, field, value)


def field_value(value: object) -> str:
    """What a field's value is compared by; a whole number is the same with and without a decimal point."""
    return canonical(str(int(value) if isinstance(value, float) and value.is_integer() else value))


def drop_nulls(record: Record, *fields: str) -> None:
    """Remove those of the fields that are null."""
    for field in fields:
        if record.get(field, field) is None:
            del record[field]


def fields_beyond(used: Iterable[str], record: Record) -> list[str]:
    """The names of a record's other fields, without those that are null."""
    return [name for name, value in record.items() if name not in used and value is not None]
