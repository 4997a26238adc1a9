"""The command that trains on all rows with what a run has settled."""

import shlex

import pytest
from helpers.data import write_jsonl

import finetune
from embedding_finetune.training.all_rows import command_on_all_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"]}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(flags, **settled):
    """The command for these flags; it has to be one that finetune.py takes."""
    argv = ["--model_name_or_path", "m", "--train_data", "rows.jsonl", "--output_dir", "tuned/", *shlex.split(flags)]
    settled = {"best_step": None, "steps": 50, "epochs": 2.5, **settled}
    told = command_on_all_rows(argv, finetune.parse_arguments(argv)[2], **settled)
    if told is None:
        return None
    program, script, *words = shlex.split(told)
    assert (program, script) == ("python", "finetune.py")
    finetune.parse_arguments(words)
    return " ".join(words)


START = "--model_name_or_path m --train_data rows.jsonl"


def test_all_is_as_it_was_but_what_is_about_held_out_rows(folder):
    told = command('--hold_out 0.1 --hold-out-by=question --bf16 --query_instruction_for_retrieval "find: "')
    assert told == f"{START} --bf16 --query_instruction_for_retrieval find:  --output_dir tuned_all_rows"


CHOSEN = "--hold_out 0.2 --eval_strategy epoch --save_strategy epoch --early_stopping_patience 3"


def test_the_length_that_chose_itself_stands_in_epochs_since_all_rows_take_more_steps(folder):
    assert command(f"{CHOSEN} --num_train_epochs 9", best_step=30) == (
        f"{START} --save_strategy epoch --num_train_epochs 1.5 --output_dir tuned_all_rows"  # 30 of 50 steps
    )
    assert command(f"{CHOSEN} --max_steps 70", best_step=30) == (
        f"{START} --save_strategy epoch --max_steps 30 --output_dir tuned_all_rows"
    )


def test_minutes_become_the_epochs_that_they_were_enough_for(folder):
    assert command("--hold_out 9 --minutes 5") == f"{START} --num_train_epochs 2.5 --output_dir tuned_all_rows"


def test_rounds_after_the_best_weights_are_left_out(folder):
    rounds = "--mining_rounds 2 --train_group_size 2"
    assert command(f"{CHOSEN} {rounds}", best_step=25, rounds=1) == (
        f"{START} --save_strategy epoch --train_group_size 2 --num_train_epochs 1.25 --mining_rounds 1 "
        "--output_dir tuned_all_rows"
    )


def test_queries_of_the_users_own_go_on_to_be_measured(folder):
    file = "--eval_query_file_jsonl_path rows.jsonl"
    assert command(f"{CHOSEN} {file}", best_step=20) == (
        f"{START} --eval_strategy epoch --save_strategy epoch {file} --num_train_epochs 1 --output_dir tuned_all_rows"
    )


def test_checkpoints_of_the_best_and_a_rate_that_follows_a_measure_need_held_out_rows(folder):
    chosen = "--hold_out 0.2 --eval_strategy epoch"
    assert command(f"{chosen} --save_strategy best --save_total_limit 2") == f"{START} --output_dir tuned_all_rows"
    assert command(f"{chosen} --lr_scheduler_type reduce_lr_on_plateau") is None


def test_several_processes_are_started_as_such(folder, monkeypatch):
    argv = [*START.split(), "--output_dir", "tuned", "--hold_out", "0.1"]
    args = finetune.parse_arguments(argv)[2]
    monkeypatch.setattr(type(args), "world_size", 2)
    told = command_on_all_rows(argv, args, best_step=None, steps=1, epochs=1)
    assert told == f"torchrun --nproc-per-node 2 finetune.py {START} --output_dir tuned_all_rows"


def test_passages_that_stay_are_trained_against_with_all_rows_too(folder):
    write_jsonl(folder / "pool.jsonl", [{"text": "p"}])
    pool = "--hold_out 0.1 --candidate_pool pool.jsonl"
    frozen = command(f"--freeze_passages True {pool}")
    assert frozen == f"{START} --freeze_passages True --candidate_pool pool.jsonl --output_dir tuned_all_rows"
    assert "candidate_pool" not in command(f"--freeze_passages False {pool}")
