"""A run that is resumed goes on as it began, or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest
from helpers.data import read_jsonl, write_jsonl
from helpers.tiny import make_tiny_bert
from helpers.tiny_runs import flags, refusal

import finetune
from embedding_finetune.training.same_run import warn_of_what_is_lost


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"learning_rate": 5e-3}, "--learning_rate 0.005, where it had 0.001"),
        ({"temperature": 0.5}, "--temperature 0.5, where it had the default"),
        ({"per_device_train_batch_size": 4}, "batches of 4, where it had 8"),
        ({"train_data": "fewer"}, "8 training rows, where it had 30"),
        ({"train_data": "others"}, "other training rows"),
        ({"train_data": "mined anew"}, "other training rows"),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, None),
        ({"logging_steps": 1, "dataloader_num_workers": 1, "tokens_per_sub_batch": 100, "max_steps": 6}, None),
    ],
)
def test_a_run_goes_on_with_the_rows_and_flags_it_was_started_with(
    tiny_bert, mined, tmp_path, capsys, changes, complaint
):
    folder, rows = tmp_path / "out", read_jsonl(mined)
    finetune.main(flags(tiny_bert, mined, folder, save_strategy="steps", save_steps=2))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    data = {
        "fewer": write_jsonl(tmp_path / "fewer.jsonl", rows[:8]),
        "mined anew": write_jsonl(
            tmp_path / "anew.jsonl", [{**rows[0], "neg": ["another"] * len(rows[0]["neg"])}, *rows[1:]]
        ),
        "others": write_jsonl(tmp_path / "others.jsonl", [*rows[1:], rows[0]]),
    }
    changes = {"resume_from_checkpoint": True, "save_strategy": "steps", "save_steps": 2, **changes}
    changes["train_data"] = data.get(changes.get("train_data"), mined)
    argv = flags(tiny_bert, changes.pop("train_data"), folder, **changes)
    if complaint is None:
        finetune.main(argv)
    else:
        assert complaint in refusal(argv, capsys)
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_an_adapter_is_not_trained_on_with_another_base(tiny_bert, mined, tmp_path, capsys):
    pytest.importorskip("peft")
    given = {"lora_rank": 2, "save_strategy": "steps", "save_steps": 2}
    finetune.main(flags(tiny_bert, mined, tmp_path / "out", **given))
    other = make_tiny_bert(tmp_path / "other", seed=5)
    argv = flags(other, mined, tmp_path / "out", resume_from_checkpoint=True, max_steps=6, **given)
    assert "go on with another --model_name_or_path" in refusal(argv, capsys)
    moved = shutil.copytree(tiny_bert, tmp_path / "moved")
    finetune.main(flags(moved, mined, tmp_path / "out", resume_from_checkpoint=True, max_steps=6, **given))


def test_what_a_run_goes_on_without_is_told_in_a_warning(tiny_bert, mined, tmp_path, caplog):
    folder = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 2}
    finetune.main(flags(tiny_bert, mined, folder, **saving))
    whole = folder / "checkpoint-2"
    no_run, of_two = (shutil.copytree(whole, tmp_path / name) for name in ("no_run", "of_two"))
    (no_run / "training_run.json").unlink()
    (of_two / "rng_state.pth").rename(of_two / "rng_state_0.pth")
    shutil.copy(of_two / "rng_state_0.pth", of_two / "rng_state_1.pth")
    of_earlier_version = shutil.copytree(whole, tmp_path / "earlier")
    (of_earlier_version / "training_run.json").write_text('{"run": "ab"}')
    rows_and_flags = "lacks a training_run.json with rows and flags: it cannot be checked that"
    for checkpoint, told in (
        (whole, None),
        (no_run, rows_and_flags),
        (of_earlier_version, rows_and_flags),
        (of_two, "lacks rng_state.pth: another number of processes than 1 wrote it"),
    ):
        caplog.clear()
        finetune.main(flags(tiny_bert, mined, tmp_path / "new", resume_from_checkpoint=checkpoint))
        warnings = [record.message for record in caplog.records if "resume_from_checkpoint" in record.message]
        expected = [] if told is None else [f"warning: --resume_from_checkpoint {checkpoint}: {told}"]
        assert [message[: len(start)] for message, start in zip(warnings, expected, strict=True)] == expected


def test_processes_and_precision_ask_for_files_of_their_own(tmp_path, caplog):
    (tmp_path / "training_run.json").write_text('{"run": "ab", "decided_by": {}}')
    (tmp_path / "rng_state_1.pth").touch()
    warn_of_what_is_lost(str(tmp_path), SimpleNamespace(world_size=3, fp16=True))
    first, second = (record.message.partition("lacks ")[2] for record in caplog.records)
    assert first.startswith("rng_state_0.pth, rng_state_2.pth: another number of processes than 3")
    assert second == "scaler.pt: the scale of the loss for --fp16 begins anew"
    warn_of_what_is_lost(None, SimpleNamespace(world_size=1, fp16=False))
    assert len(caplog.records) == 2


def test_how_batches_are_copied_decides_nothing_also_in_runs_of_earlier_versions(tiny_bert, mined, tmp_path):
    folder = tmp_path / "out"
    finetune.main(flags(tiny_bert, mined, folder, save_strategy="steps", save_steps=2))
    for path in folder.rglob("training_run.json"):
        run = json.loads(path.read_text())
        assert "accelerator_config" not in run["decided_by"]
        run["decided_by"]["accelerator_config"] = "AcceleratorConfig(non_blocking=True)"
        path.write_text(json.dumps(run))
    finetune.main(flags(tiny_bert, mined, folder, save_strategy="steps", save_steps=2, resume_from_checkpoint=True))
