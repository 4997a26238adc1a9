"""Writing files whole or not at all, and checking paths before anything is computed."""

import gzip
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from embedding_finetune.command_line import UserError

AnyPath = str | os.PathLike[str]

_MODEL_FILES = re.compile(
    r"(model|pytorch_model|adapter_model)\b.*\.(safetensors|bin)(\.index\.json)?"
    r"|(config|adapter_config|adapter_base|modules|generation_config|config_sentence_transformers|sentence_\S+_config)\.json"
    r"|(router_config|passage_model)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|chat_template\.jinja"
    r"|vocab\.txt|merges\.txt|bpe\.codes|(spiece|sentencepiece|sentencepiece\.bpe|tokenizer|spm)\.model"
    r"|training_queries\.npy|training_summary\.json|training_run\.json"
)


@contextmanager
def atomic_writer(path: AnyPath) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends without an error, and is removed otherwise.

    Raises UserError when it cannot be written, for instance on a full disk.
    """
    target = Path(os.path.realpath(path))
    # A random name: process numbers are not unique where containers share a folder.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as raw:
            if target.name.lower().endswith(".gz"):
                # No file name and no time in the gzip header: the same records give the same bytes.
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                    yield cast(IO[bytes], file)
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it is not there, or the disk has become read-only
            temporary.unlink()


def is_model_file(name: str) -> bool:
    """Whether this suite, transformers, peft or others give this name to a file of a model."""
    return _MODEL_FILES.fullmatch(name) is not None


def require_data(flag: str, path: AnyPath) -> None:
    """Raise UserError naming `flag` unless `path` is an existing file or folder."""
    if not os.path.exists(path):
        raise UserError(f"{flag}: {path} does not exist")


def require_writable(flag: str, path: AnyPath) -> None:
    """Raise UserError naming `flag` unless a file can be written at `path`."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise UserError(f"{flag}: the folder {folder} does not exist; create it first")
    if os.path.isdir(path):
        raise UserError(f"{flag}: {path} is a folder; give a file name")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{flag}: {path} is not a regular file, and would be replaced by one; give a file name")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag}: the folder {folder} is not writable")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # for instance, the name is too long
        raise UserError(f"{flag}: {path} cannot be written: {error.strerror}") from error


def require_folder(flag: str, path: AnyPath, *, may_be_read_only: bool = False) -> None:
    """Raise UserError naming `flag` unless `path` is a writable folder, or one can be created there.

    may_be_read_only: a folder that is there is enough.
    """
    try:
        os.lstat(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # for instance, the name is too long
            raise UserError(f"{flag} {path}: cannot be created: {error.strerror}") from error
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag} {path}: {existing} is a file; give a folder")
    if not os.access(existing, os.X_OK):
        raise UserError(f"{flag} {path}: {existing} cannot be read")
    if not os.access(existing, os.W_OK) and not (may_be_read_only and os.path.isdir(path)):
        raise UserError(f"{flag} {path}: {existing} is not writable")


def require_apart(inputs: Mapping[str, str | None], outputs: Mapping[str, str | None]) -> None:
    """Raise UserError where an output is also an input, or in an input folder, or another output.

    flag -> path, None where it is not given. Two paths may name one file: a relative one, one through a link, on some
    disks one in another case.
    """
    given = [(flag, path) for flag, path in outputs.items() if path is not None]
    for number, (flag, path) in enumerate(given):
        for other, other_path in inputs.items():
            if other_path is not None and _is_in_folder(path, other_path):
                raise UserError(f"{flag} {path} is in the folder of {other}, whose files are data; give another one")
            if other_path is not None and os.path.exists(path) and os.path.samefile(path, other_path):
                raise UserError(f"{flag} {path} is also the file of {other}, and would replace it; give another one")
        for other, other_path in given[:number]:
            if _is_same_place(path, other_path):
                raise UserError(f"{flag} {path} is also the file of {other}; give another one")


def require_outside_models(outputs: Mapping[str, str | None], models: Iterable[str | None]) -> None:
    """Raise UserError where an output would replace a file in a model's folder; flag -> path, None where not given."""
    folders = [Path(os.path.realpath(model)) for model in models if model is not None and os.path.isdir(model)]
    for flag, path in outputs.items():
        if path is None or not os.path.exists(path) or not is_model_file(os.path.basename(path)):
            continue
        if any(folder in Path(os.path.realpath(path)).parents for folder in folders):
            raise UserError(f"{flag} {path} is a file of the model and would be replaced; give another one")


def _is_in_folder(path: str, folder: str) -> bool:
    parent = os.path.dirname(os.path.realpath(path))
    return os.path.isdir(folder) and os.path.isdir(parent) and os.path.samefile(parent, folder)


def _is_same_place(path: str, other: str) -> bool:
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    # On some disks two names that differ only in case are one file, which shows only once the file exists.
    return os.path.realpath(path).casefold() == os.path.realpath(other).casefold()
