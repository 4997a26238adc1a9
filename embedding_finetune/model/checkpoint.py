"""How a checkpoint says to embed: sentence-transformers' files beside the weights.

    modules.json                        which modules run, in order
    1_Pooling/config.json               how token states become one vector
    2_Dense/, 2_LayerNorm/, 2_Dropout/  what is done to that vector, if anything is
    2_Normalize/                        present when vectors are scaled to length 1
    sentence_bert_config.json           max_seq_length, do_lower_case
    config_sentence_transformers.json   prompts: the query's and the passage's instruction

They are read from a folder or the hub, in the old and the new spelling. They are written in the old one, which
sentence-transformers 2.2 to 6.x reads. A checkpoint with a model for queries and another one for passages is in
routes.py.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from embedding_finetune.command_line import UserError
from embedding_finetune.model.module_configs import (
    KINDS,
    ModuleConfig,
    check_order,
    listed_modules,
    module_config,
    module_file,
    pooling_file,
    pooling_method,
)
from embedding_finetune.model.revisions import at_revision
from embedding_finetune.model.routes import ROUTER, ROUTER_FILE, Route, modules_of_route, router_file
from embedding_finetune.model.side_files import POSITIVE, SWITCH, TEXT, Kind, SideFile, read_json

logger = logging.getLogger(__name__)

_PASSAGE_PROMPTS = ("document", "passage", "corpus")
_MODEL_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
"""Old checkpoints name the kind of their model in sentence_<kind>_config.json. They are tried in the order of
sentence-transformers."""
_PROMPTS = Kind(
    lambda value: isinstance(value, dict) and all(isinstance(text, str | None) for text in value.values()),
    "an object of strings",
)


@dataclass(frozen=True)
class EmbeddingConfig:
    """How texts become vectors with a given set of weights.

    max_seq_length None: the checkpoint does not say, and the tokenizer's limit holds. include_prompt False leaves the
    instruction's tokens out of the pooling. backbone_folder: the transformer's subfolder in the checkpoint.
    modules: those after pooling, without normalisation. truncate_dim: how many dimensions are kept, None for all.
    other_prompts and default_prompt_name are not used here: they are saved again for users of sentence-transformers.
    """

    pooling: str = "cls"
    normalized: bool = True
    query_instruction: str = ""
    passage_instruction: str = ""
    max_seq_length: int | None = None
    lower_case: bool = False
    backbone_folder: str = ""
    include_prompt: bool = True
    modules: tuple[ModuleConfig, ...] = ()
    truncate_dim: int | None = None
    other_prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None

    def with_flags(self, **given: Any) -> "EmbeddingConfig":
        """This config with the given values that are not None; a log line names each value that they replace."""
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if value != getattr(self, name):
                logger.info("%s: %r from the flag, instead of the checkpoint's %r", name, value, getattr(self, name))
        return replace(self, **given)


def has_routes(name_or_path: str, *, cache_dir: str | None = None) -> bool:
    """Whether a checkpoint has a model for queries and another one for passages. Raises UserError like read_config."""
    path = find_file(name_or_path, "modules.json", cache_dir)
    return path is not None and listed_modules(path, read_json(path))[0][0] == ROUTER


def read_config(name_or_path: str, *, route: Route | None = None, cache_dir: str | None = None) -> EmbeddingConfig:
    """Read sentence-transformers' files in a checkpoint folder or hub model.

    Without modules.json the defaults hold (cls pooling, normalised), and a log line says so. route: which model of a
    checkpoint that has two; it says nothing about others.
    Raises UserError for a module or pooling that this suite does not support, and without a route where there are two.
    """

    def load(filename: str) -> SideFile | None:
        path = find_file(name_or_path, filename, cache_dir)
        return None if path is None else SideFile(path, read_json(path))

    def load_of_module(folder: str, filename: str) -> SideFile:
        name = os.path.join(folder, filename)
        if (file := load(name)) is None:
            raise UserError(f"{name_or_path}: {name} is missing, though {named_by} names it")
        return file

    named_by = "modules.json"
    modules_file = find_file(name_or_path, named_by, cache_dir)
    described = load("config_sentence_transformers.json")
    prompts: dict[str, str] = {}
    if described is not None:
        prompts = {name: text or "" for name, text in described.field("prompts", _PROMPTS, {}).items()}
    modules = [] if modules_file is None else listed_modules(modules_file, read_json(modules_file))
    if modules_file is not None:
        if modules[0][0] == ROUTER:
            if route is None:
                raise UserError(
                    f"{name_or_path}: has a model for queries and another one for passages; --freeze_passages True "
                    "trains the former further; to train both, start from the model that it was made from"
                )
            folder = modules[0][1]
            router = load(os.path.join(folder, ROUTER_FILE)) or load_of_module(folder, "config.json")
            modules, named_by = [*modules_of_route(router, route, folder), *modules[1:]], ROUTER_FILE
        check_order(modules_file, modules)
    backbone_folder = modules[0][1] if modules else ""
    limits = (
        load(os.path.join(backbone_folder, f"sentence_{kind}_config.json"))
        for kind in (_MODEL_KINDS if modules else _MODEL_KINDS[:1])
    )
    limit = next((file for file in limits if file is not None), SideFile("", {}))
    config = EmbeddingConfig(
        query_instruction=prompts.get("query", ""),
        passage_instruction=next((prompts[name] for name in _PASSAGE_PROMPTS if name in prompts), ""),
        max_seq_length=limit.field("max_seq_length", POSITIVE, None),
        lower_case=limit.field("do_lower_case", SWITCH, False),
        backbone_folder=backbone_folder,
        other_prompts={name: prompts[name] for name in prompts if name not in ("query", *_PASSAGE_PROMPTS)},
        default_prompt_name=None if described is None else described.field("default_prompt_name", TEXT, None),
    )
    if not modules:
        logger.info("%s has no modules.json: cls pooling and normalisation, unless flags differ", name_or_path)
        return config

    pooling = load_of_module(modules[1][1], "config.json")
    return replace(
        config,
        pooling=pooling_method(pooling),
        include_prompt=pooling.field("include_prompt", SWITCH, True),
        modules=tuple(
            module_config(kind, folder, load_of_module(folder, "config.json"))
            for kind, folder in modules[2:]
            if kind != "Normalize"
        ),
        normalized=modules[-1][0] == "Normalize",
    )


def save_checkpoint(
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EmbeddingConfig,
    projection: nn.Sequential | None = None,
) -> None:
    """Write a checkpoint from which transformers, sentence-transformers and this suite get the same embeddings.

    folder: an empty one, such as folder.model_replaced yields. projection: the modules that config.modules describes,
    from modules.load_projection.
    """
    save_weights(folder, backbone, config, projection)
    save_beside_weights(folder, tokenizer, backbone.config.hidden_size, config)


def save_beside_weights(
    folder: Path, tokenizer: PreTrainedTokenizerBase, dimensions: int, config: EmbeddingConfig
) -> None:
    """Write what a checkpoint has beside weights. dimensions: of token states."""
    save_tokenizer(folder, tokenizer, dimensions, config)
    modules = [(folder, f"sentence_transformers.models.{kind}") for folder, kind in _modules(config)]
    _write_json(folder / "modules.json", _modules_file(modules))
    _write_json(folder / "config_sentence_transformers.json", _description(config, config))


def save_route(
    folder: Path,
    route: Route,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EmbeddingConfig,
    projection: nn.Sequential | None = None,
) -> None:
    """Write one of the two models of a checkpoint with routes; save_router writes what joins them."""
    save_weights(folder, backbone, config, projection, route)
    save_tokenizer(folder, tokenizer, backbone.config.hidden_size, config, route)


def save_router(folder: Path, query: EmbeddingConfig, document: EmbeddingConfig) -> None:
    """Write what joins two models that save_route has written: with this sentence-transformers (>= 5) loads them."""
    _write_json(folder / "modules.json", _modules_file([("", f"sentence_transformers.models.{ROUTER}")]))
    _write_json(
        folder / ROUTER_FILE,
        router_file({"query": _modules(query, "query"), "document": _modules(document, "document")}),
    )
    _write_json(folder / "config_sentence_transformers.json", _description(query, document))


def save_weights(
    folder: Path,
    backbone: PreTrainedModel,
    config: EmbeddingConfig,
    projection: nn.Sequential | None,
    route: Route | None = None,
) -> None:
    """Write the weights of a checkpoint, or of one of its routes."""
    modules = _modules(config, route)
    backbone.save_pretrained(folder / modules[0][0])
    for module, (name, _) in zip(projection or (), modules[2:]):
        (folder / name).mkdir(exist_ok=True)
        if weights := module.state_dict():
            save_file(weights, folder / name / SAFE_WEIGHTS_NAME)


def save_tokenizer(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dimensions: int,
    config: EmbeddingConfig,
    route: Route | None = None,
) -> None:
    """Write the tokenizer of a checkpoint, or of one of its routes, and how its token states become an embedding."""
    modules = _modules(config, route)
    tokenizer.save_pretrained(folder / modules[0][0])
    limits = {"max_seq_length": config.max_seq_length, "do_lower_case": config.lower_case}
    _write_json(folder / modules[0][0] / "sentence_bert_config.json", limits)
    pooling = pooling_file(config.pooling, dimensions, include_prompt=config.include_prompt)
    _write_json(folder / modules[1][0] / "config.json", pooling)
    for (name, _), module in zip(modules[2:], config.modules):
        _write_json(folder / name / "config.json", module_file(module))
    if config.normalized:
        _write_json(folder / modules[-1][0] / "config.json", {})


def find_file(name_or_path: str, filename: str, cache_dir: str | None) -> str | None:
    """The path on this machine of a file in a checkpoint folder or hub model; None if it has no such file."""
    name, revision = at_revision(name_or_path)
    return cached_file(
        name,
        filename,
        cache_dir=cache_dir,
        **revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _modules(config: EmbeddingConfig, route: Route | None = None) -> list[tuple[str, str]]:
    """Folder and kind of each module, in order."""
    kinds = ["Pooling", *(KINDS[type(module)] for module in config.modules)]
    kinds += ["Normalize"] if config.normalized else []
    before, transformer = ("", "") if route is None else (f"{route}_", f"{route}_0_Transformer")
    return [(transformer, "Transformer"), *((f"{before}{number}_{kind}", kind) for number, kind in enumerate(kinds, 1))]


def _modules_file(modules: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The content of modules.json. modules: folder and type of each."""
    return [
        {"idx": index, "name": str(index), "path": folder, "type": kind} for index, (folder, kind) in enumerate(modules)
    ]


def _description(query: EmbeddingConfig, document: EmbeddingConfig) -> dict[str, Any]:
    """The content of config_sentence_transformers.json. The queries' model and the passages' may be one."""
    return {
        "__version__": {
            "sentence_transformers": "2.2.2",
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        },
        "prompts": {
            **query.other_prompts,
            "query": query.query_instruction,
            "document": document.passage_instruction,
        },
        "default_prompt_name": query.default_prompt_name,
        "similarity_fn_name": "cosine" if query.normalized else "dot",
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
