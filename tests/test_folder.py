"""A model's folder: all of the new model or all of the old one, and nothing of both."""

import os
import signal
import subprocess

import pytest
from helpers.data import REPOSITORY
from helpers.quick_python import quick_python

from embedding_finetune.command_line import UserError
from embedding_finetune.model.folder import model_replaced, remove_unfinished

OLD = {
    "config.json": "old",
    "adapter_config.json": "old",
    "adapter_model.safetensors": "old",
    "model-00001-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old",
    "pytorch_model.bin": "old",
    "vocab.txt": "old",
    "sentence_xlm-roberta_config.json": "old",
    "2_Normalize/config.json": "old",
    "adapter/adapter_config.json": "old",
    "merged/config.json": "old",
}
USERS = {
    "train.jsonl": "rows",
    "notes/model.safetensors": "x",
    "1_my_notes/a.txt": "x",
    "checkpoint-3/config.json": "x",
}
NEW = {"config.json": "new", "model.safetensors": "new", "1_Pooling/config.json": "new"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_of_a_replaced_model_nothing_stays_and_the_users_files_do(tmp_path):
    write(tmp_path, OLD | USERS)
    with model_replaced(tmp_path) as staging:
        write(staging, NEW)
        assert contents(tmp_path).items() >= (OLD | USERS).items()
    assert contents(tmp_path) == NEW | USERS


def test_all_files_can_be_read_by_those_who_may_read_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        with model_replaced(tmp_path) as staging:
            write(staging, NEW)
            (staging / "model.safetensors").chmod(0o600)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o640}


def test_a_folder_that_only_has_a_name_like_a_models_stays_with_all_that_is_in_it(tmp_path):
    users = {"2024_Reports/r.txt": "x", "merged/important.csv": "x", "1_Data/train.jsonl": "x", "adapter/a.py": "x"}
    write(tmp_path, OLD | users)
    with model_replaced(tmp_path) as staging:
        write(staging, NEW)
    mixed = {"adapter/adapter_config.json": "old", "merged/config.json": "old"}  # beside files of the user's
    assert contents(tmp_path) == NEW | users | mixed


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a fault"), KeyboardInterrupt()])
def test_a_model_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path, error):
    write(tmp_path, OLD)

    def save():
        with model_replaced(tmp_path) as staging:
            write(staging, NEW)
            raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        save()
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_while_files_are_renamed_leaves_no_folder_that_loads_as_a_mix(tmp_path, renames):
    write(tmp_path, OLD)
    program = f"""
import os, signal
from pathlib import Path
from embedding_finetune.model import folder as model_folder
rename, left = os.replace, [{renames}]
def replace(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(*paths)
model_folder.os.replace = replace
with model_folder.model_replaced({str(tmp_path)!r}) as staging:
    for name, text in {NEW!r}.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_text(text)
"""
    status = subprocess.run([*quick_python(), "-c", program], cwd=REPOSITORY, check=False).returncode
    assert status == (0 if renames == 3 else -signal.SIGKILL)
    left = {name: text for name, text in contents(tmp_path).items() if not name.startswith(".saving-")}
    if "config.json" in left:
        assert left == NEW
    assert "adapter_config.json" not in left
    remove_unfinished(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".saving-")]
