"""Preparing a backbone for encoding: its precision, and kernels that make good use of a CPU.

benchmarks/README.md has what each part gained.
"""

import logging
import os
import shutil

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.model.attention import leave_out_cudnn_attention, replace_sdpa
from embedding_finetune.model.calibration import Calibration
from embedding_finetune.model.encoding_attention import BATCHED_PRODUCTS
from embedding_finetune.model.int8 import has_int8_products, quantize_linear_layers
from embedding_finetune.process import put_back

logger = logging.getLogger(__name__)


def working_device() -> torch.device:
    """Where models run: the machine's accelerator if it has one, else the CPU.

    torch's build does not tell what the machine has: PyPI's torch on Linux is a CUDA build, with or without a GPU.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has run out of memory. On Apple's MPS only torch's message shows it."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def free_memory(device: torch.device) -> None:
    """Give the memory that torch keeps for later use back to the device."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for `--dtype` on a device: "auto" is bfloat16 where the hardware computes it natively, else float32.

    Raises UserError for "int8" where it would be slow or wrong.
    """
    if name == "int8":
        _check_int8(device)
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def _check_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise UserError(f"--dtype int8 is for encoding on a CPU, and this machine encodes on {device.type}: drop it")
    if not has_int8_products():
        raise UserError(
            "--dtype int8 needs a CPU with VNNI (avx512_vnni or avx_vnni among its flags), and this one has none: "
            "drop it"
        )


def precision(name: str) -> str:
    """What `--dtype` comes to on this machine, for example "bfloat16" for "auto"."""
    return dtype_name(choose_dtype(name, working_device()))


def dtype_name(dtype: torch.dtype) -> str:
    """For example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def prepare_for_encoding(
    backbone: PreTrainedModel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    torch_compile: bool,
    calibration: Calibration | None = None,
) -> None:
    """Bring a model to its dtype and device, in evaluation mode, with the kernels that suit them.

    In int8 the linear layers are, and all else in the dtype that is automatic: this needs a calibration. Raises
    UserError when the model does not fit there, or --torch_compile is asked for and there is no compiler.
    """
    backbone.eval().requires_grad_(False)
    if dtype == torch.int8:
        assert calibration is not None
        dtype = choose_dtype("auto", device)
        quantize_linear_layers(backbone, calibration, dtype)
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers, such as rotary frequencies, stay as precise as they are
    try:
        backbone.to(device)  # after that: float32 weights might not fit there
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the model does not fit into the memory of {device}: free some, or name another in CUDA_VISIBLE_DEVICES"
        ) from error
    leave_out_cudnn_attention()
    if device.type == "cpu":
        replace_sdpa(backbone, BATCHED_PRODUCTS)
    if torch_compile:
        _compile(backbone, device)
    elif device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        pack_linear_layers(backbone)


def leave_out_pooler(backbone: PreTrainedModel) -> None:
    """Replace an encoder's pooler, which some models always compute, though embeddings do not come from it.

    Not for a classifier: its score comes from the pooler.
    """
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = nn.Identity()


class PackedLinear(nn.Module):
    """An nn.Linear for inference on a CPU whose weight is laid out once, in the blocks that oneDNN multiplies.

    torch computes float32 products with MKL, which on AMD has four fifths of oneDNN's speed, and lays a bfloat16 weight
    out anew in every call.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> Tensor:
        """The plain weight, converted back: some models, such as Mamba, multiply with it themselves."""
        return self.packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of a model on a CPU by packed ones. Its rows get the same bits in any number then."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))


def _check_compiler_of_triton() -> None:
    """Raise UserError unless there is the C compiler that Triton looks for on a GPU, as it looks for it."""
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["gcc", "clang"])):
        found = f"CC is {compiler}, which is not there" if compiler else "neither gcc nor clang is on the PATH"
        raise UserError(f"--torch_compile: there is no C compiler ({found}); install gcc, or drop the flag")


def _compile(backbone: PreTrainedModel, device: torch.device) -> None:
    if device.type == "cuda":
        _check_compiler_of_triton()
    elif device.type == "cpu":
        from torch._inductor import config as inductor
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UserError(
                f"--torch_compile: there is no C++ compiler ({first_line(error)}); install g++, or drop the flag"
            ) from error
        # Weights become constants, which are packed as PackedLinear does. Given as an option of compile, it took three
        # times as long.
        put_back.callback(setattr, inductor, "freezing", inductor.freezing)
        inductor.freezing = True
    # Lengths and batch sizes are symbols: one graph serves them all.
    backbone.compile(dynamic=True)
    logger.info("compiling the model: the first texts take about half a minute longer")
