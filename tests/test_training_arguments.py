"""The three dataclasses of finetune.py's flags check themselves, and settle what transformers leaves open."""

import re

import pytest
from helpers.data import write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.training.arguments import DataArguments, RetrieverTrainingArguments


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"optim": "lomo"}, "--optim lomo"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr"),
        ({"report_to": "nonesuch"}, "--report_to"),
        ({"learning_rate": -1.0}, "--learning_rate"),
        ({"matryoshka_dims": [4, 4]}, "--matryoshka_dims 4 4"),
        ({"metric_for_best_model": "loss"}, "--metric_for_best_model loss: must be one of"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"x": 1}}, "x is unknown"),
    ],
)
def test_training_arguments_made_from_python_check_themselves(tmp_path, flags, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        RetrieverTrainingArguments(output_dir=str(tmp_path), **flags)


def test_data_arguments_made_from_python_check_themselves(tmp_path):
    with pytest.raises(UserError, match=r"--train_data: .*nowhere\.jsonl does not exist"):
        DataArguments(train_data=str(tmp_path / "nowhere.jsonl"))
    data = str(write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"]}]))
    with pytest.raises(UserError, match="--eval_index_file_jsonl_path needs --eval_query_file_jsonl_path"):
        DataArguments(train_data=data, eval_index_file_jsonl_path=data)
    with pytest.raises(UserError, match="--query_max_len 0: must be at least 1"):
        DataArguments(train_data=data, query_max_len=0)


def test_what_transformers_leaves_open_is_settled(tmp_path):
    args = RetrieverTrainingArguments(output_dir=str(tmp_path))
    assert args.ddp_find_unused_parameters is False
    assert args.metric_for_best_model is None
    stopped = RetrieverTrainingArguments(
        output_dir=str(tmp_path), early_stopping_patience=2, eval_strategy="epoch", save_strategy="epoch"
    )
    assert (stopped.load_best_model_at_end, stopped.metric_for_best_model) == (True, "eval_MRR@10")
    chosen = RetrieverTrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model="Hit@1", save_strategy="best", eval_strategy="epoch"
    )
    assert chosen.metric_for_best_model == "Hit@1"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"matryoshka_dims": [8, 4], "matryoshka_weights": [1.0]}, "--matryoshka_weights: give as many as"),
        ({"matryoshka_weights": [1.0]}, "--matryoshka_weights: give as many as"),
        ({"save_adapter_only": True}, "--save_adapter_only: there is no adapter without --lora_rank"),
        ({"lora_rank": 2, "save_adapter_only": True, "merge_with_base": 0.5}, "leave out --save_adapter_only"),
    ],
)
def test_flags_of_the_loss_and_of_adapters_that_contradict_each_other_are_refused(tmp_path, flags, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        RetrieverTrainingArguments(output_dir=str(tmp_path), **flags)


@pytest.mark.parametrize(("given", "field"), [("prompt", "instruction"), ("kunde", "group"), ("customer", "customer")])
def test_a_field_to_hold_out_by_may_have_its_own_name_or_the_suites(tmp_path, given, field):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"]}])
    options = DataArguments(train_data=str(data), hold_out=0.5, hold_out_by=given, columns=["group=kunde"])
    assert options.hold_out_field == field


def test_rows_are_not_held_out_by_their_texts(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"]}])
    for name in ("query", "pos", "anchor", "positive"):
        with pytest.raises(UserError, match=f"^--hold_out_by {name}: "):
            DataArguments(train_data=str(data), hold_out=0.5, hold_out_by=name)
