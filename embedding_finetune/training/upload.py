"""--push_to_hub: the finished model is uploaded once, in one commit, when all of it is saved.

Only files of the model go: no checkpoints, no held-out rows, no summary, nothing else that lies in the folder. The hub
is asked before training who the token's owner is, so that a run does not end in vain.
"""

import logging
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from embedding_finetune.command_line import UploadError, UserError
from embedding_finetune.distributed import gather_objects, once_in_all, once_per_machine, process_rank
from embedding_finetune.files import is_model_file
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.run_folder import RUN_FILE

logger = logging.getLogger(__name__)

_FLAG = "--push_to_hub True"
_MODULE = re.compile(r"(((query|document)_)?\d+_[A-Z]\w*/)?[^/]+")
"""Where a model's files lie: beside one another, and in the folders of modules."""


def find_repository(args: RetrieverTrainingArguments) -> str | None:
    """OWNER/NAME of where the finished model will be uploaded; None where it will not.

    The first process asks the hub, and all get to know. Raises UserError where nothing could be uploaded.
    """
    if not args.uploads:
        return None
    return gather_objects(once_per_machine(lambda: _repository(args) if process_rank() == 0 else None))[0]


def _repository(args: RetrieverTrainingArguments) -> str:
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--hub_model_id {name}: is no name for a model on the hub: {_said(error)}") from error
    later = "or leave the flag out, and upload the finished model later"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{_FLAG}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, {later}")
    try:
        owner = HfApi().whoami()["name"]
    except LocalTokenNotFoundError as error:
        raise UserError(f"{_FLAG}: there is no token; run `hf auth login` or set HF_TOKEN, {later}") from error
    except Exception as error:  # of the hub's client and of its HTTP library: they share no class
        raise UserError(f"{_FLAG}: the hub cannot be asked: {_said(error)}; try again, {later}") from error
    return name if "/" in name else f"{owner}/{name}"


def make_repository(repository: str | None, args: RetrieverTrainingArguments) -> None:
    """Make the repository, and the branch of --hub_revision, where they are not there yet: before the first step.

    Does nothing for None. Raises UserError where the token does not allow it.
    """
    if repository is not None:
        once_in_all(lambda: _make(repository, args))


def _make(repository: str, args: RetrieverTrainingArguments) -> None:
    api = HfApi()
    try:
        api.create_repo(repository, private=args.hub_private_repo, exist_ok=True)
        if args.hub_revision is not None:
            api.create_branch(repository, branch=args.hub_revision, exist_ok=True)
    except Exception as error:  # as above
        raise UserError(
            f"{_FLAG}: {repository} cannot be made on the hub: {_said(error)}; give another --hub_model_id, or a "
            "token that may write"
        ) from error
    logger.info("the finished model will be uploaded to %s", repository)


def upload(repository: str | None, args: RetrieverTrainingArguments, written: Sequence[str]) -> None:
    """Upload the finished model from the first process; does nothing for None. All processes call this together.

    written: the files that were saved as the model, relative to the output folder. Raises UploadError, which says how
    to do it later.
    """
    if repository is not None:
        once_in_all(lambda: _upload(repository, args, files_to_upload(written)))


def files_to_upload(written: Sequence[str]) -> list[str]:
    """Those of a model's files that are the model, not the run that it came from, nor a copy of its adapter."""
    return sorted(name for name in written if _MODULE.fullmatch(name) and name != RUN_FILE)


def _upload(repository: str, args: RetrieverTrainingArguments, names: Sequence[str]) -> None:
    api, folder = HfApi(), Path(args.output_dir)
    try:
        there = api.list_repo_files(repository, revision=args.hub_revision)
        # Of an earlier model: transformers would apply its adapter_config.json to the new weights.
        old = [name for name in there if _MODULE.fullmatch(name) and is_model_file(os.path.basename(name))]
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        deletions = [CommitOperationDelete(path_in_repo=name) for name in old if name not in names]
        commit = api.create_commit(
            repository,
            [*operations, *deletions],
            commit_message="Finetuned with finetune.py",
            revision=args.hub_revision,
        )
    except Exception as error:  # as above; the model lies in its folder, whatever it was
        raise UploadError(
            f"{_FLAG}: the model is finished in {folder}, but was not uploaded: {_said(error)}; to upload it later: "
            f"{_command(repository, args, names)}"
        ) from error
    logger.info("uploaded to %s: %s", repository, commit.commit_url)


def _said(error: Exception) -> str:
    """All lines of an error as one: the hub's client says in the first what failed, and why in the others."""
    return " ".join(str(error).split()) or type(error).__name__


def _command(repository: str, args: RetrieverTrainingArguments, names: Sequence[str]) -> str:
    """A command line that uploads the same files."""
    words = ["hf", "upload", repository, args.output_dir, "."]
    words += [] if args.hub_revision is None else ["--revision", args.hub_revision]
    return shlex.join([*words, *(word for name in names for word in ("--include", name))])
