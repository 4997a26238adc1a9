"""The folder that holds a model: its files are replaced together, and none of the previous model's files remain.

A file that the new model lacks must go: transformers applies an adapter_config.json beside whatever weights it finds.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.files import AnyPath, is_model_file
from embedding_finetune.model.card import is_own_card
from embedding_finetune.process import uninterrupted

_STAGING_PREFIX = ".saving-"
_ENTRY_FILES = ("config.json", "adapter_config.json", "modules.json")
"""The files that loaders look for first: a folder without them holds no model."""
SUBFOLDERS = re.compile(r"((query|document)_)?\d+_[A-Z]\w*|adapter|merged")
"""The names of a model's subfolders. A folder of such a name is a model's if it holds only files of a model."""


@contextmanager
def model_replaced(folder: AnyPath) -> Iterator[Path]:
    """A new folder to write a model into; when the block ends without an error, its files replace those in `folder`.

    Until then, and after an error such as a full disk, the model in `folder` stays as it is. Files that do not belong
    to a model are left alone. Raises UserError when the files cannot be written.
    """
    folder = Path(folder)
    staging = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=folder))
        yield staging
        with uninterrupted():
            _replace(folder, staging)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model cannot be written: {first_line(error)}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def remove_unfinished(folder: AnyPath) -> None:
    """Remove the unfinished models that killed runs left in `folder`."""
    for path in Path(folder).glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _replace(folder: Path, staging: Path) -> None:
    staged = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    # A kill in the middle leaves a folder that cannot be loaded, not one that loads as another model.
    for name in _ENTRY_FILES:
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and _is_model_folder(path):
            shutil.rmtree(path)
        elif _is_a_models(path) and Path(path.name) not in staged:
            path.unlink()
    mode = 0o666 & ~_umask()
    for written in sorted(staged, key=lambda written: str(written) in _ENTRY_FILES):
        (folder / written).parent.mkdir(exist_ok=True)
        (staging / written).chmod(mode)  # only their owner can read the files that safetensors writes
        os.replace(staging / written, folder / written)


def _is_model_folder(path: Path) -> bool:
    files = [file for file in path.rglob("*") if not file.is_dir()]
    return SUBFOLDERS.fullmatch(path.name) is not None and all(map(_is_a_models, files))


def _is_a_models(file: Path) -> bool:
    return is_model_file(file.name) or is_own_card(file)


def _umask() -> int:
    mask = os.umask(0)  # only setting it tells what it was
    os.umask(mask)
    return mask
