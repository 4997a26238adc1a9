"""The command line of finetune.py: its help, and that its dataclasses check themselves."""

import re
from dataclasses import fields

import pytest
from helpers.data import write_jsonl
from transformers import TrainingArguments

import finetune
from embedding_finetune.command_line import UserError
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.flags import REFUSED
from embedding_finetune.training.parser import GROUPS

THEIRS = {field.name for field in fields(TrainingArguments)}
ALL = {field.name for kind in (ModelArguments, DataArguments, RetrieverTrainingArguments) for field in fields(kind)}


@pytest.fixture(scope="module")
def sections():
    """Title -> flags, in the order of the help."""
    with pytest.MonkeyPatch.context() as patch:
        import io
        import sys

        patch.setattr(sys, "stdout", io.StringIO())
        with pytest.raises(SystemExit) as stop:
            finetune.main(["--help"])
        text = sys.stdout.getvalue()
    assert stop.value.code == 0
    parts = re.split(r"(?m)^(\w.*):$", text)
    return {"top": parts[0]} | {
        title: re.findall(r"(?m)^  --(?!no_)(\w+)", body) for title, body in zip(parts[1::2], parts[2::2])
    }


def test_help_shows_the_suites_own_flags_first_in_groups_by_what_a_user_wants(sections):
    titles = list(sections)[1:]
    assert titles[:6] == ["model", "data", "loss", "memory and speed", "evaluation during training", "output"]
    assert {title: sections[title] for title in titles[:6]} == {t: flags.split() for t, flags in GROUPS.items()}
    assert sections["model"][0] == "model_name_or_path"
    assert sections["data"][0] == "train_data"
    assert {flag for title in titles[:6] for flag in sections[title]} == (ALL - THEIRS) | {"output_dir"}


def test_help_lists_every_flag_once_and_the_refused_ones_last(sections):
    flags = [flag for title in list(sections)[1:] for flag in sections[title]]
    assert sorted(flags) == sorted(ALL)
    assert set(flags[-len(REFUSED) :]) == set(REFUSED)


def test_help_begins_with_a_usage_of_one_line_and_the_commands_of_the_docstring(sections):
    usage, description = sections["top"].split("\n\n", 1)
    assert usage.startswith("usage: finetune.py --model_name_or_path MODEL --train_data FILE --output_dir DIR")
    assert "\n" not in usage
    assert description.startswith(finetune.__doc__.strip())


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
