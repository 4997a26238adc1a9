"""The folder that holds a model: its files are replaced together, and nothing of the model before stays among them.

A file that the new model lacks must go: transformers applies an adapter_config.json that lies beside other weights.
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
from embedding_finetune.process import uninterrupted

_STAGING = ".saving-"
_ENTRANCES = ("config.json", "adapter_config.json", "modules.json")
"""What loaders look for first: a folder without them holds no model."""
_FOLDERS = re.compile(r"\d+_[A-Z]\w*|adapter|merged")
"""Where models have folders; they are a model's when they hold nothing else."""


@contextmanager
def model_replaced(folder: AnyPath) -> Iterator[Path]:
    """A new folder to write a model into; when the block ends without an error, its files become those of `folder`.

    Until then the model in `folder` stays as it is, and after an error, a full disk for instance, too. Files that are
    no model's are left alone. Raises UserError when the files cannot be written.
    """
    folder = Path(folder)
    staging = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
        yield staging
        with uninterrupted():
            _replace(folder, staging)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model cannot be written: {first_line(error)}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def remove_unfinished(folder: AnyPath) -> None:
    """Remove what killed runs had begun to write into `folder`."""
    for path in Path(folder).glob(f"{_STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _replace(folder: Path, staging: Path) -> None:
    staged = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    # A kill in the middle leaves a folder that cannot be loaded, rather than one that loads as something else.
    for name in _ENTRANCES:
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and _is_model_folder(path):
            shutil.rmtree(path)
        elif is_model_file(path.name) and Path(path.name) not in staged:
            path.unlink()
    mode = 0o666 & ~_umask()
    for written in sorted(staged, key=lambda written: str(written) in _ENTRANCES):
        (folder / written).parent.mkdir(exist_ok=True)
        (staging / written).chmod(mode)  # safetensors' own files are for their owner alone
        os.replace(staging / written, folder / written)


def _is_model_folder(path: Path) -> bool:
    files = [file for file in path.rglob("*") if not file.is_dir()]
    return _FOLDERS.fullmatch(path.name) is not None and all(is_model_file(file.name) for file in files)


def _umask() -> int:
    mask = os.umask(0)  # it can be read by setting it only
    os.umask(mask)
    return mask
