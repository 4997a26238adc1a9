"""Which held-out queries choose weights, and which judge them."""

import pytest
from helpers.data import write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.training.arguments import DataArguments, RetrieverTrainingArguments
from embedding_finetune.training.choosing import CHOOSING, JUDGING, flag_that_chooses, part_of, with_parts

FLAG = "--early_stopping_patience 2"


def records(count):
    return [{"query": f"q{n}", "pos": ["p"]} for n in range(count)]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, None),
        ({"metric_for_best_model": "eval_Hit@1"}, None),  # it is noted, and decides about nothing
        ({"early_stopping_patience": 2, "save_strategy": "epoch"}, FLAG),
        ({"load_best_model_at_end": True, "save_strategy": "epoch"}, "--load_best_model_at_end True"),
        ({"save_strategy": "best"}, "--save_strategy best"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "--lr_scheduler_type reduce_lr_on_plateau"),
    ],
)
def test_held_out_queries_choose_where_a_flag_makes_measures_decide_and_no_others_judge(tmp_path, flags, named):
    args = RetrieverTrainingArguments(output_dir=str(tmp_path), eval_strategy="epoch", **flags)
    data = str(write_jsonl(tmp_path / "rows.jsonl", records(3)))
    assert flag_that_chooses(DataArguments(train_data=[data], hold_out=1), args) == named
    judged = DataArguments(train_data=[data], hold_out=1, eval_query_file_jsonl_path=data)
    assert flag_that_chooses(judged, args) is None
    assert flag_that_chooses(DataArguments(train_data=[data], eval_query_file_jsonl_path=data), args) is None


def test_records_say_which_part_they_are_in_and_keep_their_order():
    parts = with_parts(records(100), [n % 3 == 0 for n in range(100)], flag=FLAG)
    assert [record["held_out_part"] for record in parts[:4]] == [CHOOSING, JUDGING, JUDGING, CHOOSING]
    assert [record["query"] for record in part_of(parts, CHOOSING)] == [f"q{n}" for n in range(0, 100, 3)]
    assert len(part_of(parts, JUDGING)) == 66


def test_nothing_is_chosen_by_fewer_than_a_hundred_queries():
    with pytest.raises(UserError, match=f"^{FLAG}: 99 queries are held out, .*; hold out 100 or more, or "):
        with_parts(records(99), [n % 2 == 0 for n in range(99)], flag=FLAG)


@pytest.mark.parametrize("choosing", [24, 76, 0, 100])
def test_parts_that_are_far_from_halves_are_refused(choosing):
    with pytest.raises(UserError, match=rf"the smaller has {min(choosing, 100 - choosing)}, since groups"):
        with_parts(records(100), [n < choosing for n in range(100)], flag=FLAG)
    assert with_parts(records(100), [n < 25 for n in range(100)], flag=FLAG)
