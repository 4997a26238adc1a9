"""Command lines of finetune.py for tiny runs, and what they leave."""

import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import finetune
from helpers.data import REPOSITORY
from helpers.quick_python import quick_python


def flags(model, data, folder, **changes):
    given = {
        "model_name_or_path": model,
        "train_data": data,
        "output_dir": folder,
        "train_group_size": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 4,
        **changes,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def refusal(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def kill_after_checkpoint(argv, step):
    """Run finetune.py, and kill -9 it once checkpoint-`step` is written."""
    program = f"""
import os, signal, finetune
from embedding_finetune.training import trainer
save = trainer.RetrievalTrainer._save_checkpoint
def save_and_die(self, *args):
    save(self, *args)
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.RetrievalTrainer._save_checkpoint = save_and_die
finetune.main({argv!r})
"""
    result = subprocess.run(
        [*quick_python(), "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
