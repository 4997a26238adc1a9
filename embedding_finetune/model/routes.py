"""Checkpoints with a model for queries and another one for passages: sentence-transformers' Router, from its 5 on.

modules.json           the Router, and after it the modules that both routes share, if there are any
router_config.json     which folders hold the modules of each route
query_0_Transformer/   weights and tokenizer of the queries' model; query_1_Pooling/ and so on are its modules
document_0_Transformer/, document_1_Pooling/ ...   those of the passages' model
"""

import os
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from embedding_finetune.command_line import UserError
from embedding_finetune.model.side_files import Kind, SideFile

Route = Literal["query", "document"]
ROUTES: tuple[Route, ...] = get_args(Route)
ROUTER = "Router"
ROUTER_FILE = "router_config.json"

_TYPE = "sentence_transformers.models.%s"
_OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
_NAMES = Kind(
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of folders"
)


def modules_of_route(described: SideFile, route: Route, folder: str = "") -> list[tuple[str, str]]:
    """Kind and folder of each module of a route, in order, by router_config.json. folder: the Router's own.

    Raises UserError for a Router that does more than to tell queries from passages, or leads out of its folder.
    """
    structure = SideFile(f'{described.path}: "structure"', described.field("structure", _OBJECT))
    types = SideFile(f'{described.path}: "types"', described.field("types", _OBJECT))
    parameters = SideFile(f'{described.path}: "parameters"', described.field("parameters", _OBJECT, {}))
    if set(structure.content) != set(ROUTES):
        raise UserError(
            f"{described.path}: a Router with the routes {', '.join(structure.content)}; only query and document work "
            "here"
        )
    if parameters.field("route_mappings", _OBJECT, {}):
        raise UserError(f"{described.path}: a Router with route_mappings, which are not supported")
    text = Kind(lambda value: isinstance(value, str), "the type of a module")
    names = structure.field(route, _NAMES)
    for name in names:
        if os.path.isabs(name) or ".." in PurePosixPath(name).parts:
            raise UserError(f"{described.path}: the module {name} is not in the checkpoint's folder")
    return [(types.field(name, text).rsplit(".", 1)[-1], os.path.join(folder, name)) for name in names]


def router_file(modules: dict[Route, list[tuple[str, str]]]) -> dict[str, Any]:
    """The content of router_config.json. modules: folder and kind of each module, by route."""
    return {
        "types": {folder: _TYPE % kind for listed in modules.values() for folder, kind in listed},
        "structure": {route: [folder for folder, _ in listed] for route, listed in modules.items()},
        "parameters": {"default_route": "document", "allow_empty_key": True, "route_mappings": {}},
    }
