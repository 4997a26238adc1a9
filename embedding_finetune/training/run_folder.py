"""The output folder of a training run: what may be written there, and which of its checkpoints are the run's own.

A run has an identity, a random token in training_run.json: the folder holds that of the run that was started last, and
each checkpoint holds that of the run that wrote it. Checkpoints of earlier runs are renamed when a run starts, so that
nothing can take them for its own, and removed when its model is saved.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from embedding_finetune.command_line import UserError
from embedding_finetune.data.jsonl import data_files
from embedding_finetune.files import atomic_writer, require_folder
from embedding_finetune.model.adapters import adapter_rank
from embedding_finetune.model.folder import is_model_file, remove_unfinished

if TYPE_CHECKING:
    from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments

logger = logging.getLogger(__name__)

_TRAINER_STATE, _OPTIMIZER_STATE = "trainer_state.json", "optimizer.pt"
"""Transformers' names of two files of a checkpoint."""
_RUN_FILE = "training_run.json"
_LOCK_FILE = ".running"
_EARLIER = "earlier-checkpoint-"


def check_output_dir(
    model_args: "ModelArguments", data_args: "DataArguments", args: "RetrieverTrainingArguments"
) -> None:
    """Raise UserError where training could not write, or would write over something unasked or something it reads."""
    if not args.output_dir:
        raise UserError("--output_dir is required")
    # Missing folders above it are made: `BAAI/bge-base-en-v1.5_finetuned` has to work beside a model from the hub.
    require_folder("--output_dir", args.output_dir)
    for flag in ("model_name_or_path", "config_name", "tokenizer_name"):
        _check_is_not_replaced(f"--{flag}", getattr(model_args, flag), args.output_dir)
    for flag in ("train_data", "eval_query_file_jsonl_path", "eval_index_file_jsonl_path"):
        _check_data_is_not_replaced(f"--{flag}", getattr(data_args, flag), args.output_dir)
    if resumes(args) or args.overwrite_output_dir or not os.path.isdir(args.output_dir):
        return
    if os.listdir(args.output_dir):
        raise UserError(
            f"--output_dir {args.output_dir} is not empty; give another folder, "
            "or --overwrite_output_dir True, or --resume_from_checkpoint True"
        )


def _check_is_not_replaced(flag: str, model: str | None, output_dir: str) -> None:
    """Raise UserError where a model that is read lies where the new one is written."""
    if model is None or not os.path.exists(model) or not os.path.isdir(output_dir):
        return
    source, output = Path(os.path.realpath(model)), Path(os.path.realpath(output_dir))
    inside = any(os.path.samefile(folder, output) for folder in (source, *source.parents))
    is_module = output.parent == source and re.fullmatch(r"\d+_\w+", output.name)
    if inside or is_module:
        raise UserError(
            f"--output_dir {output_dir}: the new model would replace {model} of {flag}; give another folder"
        )


def _check_data_is_not_replaced(flag: str, data: str | None, output_dir: str) -> None:
    """Raise UserError where data that is read has the place and name of a file that is written."""
    if data is None or not os.path.exists(data) or not os.path.isdir(output_dir):
        return
    for path in data_files(data):
        if os.path.samefile(os.path.realpath(path.parent), output_dir) and is_model_file(path.name):
            raise UserError(
                f"--output_dir {output_dir}: the new model would replace {path} of {flag}; give another folder"
            )


def resumes(args: "RetrieverTrainingArguments") -> bool:
    """Whether --resume_from_checkpoint asks for anything."""
    return (args.resume_from_checkpoint or "false").lower() != "false"


def resume_point(args: "RetrieverTrainingArguments") -> str | None:
    """The checkpoint folder that --resume_from_checkpoint asks for: itself, or the run's last one for True.

    Raises UserError where there is none that this run could go on from.
    """
    if not resumes(args):
        return None
    folder = args.resume_from_checkpoint
    if folder.lower() == "true":
        folder = last_checkpoint(args.output_dir)
        if folder is None:
            raise UserError(
                f"--resume_from_checkpoint True: {args.output_dir} holds no finished checkpoint of the run that was "
                "started last; leave the flag out to start anew"
            )
    _check_is_checkpoint(folder)
    rank = adapter_rank(folder)
    if rank != args.lora_rank:
        given = "no --lora_rank is given" if args.lora_rank is None else f"--lora_rank is {args.lora_rank}"
        trained = "without adapters" if rank is None else f"with --lora_rank {rank}"
        raise UserError(f"--resume_from_checkpoint {folder}: was trained {trained}, and {given}")
    return folder


def _check_is_checkpoint(folder: str) -> None:
    what = f"--resume_from_checkpoint {folder}"
    if not os.path.isdir(folder):
        raise UserError(f"{what}: there is no such folder")
    if not is_finished(folder):
        inside = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
        remedy = f"give one of those in it: {', '.join(inside)}" if inside else "give a checkpoint-N folder, or True"
        raise UserError(f"{what}: is no finished checkpoint ({_TRAINER_STATE} is missing or damaged); {remedy}")
    if not (Path(folder) / _OPTIMIZER_STATE).exists():
        raise UserError(
            f"{what}: holds no state of the optimizer, as --save_only_model saves it; "
            "give it as --model_name_or_path to train on from its weights"
        )


@contextmanager
def run_in(output_dir: str, checkpoint: str | None) -> Iterator[str | None]:
    """Make the folder this run's for the block; gives the run's identity.

    checkpoint: what resume_point gave. A run that goes on from one that has no identity has none either. Checkpoints
    that are not the run's own are put away. Raises UserError while another run writes into the folder.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("wb") as lock:
        _take(lock, output_dir)
        try:
            yield _start_run(folder, checkpoint)
        finally:
            (folder / _LOCK_FILE).unlink(missing_ok=True)


def _take(lock: BinaryIO, output_dir: str) -> None:
    """Lock a file until it is closed, however the process ends; workers that outlive it for a moment do not hold it."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"--output_dir {output_dir}: another run is writing there; give another folder") from error
    except OSError:  # some network file systems have no locks
        logger.info("%s: the file system has no locks; start no other run there", output_dir)


def _start_run(folder: Path, checkpoint: str | None) -> str | None:
    run = secrets.token_hex(16) if checkpoint is None else run_of(checkpoint)
    step = 0 if checkpoint is None else _state(Path(checkpoint)).get("global_step", 0)
    remove_unfinished(folder)
    for path in _checkpoints(folder):
        # What came after the checkpoint that is resumed from is not part of this run either.
        if run_of(path) != run or _step(path) > step:
            put_away = path.with_name(f"{_EARLIER}{_step(path)}-{secrets.token_hex(4)}")
            logger.info("%s is of an earlier run: now %s, until the new model is saved", path, put_away.name)
            path.rename(put_away)
    if run is not None:
        write_run(folder, run)
    return run


def remove_earlier_runs(output_dir: str) -> None:
    """Remove the checkpoints that run_in put away."""
    for path in Path(output_dir).glob(f"{_EARLIER}*"):
        shutil.rmtree(path, ignore_errors=True)


def run_of(folder: str | os.PathLike) -> str | None:
    """The identity of the run that a folder belongs to; None where it has none."""
    try:
        return json.loads((Path(folder) / _RUN_FILE).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_run(folder: str | os.PathLike, run: str) -> None:
    """Say which run a folder belongs to."""
    with atomic_writer(Path(folder) / _RUN_FILE) as file:
        file.write(json.dumps({"run": run}).encode() + b"\n")


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint of the folder's run that was written to its end, None when there is none."""
    run = run_of(output_dir)
    own = [path for path in _checkpoints(Path(output_dir)) if run_of(path) == run and is_finished(path)]
    return str(max(own, key=_step)) if own else None


def is_finished(checkpoint: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return _state(Path(checkpoint)) is not None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-N folders."""
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def _step(checkpoint: Path) -> int:
    """N of a checkpoint-N folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _state(checkpoint: Path) -> dict | None:
    """What the Trainer keeps of a run; None where the folder is no checkpoint that was written to its end.

    The file is written last: a run that is killed while it saves leaves none, or half of one.
    """
    try:
        state = json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None
