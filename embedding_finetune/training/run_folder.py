"""The output folder of a training run: what may be written there, and which of its checkpoints are the run's own.

A run is known by training_run.json: a random token, and what decides about its result, its data and its flags. The
folder holds that of the run that was started last. Each checkpoint holds that of the run that wrote it. When a run
starts, checkpoints of earlier runs are renamed, so that nothing can take them for its own. They are removed when its
model is saved.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from embedding_finetune.command_line import UserError
from embedding_finetune.data.formats import data_files
from embedding_finetune.files import AnyPath, atomic_writer, is_model_file, require_folder
from embedding_finetune.model.adapters import adapter_rank
from embedding_finetune.model.card import check_card_is_not_replaced
from embedding_finetune.model.folder import SUBFOLDERS, remove_unfinished
from embedding_finetune.training.held_out import FILES as HELD_OUT_FILES
from embedding_finetune.training.held_out import check_held_out_files

if TYPE_CHECKING:
    from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments

logger = logging.getLogger(__name__)

Run = dict[str, Any]
"""What training_run.json holds."""

_TRAINER_STATE = "trainer_state.json"
_STATES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""Transformers' names of the files of a checkpoint that a run goes on with, beside its weights."""
RUN_FILE = "training_run.json"
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
    for path in data_args.train_data:
        _check_data_is_not_replaced("--train_data", path, args.output_dir)
    for flag in ("eval_query_file_jsonl_path", "eval_index_file_jsonl_path", "candidate_pool"):
        _check_data_is_not_replaced(f"--{flag}", getattr(data_args, flag), args.output_dir)
    if data_args.hold_out is not None:
        check_held_out_files(args.output_dir)
    check_card_is_not_replaced(args.output_dir)
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
    is_module = output.parent == source and SUBFOLDERS.fullmatch(output.name)
    if inside or is_module:
        raise UserError(
            f"--output_dir {output_dir}: the new model would replace {model} of {flag}; give another folder"
        )


def _check_data_is_not_replaced(flag: str, data: str | None, output_dir: str) -> None:
    """Raise UserError where data that is read has the place and name of a file of a model or of held-out rows."""
    if data is None or not os.path.exists(data) or not os.path.isdir(output_dir):
        return
    names = data_files(data, quiet=True)
    for path in (*names, *(Path(os.path.realpath(name)) for name in names)):
        is_written = path.name in HELD_OUT_FILES or is_model_file(path.name)
        if is_written and os.path.samefile(os.path.realpath(path.parent), output_dir):
            raise UserError(f"--output_dir {output_dir}: this run would replace {path} of {flag}; give another folder")


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
                "started last; start anew with --overwrite_output_dir True instead"
            )
    _check_is_checkpoint(folder)
    state = _state(Path(folder)) or {}
    if 0 < args.max_steps < state.get("global_step", 0):
        raise UserError(
            f"--max_steps {args.max_steps}: {folder} is at step {state['global_step']} already; raise it, or give an "
            "earlier checkpoint"
        )
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
    missing = [name for name in _STATES if not any(Path(folder).glob(name))]
    if missing:
        raise UserError(
            f"{what}: lacks {', '.join(missing)}, as --save_only_model leaves them out; "
            "give it as --model_name_or_path to train on from its weights"
        )


@contextmanager
def run_in(output_dir: str, checkpoint: str | None, decided_by: Run) -> Iterator[Run | None]:
    """Make the folder this run's for the block; gives the run.

    checkpoint: what resume_point gave. decided_by: what the run's result depends on, as what_decides gives it. A run
    that goes on from a checkpoint without training_run.json has none either. Checkpoints that are not the run's own are
    put away. Raises UserError while another run writes into the folder.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("wb") as lock:
        _take(lock, output_dir)
        try:
            yield _start_run(folder, checkpoint, decided_by)
        finally:
            (folder / _LOCK_FILE).unlink(missing_ok=True)


def _take(lock: IO[bytes], output_dir: str) -> None:
    """Lock a file until it is closed or the process ends; worker processes that live a moment longer do not hold it."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"--output_dir {output_dir}: another run is writing there; give another folder") from error
    except OSError:  # some network file systems have no locks
        logger.info("%s: the file system has no locks; start no other run there", output_dir)


def _start_run(folder: Path, checkpoint: str | None, decided_by: Run) -> Run | None:
    run = {"run": secrets.token_hex(16), **decided_by} if checkpoint is None else read_run(Path(checkpoint))
    token = None if run is None else run["run"]
    step = 0 if checkpoint is None else (_state(Path(checkpoint)) or {}).get("global_step", 0)
    remove_unfinished(folder)
    for path in _checkpoints(folder):
        # What came after the checkpoint that is resumed from is not part of this run either.
        if run_of(path) != token or _step(path) > step:
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


def run_of(folder: AnyPath) -> str | None:
    """The token of the run that a folder belongs to; None where it has none."""
    run = read_run(Path(folder))
    return None if run is None else str(run["run"])


def read_run(folder: Path) -> Run | None:
    """What a folder says about its run; None where it says nothing."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return run if isinstance(run, dict) and "run" in run else None


def write_run(folder: AnyPath, run: Run) -> None:
    """Say which run a folder belongs to."""
    with atomic_writer(Path(folder) / RUN_FILE) as file:
        file.write(json.dumps(run, indent=2).encode() + b"\n")


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint of the folder's run that was written to its end, None when there is none."""
    run = run_of(output_dir)
    finished = [path for path in _checkpoints(Path(output_dir)) if run_of(path) == run and is_finished(path)]
    return str(max(finished, key=_step)) if finished else None


def is_finished(checkpoint: AnyPath) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return _state(Path(checkpoint)) is not None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-N folders."""
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def _step(checkpoint: Path) -> int:
    """N of a checkpoint-N folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """What the Trainer keeps of a run; None where the folder is no checkpoint that was written to its end.

    The file is written last: a run that is killed while it saves leaves none, or half of one.
    """
    try:
        state = json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and type(state.get("global_step", 0)) is int else None
