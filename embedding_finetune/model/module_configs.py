"""The modules that modules.json names after the transformer: what their config.json says, read and written.

A module is in sentence-transformers' old or new spelling; it is known by the last part of its type.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedding_finetune.command_line import UserError
from embedding_finetune.model.pooling import POOLING_METHODS
from embedding_finetune.model.side_files import POSITIVE, SHARE, SWITCH, TEXT, Kind, SideFile

_OLD_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""In the order in which sentence-transformers concatenates several."""
_ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}
_SENTENCE_EMBEDDING = "sentence_embedding"
_ORDER = re.compile("Transformer Pooling( Dense| LayerNorm| Dropout)*( Normalize)?")


@dataclass(frozen=True)
class DenseConfig:
    """A linear layer. activation: "tanh" or "identity". folder: holds its weights."""

    in_features: int
    out_features: int
    bias: bool
    activation: str
    folder: str


@dataclass(frozen=True)
class LayerNormConfig:
    """Layer normalisation of embeddings with so many dimensions. folder: holds its weights."""

    dimension: int
    folder: str


@dataclass(frozen=True)
class DropoutConfig:
    """Dropout of embeddings, in training alone."""

    dropout: float
    folder: str


ModuleConfig = DenseConfig | LayerNormConfig | DropoutConfig
KINDS: dict[type[ModuleConfig], str] = {DenseConfig: "Dense", LayerNormConfig: "LayerNorm", DropoutConfig: "Dropout"}


def listed_modules(path: str, modules: Any) -> list[tuple[str, str]]:
    """Kind and folder of each module of a modules.json, in order. Raises UserError for what is no list of modules."""
    if not isinstance(modules, list) or not modules:
        raise UserError(f"{path}: expected a list of modules")
    described = [SideFile(f"{path}: module {number}", module) for number, module in enumerate(modules)]
    return [(module.field("type", TEXT).rsplit(".", 1)[-1], module.field("path", TEXT)) for module in described]


def check_order(path: str, modules: Sequence[tuple[str, str]]) -> None:
    """Raise UserError for modules, as listed_modules gives them, that are not applied here."""
    kinds = [kind for kind, _ in modules]
    if not _ORDER.fullmatch(" ".join(kinds)):
        raise UserError(
            f"{path}: asks for {' > '.join(kinds)}; only Transformer > Pooling, optionally followed by Dense, "
            "LayerNorm, Dropout and at the end Normalize, is supported"
        )


def module_config(kind: str, folder: str, described: SideFile) -> ModuleConfig:
    """What a module's config.json says. kind: one of KINDS."""
    if kind == "LayerNorm":
        return LayerNormConfig(described.field("dimension", POSITIVE), folder)
    if kind == "Dropout":
        return DropoutConfig(described.field("dropout", SHARE, 0.2), folder)
    activation = described.field("activation_function", TEXT, "torch.nn.modules.activation.Tanh")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{described.path}: the activation is {activation}; only Tanh and Identity work here")
    input_name = described.field("module_input_name", TEXT, _SENTENCE_EMBEDDING)
    if described.field("use_residual", SWITCH, False) or input_name != _SENTENCE_EMBEDDING:
        raise UserError(
            f"{described.path}: a Dense module with a residual, or on token states; these are not supported"
        )
    return DenseConfig(
        described.field("in_features", POSITIVE),
        described.field("out_features", POSITIVE),
        described.field("bias", SWITCH, True),
        _ACTIVATIONS[activation],
        folder,
    )


def module_name(config: ModuleConfig) -> str:
    """What tells two modules with the same weights apart."""
    return config.activation if isinstance(config, DenseConfig) else KINDS[type(config)]


def module_file(config: ModuleConfig) -> dict[str, Any]:
    """The content of a module's config.json."""
    if isinstance(config, LayerNormConfig):
        return {"dimension": config.dimension}
    if isinstance(config, DropoutConfig):
        return {"dropout": config.dropout}
    return {
        "in_features": config.in_features,
        "out_features": config.out_features,
        "bias": config.bias,
        "activation_function": next(path for path, name in _ACTIVATIONS.items() if name == config.activation),
    }


def pooling_method(described: SideFile) -> str:
    """The method that a Pooling module's config.json asks for; of several, their names joined by a `+`."""
    one_or_more = Kind(
        lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(m, str) for m in value)),
        "the name of a pooling, or a list of them",
    )
    mode = described.field("pooling_mode", one_or_more, None)
    if mode is None:
        mode = [name for name, flag in _OLD_POOLING_FLAGS.items() if described.field(flag, SWITCH, False)]
    modes = [mode] if isinstance(mode, str) else mode
    if not modes or not set(modes) <= set(POOLING_METHODS):
        raise UserError(
            f"{described.path}: the pooling is {'+'.join(modes) or 'none'}; {', '.join(POOLING_METHODS)} work here"
        )
    return "+".join(modes)


def pooling_file(method: str, dimensions: int, *, include_prompt: bool) -> dict[str, Any]:
    """The content of a Pooling module's config.json. dimensions: of token states.

    It is in the old spelling, which has no order of several methods: only another than theirs asks for the new one.
    """
    modes = method.split("+")
    if modes != [name for name in _OLD_POOLING_FLAGS if name in modes]:
        return {"embedding_dimension": dimensions, "pooling_mode": modes, "include_prompt": include_prompt}
    return {
        "word_embedding_dimension": dimensions,
        **{flag: name in modes for name, flag in _OLD_POOLING_FLAGS.items()},
        "include_prompt": include_prompt,
    }
