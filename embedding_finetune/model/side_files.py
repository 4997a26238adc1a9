"""JSON files of a checkpoint, checked where they are read: an error names file and field, and what was expected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from embedding_finetune.command_line import UserError


class Kind(NamedTuple):
    """What a field may hold: `holds` tells, and `wanted` says it in an error."""

    holds: Callable[[Any], bool]
    wanted: str


TEXT = Kind(lambda value: isinstance(value, str), "a string")
SWITCH = Kind(lambda value: isinstance(value, bool), "true or false")
POSITIVE = Kind(lambda value: type(value) is int and value > 0, "a whole number above 0")
SHARE = Kind(lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1")
_REQUIRED = object()


def read_json(path: str) -> Any:
    """The content of a JSON file. Raises UserError where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


class SideFile:
    """The object in a JSON file. Raises UserError where there is another value."""

    def __init__(self, path: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object")
        self.path = path
        self.content: dict[str, Any] = content

    def field(self, name: str, kind: Kind, default: Any = _REQUIRED) -> Any:
        """A field's value, or the default where it is missing or null. Raises UserError for another kind of value."""
        value = self.content.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not kind.holds(value):
            shown = "missing" if name not in self.content else json.dumps(value)[:40]
            raise UserError(f'{self.path}: "{name}" is {shown}, expected {kind.wanted}')
        return value
