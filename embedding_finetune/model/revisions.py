"""`NAME@REVISION`: a model of the hub as it is at a branch, a tag or a commit."""

import os
import re

from embedding_finetune.command_line import UserError

HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")
"""How the hub names models, with or without the one they belong to."""


def at_revision(name_or_path: str) -> tuple[str, dict[str, str]]:
    """How transformers takes a model's name: without the revision, and {"revision": ...} where there is one.

    An existing folder of the very name is that folder. Raises UserError for a revision of a folder, and for none after
    the @.
    """
    name, at, revision = name_or_path.partition("@")
    if not at or os.path.exists(name_or_path) or not HUB_NAME.fullmatch(name):
        return name_or_path, {}
    if os.path.isdir(name):
        raise UserError(
            f"{name_or_path}: {name} is a folder, and only models of the hub have revisions; leave the @ out"
        )
    if not revision:
        raise UserError(f"{name_or_path}: give a branch, tag or commit after the @, or leave it out")
    return name, {"revision": revision}
