"""What a model's linear layers get: observed once on fixed texts, before the layers are computed in 8 bits.

The texts are the suite's own, in several languages, kinds and lengths (calibration_texts.txt). So what is observed is a
function of the model alone, and an embedding in 8 bits is a function of text and model.

Shapes: N texts, T tokens, H dimensions, K inputs of a linear layer.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
_REMEDY = "give --dtype auto or float32"


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
        if not len(rows):  # an expert that gets no token
            return
        self.low, self.high = torch.minimum(self.low, rows.amin(dim=0)), torch.maximum(self.high, rows.amax(dim=0))

    def is_empty(self) -> bool:
        """Whether there were no rows at all."""
        return bool((self.low == torch.inf).all())

    def is_finite(self) -> bool:
        """Whether all values were numbers."""
        return bool(self.low.isfinite().all() and self.high.isfinite().all())


@dataclass
class Calibration:
    """What was observed. Layers are named as in backbone.named_modules().

    ranges: by layer, of all that were called. groups: layers that always got one and the same tensor, in the order of
    their calls. gelus: those that can be computed with the product before them. embeddings: (N, H), of the texts, by
    the model as it was.
    """

    ranges: dict[str, Range]
    groups: list[tuple[str, ...]]
    gelus: list[Gelu]
    embeddings: Tensor


@functools.cache
def calibration_texts() -> tuple[str, ...]:
    """The texts, in the order of the file."""
    whole = Path(__file__).with_name("calibration_texts.txt").read_text(encoding="utf-8")
    return tuple(text.strip() for text in whole.split("\n\n") if text.strip())


def calibrate(model: BiEncoder, tokenizer: PreTrainedTokenizerBase, *, limit: int, what: str) -> Calibration:
    """Let a float32 model on a CPU embed the texts, and observe. limit: the most tokens that the model takes.

    Raises UserError for a model that fails on one of the texts, has values that are not finite, or has no linear
    layers, such as GPT-2, which has its own kind.
    """
    ranges: dict[str, Range] = {}
    name = type(model.backbone).__name__
    try:
        with _observed(model.backbone, ranges) as passes:
            embeddings = _embeddings(model, tokenizer, limit, passes.one)
    except Exception as error:
        raise UserError(f"{what}: a {name} cannot be calibrated for int8 ({first_line(error)}); {_REMEDY}") from error
    ranges = {layer: values for layer, values in ranges.items() if not values.is_empty()}
    if not ranges:
        raise UserError(f"{what}: a {name} has no linear layers that int8 would speed up; give --dtype auto")
    if not all(values.is_finite() for values in ranges.values()):
        raise UserError(f"{what}: a {name} has inputs of linear layers that are NaN or infinite; {_REMEDY}")
    groups = [group for group in passes.groups or () if ranges.keys() >= set(group)]
    gelus = [gelu for gelu in passes.gelus or () if ranges.keys() >= {gelu.before, gelu.after}]
    return Calibration(ranges, groups, gelus, embeddings)


def check_likeness(
    model: BiEncoder, tokenizer: PreTrainedTokenizerBase, calibration: Calibration, *, limit: int, what: str
) -> float:
    """The smallest cosine between a text's embedding before and now. Raises UserError where it is below 0.95."""
    try:
        now = _embeddings(model, tokenizer, limit, nullcontext)
    except Exception as error:
        name = type(model.backbone).__name__
        raise UserError(f"{what}: a {name} does not work in int8 ({first_line(error)}); {_REMEDY}") from error
    # In float64: a model without normalisation may have embeddings whose squares float32 cannot hold.
    cosine = float(nn.functional.cosine_similarity(calibration.embeddings.double(), now.double()).min())
    if not cosine >= _LOWEST_COSINE:
        raise UserError(
            f"{what}: in int8 the embedding of one of the texts it was tried on has a cosine of {cosine:.3f} to its "
            f"embedding in float32; {_REMEDY}"
        )
    return cosine


def _embeddings(
    model: BiEncoder, tokenizer: PreTrainedTokenizerBase, limit: int, around: Callable[[], AbstractContextManager[None]]
) -> Tensor:
    """The embeddings of the texts, each of which goes through the model alone: (N, H)."""
    embeddings = []
    for text in calibration_texts():
        ids = tokenizer(text, truncation=True, max_length=min(limit, _MOST_TOKENS))["input_ids"]
        if ids:  # a tokenizer without special tokens may know nothing of a text
            with around(), torch.no_grad():
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


class _Passes:
    """What all passes have in common. One is held at a time: it holds all that the layers got and gave.

    A layer that gets another tensor than its neighbours even once is in no group.
    """

    def __init__(self) -> None:
        self.current = _Pass()
        self.groups: list[tuple[str, ...]] | None = None
        self.gelus: list[Gelu] | None = None

    @contextmanager
    def one(self) -> Iterator[None]:
        """Note the calls of the block as a pass."""
        self.current = _Pass()
        yield
        groups, gelus = self.current.groups(), self.current.gelus()
        self.groups = groups if self.groups is None else [group for group in self.groups if group in groups]
        self.gelus = gelus if self.gelus is None else [gelu for gelu in self.gelus if gelu in gelus]
        self.current = _Pass()


@contextmanager
def _observed(backbone: nn.Module, ranges: dict[str, Range]) -> Iterator[_Passes]:
    """While the block runs, calls are noted in ranges and in the current pass."""
    passes = _Passes()
    handles = []

    def observe_linear(name: str, linear: nn.Linear) -> None:
        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            passes.current.enter_linear(name, inputs[0])
            infinity = torch.full((linear.in_features,), torch.inf)
            ranges.setdefault(name, Range(infinity, -infinity)).include(inputs[0])

        handles.append(linear.register_forward_pre_hook(enter))
        handles.append(linear.register_forward_hook(lambda _, __, output: passes.current.leave_linear(name, output)))

    def observe_gelu(name: str, gelu: nn.Module) -> None:
        def leave(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            passes.current.leave_gelu(name, inputs[0], output)

        handles.append(gelu.register_forward_hook(leave))

    for name, module in backbone.named_modules():
        if type(module) is nn.Linear:
            observe_linear(name, module)
        elif is_gelu(module):
            observe_gelu(name, module)
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def is_gelu(module: nn.Module) -> bool:
    """Whether a module is gelu by the error function."""
    return isinstance(module, GELUActivation) or (isinstance(module, nn.GELU) and module.approximate == "none")
