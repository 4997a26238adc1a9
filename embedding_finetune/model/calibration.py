"""What a model's linear layers get: observed once on fixed texts, before the layers are computed in 8 bits.

The texts are the suite's own, in several languages, kinds and lengths (calibration_texts.txt). So what is observed is a
function of the model alone, and an embedding in 8 bits is a function of text and model.

Shapes: N texts, T tokens, H dimensions, K inputs of a linear layer.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.activations import GELUActivation

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.padding import pad

_MOST_TOKENS = 512
_LOWEST_COSINE = 0.95


class Gelu(NamedTuple):
    """Names of modules: a gelu, the linear layer that gives its input, and the only one that takes its output."""

    before: str
    activation: str
    after: str


@dataclass
class Range:
    """The lowest and the highest value of each input: (K,) each."""

    low: Tensor
    high: Tensor

    def include(self, inputs: Tensor) -> None:
        """Widen the range to hold inputs (..., K)."""
        rows = inputs.flatten(end_dim=-2)
        self.low, self.high = torch.minimum(self.low, rows.amin(dim=0)), torch.maximum(self.high, rows.amax(dim=0))


@dataclass
class Calibration:
    """What was observed. Layers are named as in backbone.named_modules().

    ranges: by layer, of all that were called. groups: layers that always got one and the same tensor, in the order of
    their calls. gelus: those that can be computed with the product before them. embeddings: (N, H), of the texts, by
    the model as it was.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    gelus: list[Gelu] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0, 0))


@functools.cache
def calibration_texts() -> tuple[str, ...]:
    """The texts, in the order of the file."""
    whole = Path(__file__).with_name("calibration_texts.txt").read_text(encoding="utf-8")
    return tuple(text.strip() for text in whole.split("\n\n") if text.strip())


@functools.cache
def texts_digest() -> str:
    """Tells versions of the texts apart."""
    return hashlib.sha256("\n\n".join(calibration_texts()).encode()).hexdigest()[:12]


def calibrate(model: BiEncoder, tokenizer: PreTrainedTokenizerBase, *, limit: int, what: str) -> Calibration:
    """Let a float32 model on a CPU embed the texts, and observe. limit: the most tokens that the model takes.

    Raises UserError for a model without linear layers, such as GPT-2, which has its own kind.
    """
    calibration = Calibration()
    seen: list[_Pass] = []
    with _observed(model.backbone, calibration.ranges) as new_pass:
        calibration.embeddings = _embeddings(model, tokenizer, limit, lambda: seen.append(new_pass()))
    if not calibration.ranges:
        name = type(model.backbone).__name__
        raise UserError(f"{what}: a {name} has no linear layers that int8 would speed up; give --dtype auto")
    # A layer that gets another tensor than its neighbours even once is computed alone.
    calibration.groups = [group for group in seen[0].groups() if all(group in other.groups() for other in seen[1:])]
    calibration.gelus = [gelu for gelu in seen[0].gelus() if all(gelu in other.gelus() for other in seen[1:])]
    return calibration


def check_likeness(
    model: BiEncoder, tokenizer: PreTrainedTokenizerBase, calibration: Calibration, *, limit: int, what: str
) -> float:
    """The smallest cosine between a text's embedding before and now. Raises UserError where it is below 0.95."""
    remedy = "give --dtype auto or float32"
    try:
        now = _embeddings(model, tokenizer, limit, lambda: None)
    except Exception as error:
        name = type(model.backbone).__name__
        raise UserError(f"{what}: a {name} does not work in int8 ({first_line(error)}); {remedy}") from error
    cosine = float(nn.functional.cosine_similarity(calibration.embeddings, now).min())
    if not cosine >= _LOWEST_COSINE:
        raise UserError(
            f"{what}: in int8 the embedding of one of the texts it was tried on has a cosine of {cosine:.3f} to its "
            f"embedding in float32; {remedy}"
        )
    return cosine


def _embeddings(
    model: BiEncoder, tokenizer: PreTrainedTokenizerBase, limit: int, before_each: Callable[[], None]
) -> Tensor:
    """The embeddings of the texts, each of which goes through the model alone: (N, H)."""
    embeddings = []
    for text in calibration_texts():
        ids = tokenizer(text, truncation=True, max_length=min(limit, _MOST_TOKENS))["input_ids"]
        if ids:  # a tokenizer without special tokens may know nothing of a text
            before_each()
            with torch.no_grad():
                embeddings.append(model(**pad(tokenizer, [ids], limit=len(ids))))
    return torch.cat(embeddings)


class _Pass:
    """One text's way through the model: which modules got or gave the same tensors."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # kept alive, so that no two of them have one id
        self._layers_of: dict[int, list[str]] = {}  # by the id of their input
        self._maker_of: dict[int, str] = {}  # linear layers, by the id of their output
        self._gelu_of: dict[int, tuple[str, str | None]] = {}  # by the id of its output: its name and its input's maker

    def enter_linear(self, name: str, inputs: Tensor) -> None:
        self._tensors.append(inputs)
        self._layers_of.setdefault(id(inputs), []).append(name)

    def leave_linear(self, name: str, output: Tensor) -> None:
        self._tensors.append(output)
        self._maker_of[id(output)] = name

    def leave_gelu(self, name: str, inputs: Tensor, output: Tensor) -> None:
        self._tensors.append(output)
        self._gelu_of[id(output)] = name, self._maker_of.get(id(inputs))

    def groups(self) -> list[tuple[str, ...]]:
        """Layers with one input, none of them in two groups."""
        groups = list(dict.fromkeys(tuple(names) for names in self._layers_of.values()))
        times = [name for group in groups for name in group]
        return [group for group in groups if len(group) > 1 and all(times.count(name) == 1 for name in group)]

    def gelus(self) -> list[Gelu]:
        """Gelus between two linear layers that are used nowhere else."""
        found = [
            Gelu(before, activation, self._layers_of[made][0])
            for made, (activation, before) in self._gelu_of.items()
            if before is not None and len(self._layers_of.get(made, ())) == 1
        ]
        distinct = list(dict.fromkeys(found))
        names = [name for gelu in distinct for name in gelu]
        others = [layers for made, layers in self._layers_of.items() if made not in self._gelu_of]
        return [
            gelu
            for gelu in distinct
            if all(names.count(name) == 1 for name in gelu) and not any(gelu.after in layers for layers in others)
        ]


@contextmanager
def _observed(backbone: nn.Module, ranges: dict[str, Range]) -> Iterator[Callable[[], _Pass]]:
    """While the block runs, calls are noted in ranges and in the pass that was begun last, by the function it gets."""
    passes: list[_Pass] = []
    handles = []

    def new_pass() -> _Pass:
        passes.append(_Pass())
        return passes[-1]

    def observe_linear(name: str, linear: nn.Linear) -> None:
        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            passes[-1].enter_linear(name, inputs[0])
            infinity = torch.full((linear.in_features,), torch.inf)
            ranges.setdefault(name, Range(infinity, -infinity)).include(inputs[0])

        handles.append(linear.register_forward_pre_hook(enter))
        handles.append(linear.register_forward_hook(lambda _, __, output: passes[-1].leave_linear(name, output)))

    def observe_gelu(name: str, gelu: nn.Module) -> None:
        def leave(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            passes[-1].leave_gelu(name, inputs[0], output)

        handles.append(gelu.register_forward_hook(leave))

    for name, module in backbone.named_modules():
        if type(module) is nn.Linear:
            observe_linear(name, module)
        elif is_gelu(module):
            observe_gelu(name, module)
    try:
        yield new_pass
    finally:
        for handle in handles:
            handle.remove()


def is_gelu(module: nn.Module) -> bool:
    """Whether a module is gelu by the error function."""
    return isinstance(module, GELUActivation) or (isinstance(module, nn.GELU) and module.approximate == "none")
