"""A make-believe CUDA device on a CPU, to find what a GPU would refuse or wait for.

Its tensors report `cuda:0`, hold their values on the CPU, refuse to meet CPU tensors as a GPU's do, and record the
operations for which the host waits until the device has come so far. It knows neither CUDA's autocast nor its kernels.
"""

import traceback
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
_WAIT_FOR_A_VALUE = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
_COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
_TAKE_A_CPU_INDEX = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class PretendTensor(torch.Tensor):
    """A tensor on the device; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        with _disable_current_modes():
            like = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            return torch.Tensor._make_subclass(cls, like, False, device_for_backend_keys=torch.device("cuda"))

    def __init__(self, held):
        self.held = held

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"PretendTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _execute(func, args, kwargs or {})


class Recorded:
    """waits: (operation, where in the code) -> how often; copies: "home" and "there" -> how often."""

    def __init__(self):
        self.waits, self.copies = Counter(), Counter()

    def total(self):
        """How often the host waited."""
        return sum(self.waits.values())


_recorded = Recorded()


def _place():
    for frame in reversed(traceback.extract_stack()):
        if "embedding_finetune/" in frame.filename or "/transformers/" in frame.filename:
            return f"{frame.filename.rsplit('site-packages/', 1)[-1]}:{frame.lineno} {frame.line[:70]}"
    return "a test"


def _execute(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if func in _COPIES:
        direction = "home" if there and wanted == "cpu" else "there" if not there and wanted == "cuda" else None
        if direction is not None:
            _recorded.copies[direction] += 1
            if not kwargs.get("non_blocking"):
                _recorded.waits[f"copy {direction}", _place()] += 1
    elif there and any(tensor.dim() > 0 for tensor in here):
        if func not in _TAKE_A_CPU_INDEX or not isinstance(args[0], PretendTensor):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} at {_place()}")
        _recorded.waits["index on the CPU", _place()] += 1
    if there and func in _WAIT_FOR_A_VALUE and kwargs.get("output_size") is None:
        _recorded.waits[str(func), _place()] += 1
    plain_args, plain = tree_map(lambda x: x.held if isinstance(x, PretendTensor) else x, (args, kwargs))
    if wanted in ("cuda", "meta"):
        plain = {**plain, "device": torch.device("cpu")}
    result = func(*plain_args, **plain)
    stays_there = (bool(there) and wanted != "cpu") or wanted in ("cuda", "meta")
    if func is aten._local_scalar_dense.default or not stays_there:
        return result
    if _gives_back_its_argument(func) and args and isinstance(args[0], PretendTensor):
        return kwargs.get("out", args[0])
    return tree_map(lambda x: PretendTensor(x) if isinstance(x, torch.Tensor) else x, result)


def _gives_back_its_argument(func):
    returns = func._schema.returns
    return func._schema.is_mutable and len(returns) == 1 and returns[0].alias_info is not None


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _execute(func, args, kwargs or {})


class _Event:
    def record(self):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass


@contextmanager
def pretend_cuda(monkeypatch):
    """A block in which there is the device; gives what it records."""
    global _recorded
    _recorded = Recorded()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        with _Mode():
            yield _recorded


def moved(values):
    """Tensors in dicts and lists, on the device."""
    return tree_map(lambda x: PretendTensor(x) if isinstance(x, torch.Tensor) else x, values)


def move(module):
    """Move a module's parameters and buffers to the device, as `.to("cuda:0")` would; gives the module."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                there = torch.nn.Parameter(PretendTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = there
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = PretendTensor(buffer)
    return module
