"""The output folder of finetune.py: one run's, and no mixture of several."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers.data import REPOSITORY, read_jsonl, write_jsonl
from helpers.quick_python import quick_python
from helpers.tiny import make_tiny_bert
from helpers.tiny_runs import equal, flags, kill_after_checkpoint, refusal, weights
from transformers import AutoModel

import evaluate
import finetune
from embedding_finetune.training.run_folder import last_checkpoint, run_in, run_of


def test_a_full_run_over_an_adapter_alone_leaves_no_adapter_to_be_applied(tiny_bert, mined, tmp_path):
    folder, fresh = tmp_path / "out", tmp_path / "fresh"
    pytest.importorskip("peft")
    finetune.main(flags(tiny_bert, mined, folder, lora_rank=2, save_adapter_only=True))
    finetune.main(flags(tiny_bert, mined, folder, overwrite_output_dir=True, learning_rate=1e-4))
    finetune.main(flags(tiny_bert, mined, fresh, learning_rate=1e-4))
    assert not (folder / "adapter_config.json").exists()
    loaded = AutoModel.from_pretrained(folder).state_dict()
    expected = AutoModel.from_pretrained(fresh).state_dict()
    assert equal(loaded, expected)
    assert {path.name for path in folder.iterdir()} == {path.name for path in fresh.iterdir()}


def test_an_adapter_alone_over_a_full_run_leaves_no_other_model(tiny_bert, mined, tmp_path):
    pytest.importorskip("peft")
    folder = tmp_path / "out"
    finetune.main(flags(tiny_bert, mined, folder, merge_with_base=0.5))
    (folder / "notes.txt").write_text("mine")
    finetune.main(flags(tiny_bert, mined, folder, overwrite_output_dir=True, lora_rank=2, save_adapter_only=True))
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "notes.txt"} <= names
    assert not {"model.safetensors", "config.json", "merged"} & names


def test_resuming_takes_the_checkpoint_of_its_own_run_and_not_an_earlier_ones(tiny_bert, mined, tmp_path):
    folder, whole = tmp_path / "out", tmp_path / "whole"
    saving = {"save_strategy": "steps", "save_steps": 2}
    finetune.main(flags(tiny_bert, mined, folder, max_steps=10, **saving))
    first = weights(folder)
    second = {"max_steps": 8, "seed": 7, **saving}
    kill_after_checkpoint(flags(tiny_bert, mined, folder, overwrite_output_dir=True, **second), 4)
    assert equal(weights(folder), first), "a killed run must not cost the last good model"
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    # --resume_from_checkpoint wins beside --overwrite_output_dir.
    finetune.main(flags(tiny_bert, mined, folder, overwrite_output_dir=True, resume_from_checkpoint=True, **second))
    finetune.main(flags(tiny_bert, mined, whole, **second))
    assert equal(weights(folder), weights(whole))
    steps = [name for name in sorted(os.listdir(folder)) if "checkpoint" in name]
    assert steps == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert {run_of(folder / name) for name in steps} == {run_of(folder)}


def test_a_run_that_was_killed_before_its_first_checkpoint_has_nothing_to_resume(tiny_bert, mined, tmp_path, capsys):
    folder = tmp_path / "out"
    finetune.main(flags(tiny_bert, mined, folder, save_strategy="steps", save_steps=4))
    with run_in(folder, None, {}):
        pass
    error = refusal(flags(tiny_bert, mined, folder, resume_from_checkpoint=True), capsys)
    assert "holds no finished checkpoint of the run that was started last" in error
    assert len(list(folder.glob("earlier-checkpoint-4-*"))) == 1


def test_a_checkpoint_copied_from_another_run_is_not_resumed(tiny_bert, mined, tmp_path):
    folder, other = tmp_path / "out", tmp_path / "other"
    saving = {"save_strategy": "steps", "save_steps": 2}
    finetune.main(flags(tiny_bert, mined, folder, **saving))
    finetune.main(flags(tiny_bert, mined, other, max_steps=6, **saving))
    shutil.copytree(other / "checkpoint-6", folder / "checkpoint-6")
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


def test_going_back_to_an_earlier_checkpoint_forgets_the_later_ones(tiny_bert, mined, tmp_path):
    folder = tmp_path / "out"
    finetune.main(flags(tiny_bert, mined, folder, max_steps=6, save_strategy="steps", save_steps=2))
    with run_in(folder, str(folder / "checkpoint-4"), {}) as run:
        pass
    assert run["run"] == run_of(folder / "checkpoint-4")
    assert sorted(path.name.split("-")[0] for path in folder.glob("*checkpoint*")) == [
        "checkpoint",
        "checkpoint",
        "earlier",
    ]
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    another = f"""
from embedding_finetune.command_line import UserError
from embedding_finetune.training.run_folder import run_in
for _ in range(2):
    input()
    try:
        with run_in({str(tmp_path)!r}, None, {{}}):
            print("took it", flush=True)
    except UserError as error:
        print(error, flush=True)
"""

    def try_now():
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline()

    with subprocess.Popen(
        [*quick_python(), "-c", another], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        with run_in(tmp_path, None, {}) as run:
            assert try_now().endswith("another run is writing there; give another folder\n")
            assert run_of(tmp_path) == run["run"]
        assert try_now() == "took it\n"
    with run_in(tmp_path, None, {}) as other:
        assert run_of(tmp_path) == other["run"] != run["run"]
    assert os.listdir(tmp_path) == ["training_run.json"]


def test_a_limit_on_checkpoints_counts_those_of_its_own_run_alone(tiny_bert, mined, tmp_path):
    folder = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 2}
    finetune.main(flags(tiny_bert, mined, folder, max_steps=10, **saving))
    argv = flags(tiny_bert, mined, folder, max_steps=6, overwrite_output_dir=True, save_total_limit=1, **saving)
    kill_after_checkpoint(argv, 4)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert len(list(folder.glob("earlier-checkpoint-*"))) == 5


@pytest.mark.parametrize(
    "spelling", ["{0}", "{0}/", "{0}/../bert", "{0}/checkpoint-2/..", "link", "relative", "{0}/.."]
)
def test_a_model_that_the_new_one_would_replace_is_not_trained_from(mined, tmp_path, capsys, monkeypatch, spelling):
    model = make_tiny_bert(tmp_path / "bert")
    (model / "checkpoint-2").mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    output = {"link": "link", "relative": "bert"}.get(spelling, spelling.format(model))
    before = (model / "model.safetensors").read_bytes()
    error = refusal(flags(model, mined, output, overwrite_output_dir=True, merge_with_base=0.5), capsys)
    assert f"--output_dir {output}: the new model would replace {model} of --model_name_or_path" in error
    assert (model / "model.safetensors").read_bytes() == before


def test_data_that_the_new_model_would_replace_is_refused(tiny_bert, mined, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(mined, folder / "vocab.json")
    shutil.copy(mined, folder / "rows.json")
    error = refusal(flags(tiny_bert, folder / "vocab.json", folder, overwrite_output_dir=True), capsys)
    assert "would replace" in error
    finetune.main(flags(tiny_bert, folder / "rows.json", folder, overwrite_output_dir=True))
    assert (folder / "rows.json").read_bytes() == mined.read_bytes()


STATES = {"schedule": "scheduler.pt", "moments": "optimizer.pt", "random_state": "rng_state*.pth"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"resume_from_checkpoint": "{out}"}, "give one of those in it: checkpoint-2, checkpoint-4"),
        ({"resume_from_checkpoint": "{model}"}, "is no finished checkpoint"),
        ({"resume_from_checkpoint": "{file}"}, "there is no such folder"),
        ({"resume_from_checkpoint": "{weights_only}"}, "as --save_only_model leaves them out"),
        *(({"resume_from_checkpoint": f"{{no_{name}}}"}, f"lacks {file}, as --save") for name, file in STATES.items()),
        ({"resume_from_checkpoint": "{no_step}"}, "is no finished checkpoint (trainer_state.json is missing"),
        ({"resume_from_checkpoint": "{damaged_state}"}, "a file of it is damaged"),
        ({"resume_from_checkpoint": "{out}/checkpoint-4", "max_steps": 3}, "is at step 4 already"),
        (
            {"resume_from_checkpoint": "{out}/checkpoint-4", "max_steps": -1, "num_train_epochs": 0.25},
            "--num_train_epochs 0.25 ends at step 1: the checkpoint is at step 4 already",
        ),
        ({"resume_from_checkpoint": "{out}/checkpoint-2", "lora_rank": 2}, "was trained without adapters"),
        ({"resume_from_checkpoint": "{adapters}/checkpoint-2"}, "was trained with --lora_rank 4, and no --lora_rank"),
        ({"resume_from_checkpoint": "{adapters}/checkpoint-2", "lora_rank": 2}, "--lora_rank 4, and --lora_rank is 2"),
        ({"resume_from_checkpoint": "{damaged}"}, "its weights are damaged, or those of another model"),
    ],
)
def test_what_a_run_cannot_go_on_from_is_told_in_one_line(
    tiny_bert, mined, finished_runs, tmp_path, capsys, changes, complaint
):
    places = {**finished_runs, "model": tiny_bert, "file": mined}
    changes = {name: str(value).format(**places) for name, value in changes.items()}
    assert complaint in refusal(flags(tiny_bert, finished_runs["data"], tmp_path / "new", **changes), capsys)


@pytest.fixture(scope="module")
def finished_runs(tiny_bert, tmp_path_factory):
    """Folders of runs of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    row = {"query": "reset", "pos": ["the pump"], "neg": ["the gate", "the desk"]}
    data = write_jsonl(folder / "rows.jsonl", [{**row, "query": f"reset {n}"} for n in range(8)])
    saving = {"save_strategy": "steps", "save_steps": 2}
    finetune.main(flags(tiny_bert, data, folder / "out", **saving))
    finetune.main(flags(tiny_bert, data, folder / "adapters", lora_rank=4, **saving))
    finetune.main(flags(tiny_bert, data, folder / "weights_only", save_only_model=True, **saving))
    shutil.copytree(folder / "out" / "checkpoint-2", folder / "damaged")
    with (folder / "damaged" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    lacking = {**STATES, "step": "trainer_state.json"}
    for name, file in lacking.items():
        shutil.copytree(folder / "out" / "checkpoint-2", folder / f"no_{name}")
        next((folder / f"no_{name}").glob(file)).unlink()
    shutil.copytree(folder / "out" / "checkpoint-2", folder / "damaged_state")
    (folder / "damaged_state" / "optimizer.pt").write_bytes(b"cut short")
    return {
        **{f"no_{name}": folder / f"no_{name}" for name in lacking},
        "damaged_state": folder / "damaged_state",
        "data": data,
        "out": folder / "out",
        "adapters": folder / "adapters",
        "weights_only": folder / "weights_only" / "checkpoint-2",
        "damaged": folder / "damaged",
    }


@pytest.mark.parametrize(
    ("rows", "changes", "complaint"),
    [
        (30, {"train_group_size": 2, "per_device_train_batch_size": 1}, "no query would have a negative"),
        (30, {"train_group_size": 4, "use_inbatch_neg": False}, "no query would have a negative"),
        (1, {}, "no query would have a negative"),
        (30, {"per_device_train_batch_size": 64, "dataloader_drop_last": True}, "30 rows do not fill a batch of 64"),
    ],
)
def test_a_run_that_could_learn_nothing_ends_before_the_model_is_loaded(
    tiny_bert, pairs, tmp_path, capsys, rows, changes, complaint
):
    data = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(pairs)[:rows])
    assert complaint in refusal(flags("no/such-model", data, tmp_path / "out", **changes), capsys)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_always_0_is_a_failure_though_weight_decay_moves_the_weights(tiny_bert, tmp_path, capsys):
    same = [{"query": f"reset {n}", "pos": ["the pump"]} for n in range(16)]
    data = write_jsonl(tmp_path / "rows.jsonl", same)
    error = refusal(flags(tiny_bert, data, tmp_path / "out", weight_decay=0.1), capsys)
    assert "nothing was learned, and no model is saved: the loss was 0 at every step" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_did_not_move_are_a_failure(tiny_bert, mined, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_args, **_kwargs: None)
    error = refusal(flags(tiny_bert, mined, tmp_path / "out"), capsys)
    assert "no weight has moved" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_killed_at_the_end_of_an_epoch_resumes_to_the_same_bits(tiny_bert, mined, tmp_path):
    # 30 rows in batches of 8 are 4 steps an epoch: checkpoint-4 stands between two epochs.
    epochs = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"}
    finetune.main(flags(tiny_bert, mined, tmp_path / "whole", **epochs))
    kill_after_checkpoint(flags(tiny_bert, mined, tmp_path / "parts", **epochs), 4)
    finetune.main(flags(tiny_bert, mined, tmp_path / "parts", resume_from_checkpoint=True, **epochs))
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_gradient_checkpointing_and_accumulation_resume_to_the_same_bits(tiny_bert, mined, tmp_path):
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    given |= {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    finetune.main(flags(tiny_bert, mined, tmp_path / "whole", **given))
    kill_after_checkpoint(flags(tiny_bert, mined, tmp_path / "parts", **given), 3)
    finetune.main(flags(tiny_bert, mined, tmp_path / "parts", resume_from_checkpoint=True, **given))
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_finished_run_makes_no_step_beyond_its_last(tiny_bert, mined, tmp_path):
    """In the middle of an epoch, and with a constant learning rate, which would move the weights."""
    folder = tmp_path / "out"
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    finetune.main(flags(tiny_bert, mined, folder, **given))
    expected = weights(folder)
    finetune.main(flags(tiny_bert, mined, folder, resume_from_checkpoint=True, **given))
    assert equal(weights(folder), expected)
    assert json.loads((folder / "training_summary.json").read_text())["steps"] == 6


def test_a_finished_run_that_is_resumed_once_more_saves_its_model(tiny_bert, mined, tmp_path):
    folder = tmp_path / "out"
    finetune.main(flags(tiny_bert, mined, folder, save_strategy="steps", save_steps=4))
    expected = weights(folder)
    (folder / "model.safetensors").unlink()
    finetune.main(flags(tiny_bert, mined, folder, save_strategy="steps", save_steps=4, resume_from_checkpoint=True))
    assert equal(weights(folder), expected)


def test_texts_that_are_cut_are_counted_in_the_first_epoch(tiny_bert, tmp_path, caplog):
    # "reset the pump" is 3 tokens, 5 with [CLS] and [SEP]; each passage is 8 tokens and those two.
    rows = [{"query": "reset the pump", "pos": ["the red valve is on the north desk"], "neg": ["call"]}] * 4
    rows += [{"query": "call", "pos": ["the gate"], "neg": ["valve"]}] * 4
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    lengths = {"query_max_len": 4, "passage_max_len": 9, "num_train_epochs": 2, "max_steps": -1}
    with caplog.at_level("INFO"):
        finetune.main(flags(tiny_bert, data, tmp_path / "out", **lengths))
    lines = [line for line in caplog.messages if "were cut" in line]
    assert lines == [
        "4 of 8 query texts of the first epoch were cut to --query_max_len 4",
        "4 of 16 passage texts of the first epoch were cut to --passage_max_len 9",
    ]


def test_an_adapter_that_lay_in_the_folder_changes_no_measure(tiny_bert, mined, candidates, tmp_path):
    """The report that this came from: MRR@10 of the old adapter over the new weights."""
    pytest.importorskip("peft")
    folder, fresh = tmp_path / "out", tmp_path / "fresh"
    finetune.main(flags(tiny_bert, mined, folder, lora_rank=8, save_adapter_only=True, learning_rate=1e-2))
    finetune.main(flags(tiny_bert, mined, folder, overwrite_output_dir=True, learning_rate=1e-6, max_steps=1))
    finetune.main(flags(tiny_bert, mined, fresh, learning_rate=1e-6, max_steps=1))

    def metrics(model):
        argv = ["--model_name", model, "--index_file_jsonl_path", candidates, "--query_file_jsonl_path", mined]
        return evaluate.main(list(map(str, argv)))

    assert np.allclose(list(metrics(folder).values()), list(metrics(fresh).values()))
