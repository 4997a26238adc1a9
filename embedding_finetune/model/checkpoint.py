"""How a checkpoint says to embed: sentence-transformers' files beside the weights.

    modules.json                        which modules run, in order
    1_Pooling/config.json               how token states become one vector
    2_Dense/                            a linear layer and an activation on that vector, if there is one
    2_Normalize/                        present when vectors are scaled to length 1
    sentence_bert_config.json           max_seq_length, do_lower_case
    config_sentence_transformers.json   prompts: the query's and the passage's instruction

They are read from a folder or the hub, in the old and the new spelling. They are written in the old one, which
sentence-transformers 2.2 to 6.x reads.
"""

import json
import logging
import os
import re
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
from embedding_finetune.model.pooling import POOLING_METHODS
from embedding_finetune.model.revisions import at_revision

logger = logging.getLogger(__name__)

_OLD_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
_SENTENCE_EMBEDDING = "sentence_embedding"
_MODEL_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
"""Old checkpoints name the kind of their model in sentence_<kind>_config.json. They are tried in the order of
sentence-transformers."""
_ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}


@dataclass(frozen=True)
class DenseConfig:
    """A linear layer after pooling. activation: "tanh" or "identity". folder: holds its weights."""

    in_features: int
    out_features: int
    bias: bool
    activation: str
    folder: str


@dataclass(frozen=True)
class EmbeddingConfig:
    """How texts become vectors with a given set of weights.

    max_seq_length None: the checkpoint does not say, and the tokenizer's limit holds. include_prompt False leaves the
    instruction's tokens out of the pooling. backbone_folder: the transformer's subfolder in the checkpoint.
    truncate_dim: how many dimensions are kept, None for all. other_prompts and default_prompt_name are not used here:
    they are saved again for users of sentence-transformers.
    """

    pooling: str = "cls"
    normalized: bool = True
    query_instruction: str = ""
    passage_instruction: str = ""
    max_seq_length: int | None = None
    lower_case: bool = False
    backbone_folder: str = ""
    include_prompt: bool = True
    dense: tuple[DenseConfig, ...] = ()
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

    def load(filename: str) -> Any:
        path = find_file(name_or_path, filename, cache_dir)
        if path is None:
            return None
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error

    modules = load("modules.json")
    described = load("config_sentence_transformers.json") or {}
    prompts = {name: text or "" for name, text in (described.get("prompts") or {}).items()}
    folders = _module_folders(name_or_path, modules or [])
    backbone_folder = folders["Transformer"][0] if modules else ""
    limits = (
        load(os.path.join(backbone_folder, f"sentence_{kind}_config.json"))
        for kind in (_MODEL_KINDS if modules else _MODEL_KINDS[:1])
    )
    limit: dict[str, Any] = next(filter(None, limits), {})
    config = EmbeddingConfig(
        query_instruction=prompts.get("query", ""),
        passage_instruction=next((prompts[name] for name in _PASSAGE_PROMPTS if name in prompts), ""),
        max_seq_length=limit.get("max_seq_length"),
        lower_case=bool(limit.get("do_lower_case", False)),
        backbone_folder=backbone_folder,
        other_prompts={name: prompts[name] for name in prompts if name not in ("query", *_PASSAGE_PROMPTS)},
        default_prompt_name=described.get("default_prompt_name"),
    )
    if modules is None:
        logger.info("%s has no modules.json: cls pooling and normalisation, unless flags differ", name_or_path)
        return config
    pooling_file = os.path.join(folders["Pooling"][0], "config.json")
    pooling = load(pooling_file)
    if pooling is None:
        raise UserError(f"{name_or_path}: {pooling_file} is missing, though modules.json names it")
    return replace(
        config,
        pooling=_pooling_method(name_or_path, pooling),
        include_prompt=bool(pooling.get("include_prompt", True)),
        dense=tuple(
            _dense_config(name_or_path, folder, load(os.path.join(folder, "config.json")))
            for folder in folders.get("Dense", ())
        ),
        normalized="Normalize" in folders,
    )


def save_checkpoint(
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EmbeddingConfig,
    projection: nn.Sequential | None = None,
) -> None:
    """Write a checkpoint from which transformers, sentence-transformers and this suite get the same embeddings.

    folder: an empty one, such as folder.model_replaced yields. projection: the layers that config.dense describes, from
    loading.load_projection.
    """
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for number, layer in enumerate(projection or ()):
        (folder / f"{2 + number}_Dense").mkdir()
        save_file(layer.state_dict(), folder / f"{2 + number}_Dense" / SAFE_WEIGHTS_NAME)
    for name, content in _side_files(backbone.config.hidden_size, config).items():
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


def _module_folders(name_or_path: str, modules: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The modules' folders, by the last part of their type, which is the same in all spellings."""
    folders: dict[str, list[str]] = {}
    for module in modules:
        folders.setdefault(module["type"].rsplit(".", 1)[-1], []).append(module["path"])
    order = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if modules and not re.fullmatch("Transformer Pooling( Dense)*( Normalize)?", " ".join(order)):
        raise UserError(
            f"{name_or_path}: modules.json asks for {' > '.join(order)}; "
            "only Transformer > Pooling, optionally followed by Dense and Normalize, is supported"
        )
    return folders


def _dense_config(name_or_path: str, folder: str, described: dict[str, Any] | None) -> DenseConfig:
    if described is None:
        raise UserError(f"{name_or_path}: {folder}/config.json is missing, though modules.json names it")
    activation = described.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{name_or_path}: {folder} has the activation {activation}; only Tanh and Identity work here")
    input_name = described.get("module_input_name", _SENTENCE_EMBEDDING)
    if described.get("use_residual") or input_name != _SENTENCE_EMBEDDING:
        raise UserError(
            f"{name_or_path}: {folder} is a Dense module with a residual, or on token states; these are not supported"
        )
    return DenseConfig(
        described["in_features"],
        described["out_features"],
        described.get("bias", True),
        _ACTIVATIONS[activation],
        folder,
    )


def _pooling_method(name_or_path: str, pooling_config: dict[str, Any]) -> str:
    if "pooling_mode" in pooling_config:
        mode = pooling_config["pooling_mode"]
        modes = [mode] if isinstance(mode, str) else list(mode)
    else:
        modes = [method for method, flag in _OLD_POOLING_FLAGS.items() if pooling_config.get(flag)]
    if len(modes) == 1 and modes[0] in POOLING_METHODS:
        return modes[0]
    raise UserError(
        f"{name_or_path}: its pooling is {'+'.join(modes) or 'none'}, only {', '.join(POOLING_METHODS)} work here"
    )


def _modules(config: EmbeddingConfig) -> list[tuple[str, str]]:
    """Folder and type of each module, in order."""
    kinds = ["Pooling", *("Dense" for _ in config.dense), *(["Normalize"] if config.normalized else [])]
    return [("", "Transformer"), *((f"{number}_{kind}", kind) for number, kind in enumerate(kinds, start=1))]


def _side_files(dimensions: int, config: EmbeddingConfig) -> dict[str, Any]:
    """File name -> JSON content of the files that sentence-transformers 2.2 to 6.x reads."""
    prompts = {"query": config.query_instruction, "document": config.passage_instruction}
    files: dict[str, Any] = {
        "sentence_bert_config.json": {"max_seq_length": config.max_seq_length, "do_lower_case": config.lower_case},
        "1_Pooling/config.json": {
            "word_embedding_dimension": dimensions,
            **{flag: method == config.pooling for method, flag in _OLD_POOLING_FLAGS.items()},
            "include_prompt": config.include_prompt,
        },
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
    for number, dense in enumerate(config.dense, start=2):
        files[f"{number}_Dense/config.json"] = {
            "in_features": dense.in_features,
            "out_features": dense.out_features,
            "bias": dense.bias,
            "activation_function": next(path for path, name in _ACTIVATIONS.items() if name == dense.activation),
        }
    if config.normalized:
        files[f"{2 + len(config.dense)}_Normalize/config.json"] = {}
    return files
