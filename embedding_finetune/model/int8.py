"""Linear layers in 8 bits: weights per output, activations by scales that a calibration has fixed.

A product takes codes, bytes that stand for floats: code = round(value / (scale * factor)) + zero_point. A few inputs
of a layer are often ten times as large as the others. So each input has a factor, about largest**0.7 / weight**0.3, and
its weights are multiplied by it (SmoothQuant, arXiv:2211.10438). Behind a gelu inputs cannot be scaled so: the few
large ones are multiplied in the model's dtype (LLM.int8(), arXiv:2208.07339).

A layer makes three passes over activations to code them, not six: query, key and value share one coded input and one
product, and the product before a gelu applies it and gives codes. What is shared, a calibration has found; there is no
list of models.

Shapes: S tokens, K inputs and M outputs of a linear layer, L of the inputs large.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedding_finetune.model.calibration import Calibration, Gelu, Range

_SHARE_OF_INPUTS = 0.7
"""How far large inputs are scaled down and their weights up. On Debian passages the smallest cosine to float32 was
0.9988 with all-MiniLM-L6-v2 at 0.7 (0.9978 at 0.5, 0.9971 at 0.9), 0.9976 with all-mpnet-base-v2 (0.9953, 0.9939)."""
_LARGE_INPUTS = 8
"""Behind a gelu. With 0, 8, 16 and 32 of them the smallest cosine was 0.989, 0.998, 0.998 and 0.998 with
all-MiniLM-L6-v2, and 0.80, 0.995, 0.996 and 0.996 with all-mpnet-base-v2."""
_WHOLE = 1.5 * 2**23
"""From 2^23 to 2^24 float32 has whole numbers alone."""
_SMALLEST = 1e-5
"""Lower limit of ranges and weights: an input that is always 0 has a scale too."""


def has_int8_products() -> bool:
    """Whether the CPU multiplies bytes in one instruction. Elsewhere oneDNN is slow, or sums overflow in 16 bits."""
    capabilities = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(map(capabilities.get, ("avx512_vnni", "avx_vnni")))


class Codes:
    """How a layer's inputs become bytes. weights: (K,), the largest of each input; None for no factors.

    factors: (K,), or None.
    """

    def __init__(self, values: Range, weights: Tensor | None) -> None:
        low, high = values.low, values.high
        factors = torch.ones_like(low)
        if weights is not None:
            largest = torch.maximum(high, -low).clamp(min=_SMALLEST)
            ratio = largest**_SHARE_OF_INPUTS / weights.clamp(min=_SMALLEST) ** (1 - _SHARE_OF_INPUTS)
            # In coarse steps, which the last bits of a calibration on another machine hardly ever change.
            factors = torch.exp2((2 * (ratio / ratio.log().mean().exp()).log2()).round() / 2)
        lowest = min(float((low / factors).min()), 0.0)
        highest = max(float((high / factors).max()), _SMALLEST)
        self.scale = 1 / float(_in_bfloat16(torch.tensor(255 / (highest - lowest))))
        self.zero_point = min(max(round(-lowest / self.scale), 0), 255)
        self.multipliers = _in_bfloat16(1 / (self.scale * factors))  # (K,)
        self._offsets = torch.full_like(self.multipliers, _WHOLE + self.zero_point)  # (K,)
        self.factors = None if weights is None else 1 / (self.scale * self.multipliers)

    def __call__(self, values: Tensor) -> Tensor:
        """The codes (S, K) uint8 of values (S, K)."""
        # Adding rounds, and the lowest byte of the sum is the code: half the time of rounding in bfloat16.
        sums = torch.addcmul(self._offsets, values.float(), self.multipliers).clamp_(_WHOLE, _WHOLE + 255)
        return sums.view(torch.int32).to(torch.uint8)


def _in_bfloat16(values: Tensor) -> Tensor:
    """The nearest numbers that bfloat16 has: the last bits of a calibration on another machine hardly ever matter."""
    return values.to(torch.bfloat16).float()


class Int8Product:
    """Codes times 8-bit weights: (S, K) uint8 -> (S, M) in the model's dtype, or codes of the gelu of that.

    weight: (M, K). out: how the gelu's outputs become codes; None for plain outputs. digest: of all that decides the
    result.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, codes: Codes, dtype: torch.dtype, *, out: Codes | None = None
    ) -> None:
        weight = weight if codes.factors is None else weight * codes.factors
        self._scales = weight.abs().amax(dim=1).clamp(min=_SMALLEST) / 127  # (M,)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        whole = (weight / self._scales[:, None]).round().to(torch.int8)
        numbers = (codes.scale, codes.zero_point, *((out.scale, out.zero_point) if out is not None else ()))
        self.digest = hashlib.sha256(whole.numpy().tobytes() + self._scales.numpy().tobytes() + repr(numbers).encode())
        self._weight = torch.ops.onednn.qlinear_prepack(whole, None)
        self._bias = None if bias is None else bias.detach()
        self._codes = codes
        # Scale, zero point and dtype of the output, and what is applied to it.
        self._output: tuple[Any, ...] = (1.0, 0, dtype, "none")
        if out is not None:
            self._output = (out.scale, out.zero_point, torch.uint8, "gelu")

    def __call__(self, codes: Tensor) -> Tensor:
        """The product of codes (S, K): (S, M)."""
        weight = self._weight, self._scales, self._zero_points
        return torch.ops.onednn.qlinear_pointwise(
            codes, self._codes.scale, self._codes.zero_point, *weight, self._bias, *self._output, [], "none"
        )


class _Int8Module(nn.Module):
    """Stands in a model in the place of an nn.Linear. digest: its product's, as hexadecimal digits.

    dtype: that of the inputs it takes.
    """

    def __init__(self, linear: nn.Linear, product: Int8Product, dtype: torch.dtype) -> None:
        super().__init__()
        self._product = product
        self.digest = product.digest.hexdigest()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some models convert a layer's inputs to its weight's dtype. It has no values: those that multiply with it
        # fail, and are told.
        self.weight = torch.empty(linear.weight.shape, dtype=dtype, device="meta")


class Int8Linear(_Int8Module):
    """A linear layer with 8-bit weights and inputs."""

    def __init__(self, linear: nn.Linear, codes: Codes, dtype: torch.dtype) -> None:
        super().__init__(linear, Int8Product(linear.weight.detach(), linear.bias, codes, dtype), dtype)
        self._code = codes

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., M)."""
        product = self._product(self._code(input.reshape(-1, self.in_features)))
        return product.view(*input.shape[:-1], -1)


class SharedInput:
    """Linear layers that get one tensor, as one product: it is computed when the first of them is called."""

    def __init__(self, linears: Sequence[nn.Linear], codes: Codes, dtype: torch.dtype) -> None:
        self._code = codes
        self._widths = [linear.out_features for linear in linears]
        biases = [
            torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears
        ]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.product = Int8Product(weight, torch.cat(biases), codes, dtype)
        self._input: tuple[Tensor, int] | None = None
        self._outputs: dict[int, Tensor] = {}  # those that no layer has asked for yet

    def output(self, number: int, input: Tensor) -> Tensor:
        """What layer `number` gives for its input (..., K): (..., M)."""
        is_known = self._input is not None and self._input[0] is input and self._input[1] == input._version
        if not is_known or number not in self._outputs:
            product = self.product(self._code(input.reshape(-1, input.shape[-1]))).view(*input.shape[:-1], -1)
            self._input, self._outputs = (input, input._version), dict(enumerate(product.split(self._widths, dim=-1)))
        output = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return output


class Int8Part(_Int8Module):
    """One of the layers of a SharedInput."""

    def __init__(self, linear: nn.Linear, shared: SharedInput, number: int, dtype: torch.dtype) -> None:
        super().__init__(linear, shared.product, dtype)
        self._shared, self._number = shared, number

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., M)."""
        return self._shared.output(self._number, input)


class LargeInputs:
    """The few inputs of a layer behind a gelu that are much larger than the others, computed in the model's dtype.

    before, after: the layers before and behind the gelu. rows: (L,), the numbers of the inputs.
    """

    def __init__(self, before: nn.Linear, after: nn.Linear, rows: Tensor, dtype: torch.dtype) -> None:
        bias = torch.zeros(before.out_features) if before.bias is None else before.bias.detach()
        self._first = before.weight.detach()[rows].t().to(dtype).contiguous()  # (K, L)
        self._bias = bias[rows].to(dtype)
        self._second = after.weight.detach()[:, rows].t().to(dtype).contiguous()  # (L, M)
        self._values: Tensor | None = None

    def see(self, inputs: Tensor) -> None:
        """Compute the large inputs from those of the layer before the gelu, (S, K)."""
        self._values = F.gelu(torch.addmm(self._bias, inputs, self._first))  # (S, L)

    def add_to(self, outputs: Tensor) -> None:
        """Add their products to the other inputs' (S, M), in place."""
        assert self._values is not None
        outputs.addmm_(self._values, self._second)
        self._values = None


class Int8LinearBeforeGelu(_Int8Module):
    """A linear layer and the gelu behind it: gives the codes that the next layer takes."""

    def __init__(self, linear: nn.Linear, codes: Codes, out: Codes, large: LargeInputs, dtype: torch.dtype) -> None:
        super().__init__(linear, Int8Product(linear.weight.detach(), linear.bias, codes, dtype, out=out), dtype)
        self._code = codes
        self._large = large

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> codes (..., M) uint8."""
        rows = input.reshape(-1, self.in_features)
        self._large.see(rows)
        return self._product(self._code(rows)).view(*input.shape[:-1], -1)


class Int8LinearBehindGelu(_Int8Module):
    """A linear layer that gets codes. weight: (M, K), 0 for the large inputs."""

    def __init__(self, linear: nn.Linear, weight: Tensor, codes: Codes, large: LargeInputs, dtype: torch.dtype) -> None:
        super().__init__(linear, Int8Product(weight, linear.bias, codes, dtype), torch.uint8)
        self._large = large

    def forward(self, codes: Tensor) -> Tensor:
        """(..., K) uint8 -> (..., M)."""
        product = self._product(codes.reshape(-1, self.in_features))
        self._large.add_to(product)
        return product.view(*codes.shape[:-1], -1)


def quantize_linear_layers(backbone: nn.Module, calibration: Calibration, dtype: torch.dtype) -> None:
    """Replace the linear layers that a calibration has seen. dtype: that of all other operations.

    The weights are still in float32, on the CPU.
    """
    layers = {name: cast(nn.Linear, backbone.get_submodule(name)) for name in calibration.ranges}
    done: set[str] = set()
    for gelu in calibration.gelus:
        for name, module in _around_gelu(gelu, layers, calibration.ranges, dtype).items():
            backbone.set_submodule(name, module)
            done.add(name)
    for group in calibration.groups:
        names = [name for name in group if name not in done]
        if len(names) > 1:
            shared = SharedInput([layers[name] for name in names], _codes(names, layers, calibration.ranges), dtype)
            for number, name in enumerate(names):
                backbone.set_submodule(name, Int8Part(layers[name], shared, number, dtype))
            done.update(names)
    for name, linear in layers.items():
        if name not in done:
            backbone.set_submodule(name, Int8Linear(linear, _codes([name], layers, calibration.ranges), dtype))


def products_digest(backbone: nn.Module) -> str | None:
    """Tells 8-bit weights and scales apart: a calibration on another machine may round a scale to the other side.

    None for a model without any.
    """
    digests = [module.digest for module in backbone.modules() if isinstance(module, _Int8Module)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32] if digests else None


def _codes(names: Sequence[str], layers: dict[str, nn.Linear], ranges: dict[str, Range]) -> Codes:
    """The codes of layers with one input."""
    weights = torch.stack([layers[name].weight.detach().abs().amax(dim=0) for name in names]).amax(dim=0)
    return Codes(ranges[names[0]], weights)


def _around_gelu(
    gelu: Gelu, layers: dict[str, nn.Linear], ranges: dict[str, Range], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """What replaces a gelu and the layers on both sides of it."""
    before, after = layers[gelu.before], layers[gelu.after]
    values = ranges[gelu.after]
    largest = torch.maximum(values.high, -values.low)
    is_large = torch.zeros_like(largest, dtype=torch.bool)
    is_large[largest.topk(min(_LARGE_INPUTS, len(largest) // 8)).indices] = True
    others = Range(values.low[~is_large], values.high[~is_large])
    out = Codes(others, None)
    large = LargeInputs(before, after, is_large.nonzero()[:, 0], dtype)
    return {
        gelu.before: Int8LinearBeforeGelu(before, _codes([gelu.before], layers, ranges), out, large, dtype),
        gelu.activation: nn.Identity(),
        gelu.after: Int8LinearBehindGelu(after, after.weight.detach().masked_fill(is_large, 0), out, large, dtype),
    }
