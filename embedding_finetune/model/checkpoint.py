"""How a checkpoint says to embed: sentence-transformers' files beside the weights.

    modules.json                        which modules run, in order
    1_Pooling/config.json               how token states become one vector
    2_Dense/, 2_LayerNorm/, 2_Dropout/  what is done to that vector, if anything is
    2_Normalize/                        present when vectors are scaled to length 1
    sentence_bert_config.json           max_seq_length, do_lower_case
    config_sentence_transformers.json   prompts: the query's and the passage's instruction

They are read from a folder or the hub, in the old and the new spelling. They are written in the old one, which
sentence-transformers 2.2 to 6.x reads.
"""

import json
import logging
import os
from collections.abc import Mapping
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
    module_config,
    module_file,
    module_folders,
    pooling_file,
    pooling_method,
)
from embedding_finetune.model.revisions import at_revision
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


def read_config(name_or_path: str, *, cache_dir: str | None = None) -> EmbeddingConfig:
    """Read sentence-transformers' files in a checkpoint folder or hub model.

    Without modules.json the defaults hold (cls pooling, normalised), and a log line says so.
    Raises UserError for a module or pooling that this suite does not support.
    """

    def load(filename: str) -> SideFile | None:
        path = find_file(name_or_path, filename, cache_dir)
        return None if path is None else SideFile(path, read_json(path))

    modules_file = find_file(name_or_path, "modules.json", cache_dir)
    described = load("config_sentence_transformers.json")
    prompts: dict[str, str] = {}
    if described is not None:
        prompts = {name: text or "" for name, text in described.field("prompts", _PROMPTS, {}).items()}
    modules = [] if modules_file is None else module_folders(modules_file, read_json(modules_file))
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

    def config_of(folder: str) -> SideFile:
        name = os.path.join(folder, "config.json")
        if (file := load(name)) is None:
            raise UserError(f"{name_or_path}: {name} is missing, though modules.json names it")
        return file

    pooling = config_of(modules[1][1])
    return replace(
        config,
        pooling=pooling_method(pooling),
        include_prompt=pooling.field("include_prompt", SWITCH, True),
        modules=tuple(
            module_config(kind, folder, config_of(folder)) for kind, folder in modules[2:] if kind != "Normalize"
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
    from loading.load_projection.
    """
    backbone.save_pretrained(folder)
    save_beside_weights(folder, tokenizer, backbone.config.hidden_size, config)
    for module, (name, _) in zip(projection or (), _modules(config)[2:]):
        (folder / name).mkdir(exist_ok=True)
        if weights := module.state_dict():
            save_file(weights, folder / name / SAFE_WEIGHTS_NAME)


def save_beside_weights(
    folder: Path, tokenizer: PreTrainedTokenizerBase, dimensions: int, config: EmbeddingConfig
) -> None:
    """Write what a checkpoint has beside weights. dimensions: of token states."""
    tokenizer.save_pretrained(folder)
    for name, content in _side_files(dimensions, config).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _modules(config: EmbeddingConfig) -> list[tuple[str, str]]:
    """Folder and type of each module, in order."""
    kinds = ["Pooling", *(KINDS[type(module)] for module in config.modules)]
    kinds += ["Normalize"] if config.normalized else []
    return [("", "Transformer"), *((f"{number}_{kind}", kind) for number, kind in enumerate(kinds, start=1))]


def _side_files(dimensions: int, config: EmbeddingConfig) -> dict[str, Any]:
    """File name -> JSON content of the files that sentence-transformers 2.2 to 6.x reads."""
    prompts = {"query": config.query_instruction, "document": config.passage_instruction}
    files: dict[str, Any] = {
        "sentence_bert_config.json": {"max_seq_length": config.max_seq_length, "do_lower_case": config.lower_case},
        "1_Pooling/config.json": pooling_file(config.pooling, dimensions, include_prompt=config.include_prompt),
        "config_sentence_transformers.json": {
            "__version__": {
                "sentence_transformers": "2.2.2",
                "transformers": transformers.__version__,
                "pytorch": torch.__version__,
            },
            "prompts": {**config.other_prompts, **prompts},
            "default_prompt_name": config.default_prompt_name,
            "similarity_fn_name": "cosine" if config.normalized else "dot",
        },
        "modules.json": [
            {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for index, (folder, kind) in enumerate(_modules(config))
        ],
    }
    for (folder, _), module in zip(_modules(config)[2:], config.modules):
        files[f"{folder}/config.json"] = module_file(module)
    if config.normalized:
        files[f"{_modules(config)[-1][0]}/config.json"] = {}
    return files
