"""Single fields of a record."""

import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.data.columns import Place
from embedding_finetune.data.fields import (
    are_texts,
    check_scores,
    drop_nulls,
    field_value,
    fields_beyond,
    require_scores,
    require_text,
    require_texts,
    require_value,
)

PLACE = Place("a.jsonl", {})
PLACE.number = 3


@pytest.mark.parametrize("value", [None, 3, ["p"], "", " \n", "\ud800"])
def test_a_text_is_unicode_that_says_something(value):
    assert are_texts(["p", "ä \N{DROMEDARY CAMEL}"])
    assert not are_texts(["p", value])
    require_texts(PLACE, {"pos": ["p", "q"]}, "pos")
    with pytest.raises(UserError, match=r'^a\.jsonl:3: "pos"\[1\] (is|holds) '):
        require_texts(PLACE, {"pos": ["p", value]}, "pos")
    with pytest.raises(UserError, match=r'^a\.jsonl:3: "query" (is|holds) '):
        require_text(PLACE, {"query": value}, "query")


def test_a_query_that_is_missing_from_a_beir_file_is_told_with_the_folder_to_give():
    with pytest.raises(UserError, match='"query" is missing, expected a string; of a BEIR folder give the folder'):
        require_text(PLACE, {"_id": "1", "text": "t"}, "query")


@pytest.mark.parametrize("score", [10**400, -(10**400), float("nan"), float("inf"), -float("inf"), 1e300, 3.5e38])
def test_scores_that_float32_cannot_hold_are_named(score):
    with pytest.raises(UserError) as error:
        check_scores(PLACE, {"pos": ["p", "r"], "pos_scores": [3.4e38, score]}, "pos")
    assert str(error.value).startswith('a.jsonl:3: "pos_scores"[1] is ')
    assert len(str(error.value)) < 110


@pytest.mark.parametrize("scores", [3, [1], [1, "2"], [1, True], [1, 2, 3]])
def test_scores_are_a_number_for_each_text(scores):
    check_scores(PLACE, {"neg": ["n", "m"], "neg_scores": [1, 0.5]}, "neg")
    with pytest.raises(UserError, match='"neg_scores" must hold a number for each of the 2 "neg"'):
        check_scores(PLACE, {"neg": ["n", "m"], "neg_scores": scores}, "neg")


def test_scores_are_needed_only_of_texts_that_are_there():
    require_scores(PLACE, {"pos": ["p"], "pos_scores": [1], "neg": []})
    with pytest.raises(UserError, match='"neg_scores" is missing, which --distillation_weight needs'):
        require_scores(PLACE, {"pos": ["p"], "pos_scores": [1], "neg": ["n"]})


@pytest.mark.parametrize("value", [None, float("nan"), " ", ["a"], {}, "\ud800"])
def test_a_value_that_rows_are_held_out_by_is_a_text_or_a_number(value):
    for good in (3, 2.5, "a"):
        require_value(PLACE, {"source": good}, "source")
    with pytest.raises(UserError, match=r'^a\.jsonl:3: "source" '):
        require_value(PLACE, {"source": value}, "source")


def test_a_whole_number_is_one_value_with_and_without_a_point():
    assert field_value(7) == field_value(7.0) == field_value(" 7 ") != field_value(7.5)


def test_null_is_as_missing():
    record = {"query": "q", "id": None, "group": "g", "note": None, "source": "s"}
    assert fields_beyond({"query", "group"}, record) == ["source"]
    drop_nulls(record, "id", "group", "instruction")
    assert record == {"query": "q", "group": "g", "note": None, "source": "s"}
