"""Saving and loading while training: checkpoints are whole or not there, whatever ends the run."""

import json
import os
import signal
import subprocess

import pytest
from helpers.data import REPOSITORY
from helpers.quick_python import quick_python
from helpers.running import wait_until
from helpers.tiny_runs import flags
from safetensors.torch import load_file

import finetune
from embedding_finetune.training.run_folder import last_checkpoint


def test_a_full_disk_while_saving_is_one_line_and_leaves_nothing_half_written(tiny_bert, mined, tmp_path):
    folder = tmp_path / "out"
    argv = flags(tiny_bert, mined, folder, save_strategy="steps", save_steps=2)
    limit = (tiny_bert / "model.safetensors").stat().st_size + 10_000  # too little for the optimizer's state
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    program = f"{limited}; import finetune; finetune.main({argv!r})"
    command = [*quick_python(), "-c", program]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "checkpoint-2: cannot be written" in result.stderr.splitlines()[-1]
    assert os.listdir(folder) == ["training_run.json"]


def test_sigterm_ends_training_with_143_and_leaves_no_scratch_and_whole_checkpoints(tiny_bert, mined, tmp_path):
    folder, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    argv = flags(tiny_bert, mined, folder, save_strategy="steps", max_steps=100_000, save_steps=3, save_total_limit=2)
    with subprocess.Popen(
        [*quick_python(), REPOSITORY / "finetune.py", *argv],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: last_checkpoint(folder) is not None, process)
        assert any(scratch.iterdir())
        process.send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 143, error
    assert error.rstrip().endswith("finetune.py: terminated")
    assert "Traceback" not in error
    assert not list(scratch.glob("embedding_finetune_*"))
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        assert load_file(checkpoint / "model.safetensors")


def test_a_signal_after_a_checkpoint_was_finished_leaves_it(tiny_bert, mined, tmp_path, monkeypatch):
    """Old checkpoints are removed after the new one is whole; a run may be ended there too."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", interrupted)
    with pytest.raises(SystemExit) as stop:
        finetune.main(flags(tiny_bert, mined, tmp_path / "out", save_strategy="steps", save_steps=2))
    assert stop.value.code == 130
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
