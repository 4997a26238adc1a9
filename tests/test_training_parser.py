"""The command line of finetune.py: its help, and that its dataclasses check themselves."""

import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import finetune
from embedding_finetune.mining.arguments import CHOICE_FLAGS
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.flags import REFUSED
from embedding_finetune.training.parser import GROUPS, suit_the_device

THEIRS = {field.name for field in fields(TrainingArguments)}
KINDS = (ModelArguments, DataArguments, RetrieverTrainingArguments)
ALL = {*(field.name for kind in KINDS for field in fields(kind) if field.init), *CHOICE_FLAGS}


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
    titles, own = list(sections)[1:], len(GROUPS)
    assert titles[:4] == ["model", "recipe and length", "data", "mining before each round"]
    assert titles[4:own] == ["loss", "memory and speed", "evaluation during training", "output"]
    assert {title: sections[title] for title in titles[:own]} == {t: flags.split() for t, flags in GROUPS.items()}
    assert sections["model"][0] == "model_name_or_path"
    assert sections["data"][0] == "train_data"
    assert {flag for title in titles[:own] for flag in sections[title]} == (ALL - THEIRS) | {
        *("output_dir", "resume_from_checkpoint"),
        *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
    }


def test_help_lists_every_flag_once_and_the_refused_ones_last(sections):
    flags = [flag for title in list(sections)[1:] for flag in sections[title]]
    assert sorted(flags) == sorted(ALL)
    assert set(flags[-len(REFUSED) :]) == set(REFUSED)


def test_help_begins_with_a_usage_of_one_line_and_the_commands_of_the_docstring(sections):
    usage, description = sections["top"].split("\n\n", 1)
    assert usage.startswith("usage: finetune.py --model_name_or_path MODEL --train_data FILE --output_dir DIR")
    assert "\n" not in usage
    assert description.startswith(finetune.__doc__.strip())


@pytest.mark.parametrize(("ranks", "cpus", "workers"), [("1", 16, 8), ("8", 16, 1), ("2", 16, 4), ("1", 1, 1)])
def test_on_an_accelerator_workers_make_batches_and_nobody_waits(tmp_path, monkeypatch, ranks, cpus, workers):
    monkeypatch.setattr(RetrieverTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cpus)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    args = RetrieverTrainingArguments(str(tmp_path))
    args.dataloader_pin_memory = True  # transformers found no accelerator and switched it off
    suit_the_device(args, set())
    assert args.dataloader_num_workers == workers
    assert args.logging_nan_inf_filter is False
    assert args.accelerator_config.non_blocking


def test_without_shared_memory_there_are_no_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(RetrieverTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**26))
    args = RetrieverTrainingArguments(str(tmp_path))
    suit_the_device(args, set())
    assert args.dataloader_num_workers == 0


def test_what_the_user_gave_stands_and_a_cpu_keeps_the_defaults(tmp_path, monkeypatch):
    for kind in ("cpu", "mps"):
        monkeypatch.setattr(RetrieverTrainingArguments, "device", torch.device(kind))
        args = RetrieverTrainingArguments(str(tmp_path))
        suit_the_device(args, set())
        assert (args.dataloader_num_workers, args.logging_nan_inf_filter) == (0, True)
        assert not args.accelerator_config.non_blocking  # pageable memory may be used anew before it is copied
    monkeypatch.setattr(RetrieverTrainingArguments, "device", torch.device("cuda"))
    suit_the_device(args, {"dataloader_num_workers"})
    assert (args.dataloader_num_workers, args.logging_nan_inf_filter) == (0, False)
