"""What the processes of a torchrun run share. In a run of one process every function here changes nothing."""

import atexit
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from embedding_finetune import process
from embedding_finetune.command_line import UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others, whose shares may take longer. torchrun notices a dead one."""
_SECONDS_TO_EXIT = 60
"""How long the end of a process that failed may take, where its process group is not destroyed."""
_NEEDED_TO_JOIN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def join_process_group() -> None:
    """Join the other processes of a torchrun run, each with its own GPU where there are any.

    A log line says where one process leaves GPUs unused.
    """
    check_launch()
    if _launched_processes() == 1:
        _tell_of_unused_gpus()
        tell_of_processes_that_were_not_started()
        return
    if dist.is_initialized():
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    leave_process_group_at_exit()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def check_launch() -> None:
    """Raise UserError where the environment speaks of other processes, but not of all that is needed to join them."""
    if _launched_processes() == 1 or (dist.is_available() and dist.is_initialized()):
        return
    if missing := [name for name in _NEEDED_TO_JOIN if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} not set: start the processes with "
            f"torchrun, or set {', '.join(_NEEDED_TO_JOIN)} for each of them"
        )


def _launched_processes() -> int:
    """How many processes the launcher says it started."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE {text}: must be a number of processes; torchrun sets it")
    return int(text)


def _tell_of_unused_gpus() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:
        logger.info(
            "one of %d GPUs encodes; started with torchrun --nproc-per-node %d in place of python, all do", count, count
        )


def tell_of_processes_that_were_not_started() -> None:
    """Log a warning where `accelerate launch --cpu` was asked for several processes: without MPI it starts one."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    by_mpi = any(name.startswith(("PMI_", "OMPI_", "MV2_")) for name in os.environ)
    if asked and not by_mpi and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "warning: accelerate launch --cpu has started one process; torchrun --nproc-per-node N starts several"
        )


def world_size() -> int:
    """How many processes run together; 1 outside torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def leave_process_group_at_exit() -> None:
    """Let the process leave its group before the interpreter exits, as `leave_process_group` does."""
    atexit.register(leave_process_group)


def leave_process_group() -> None:
    """Destroy the process group: gloo's threads may otherwise abort a finished process.

    Under NCCL that waits for the other processes. They wait in turn for one that failed alone, and torchrun ends them
    only when it has exited. So after a failure the group is left to the exit, which aborts NCCL's kernels; should that
    take longer than a minute, the system ends the process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_backend() == "gloo" or not process.failures:
        dist.destroy_process_group()
    else:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_SECONDS_TO_EXIT)


def process_rank() -> int:
    """This process's number in the run, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def own_gpu() -> int | None:
    """The number of the GPU that this process works on; None for a single process, which may use all of them."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else None


def own_share(count: int) -> slice:
    """The part of `count` items that this process works on: contiguous, in rank order, sizes differing by at most 1."""
    return _share(count, process_rank(), world_size())


def own_share_of_machine(count: int) -> slice:
    """The same, where only the processes of this machine share the items."""
    return _share(count, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _share(count: int, number: int, of: int) -> slice:
    return slice(count * number // of, count * (number + 1) // of)


def random_numbers_kept() -> AbstractContextManager[None]:
    """A block that leaves torch's random numbers as they are, on the CPU and on this process's own GPU."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


def gather_objects(value: T) -> list[T]:
    """The value of every process, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def once_per_machine(work: Callable[[], T]) -> T:
    """The result of `work`, which the first process of each machine does while the others wait.

    The result must be picklable. A UserError ends all processes with its status, and one of them prints it.
    """
    if world_size() == 1:
        return work()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
    outcome: T | UserError | None = None
    if local_rank == 0:
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, outcome, group=waiting)
    dist.destroy_process_group(waiting)
    failed = next((number for number, outcome in enumerate(outcomes) if isinstance(outcome, UserError)), None)
    if failed is None:
        return outcomes[process_rank() - local_rank]  # torchrun numbers the processes of a machine consecutively
    if failed == process_rank():
        raise outcomes[failed]
    raise SystemExit(outcomes[failed].status)


def once_in_all(work: Callable[[], None]) -> None:
    """Let the first process of the run do `work`, and the others wait: one that is done early may take it down."""
    once_per_machine(lambda: work() if process_rank() == 0 else None)


def gather_rows(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """All processes' rows of each tensor (n, ...) in rank order, with gradients, and where this process's rows begin.

    The tensors have the same number of rows n, which may differ between processes. A row's gradient is the sum of its
    gradients in all processes. With DistributedDataParallel's mean over processes, W processes get the gradient of one
    process with all rows.
    """
    if world_size() == 1:
        return tensors, 0
    counted = torch.zeros(world_size(), dtype=torch.int64, device=tensors[0].device)
    counted[process_rank()] = len(tensors[0])
    dist.all_reduce(counted)
    counts = counted.tolist()  # once for all tensors: the process waits for the device here
    return tuple(_GatherRows.apply(rows, counts) for rows in tensors), sum(counts[: process_rank()])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded)
        return torch.cat([part[:count] for part, count in zip(received, counts)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.clone(memory_format=torch.contiguous_format)  # autograd may use the gradient elsewhere too
        dist.all_reduce(summed)
        return summed.split(ctx.counts)[process_rank()], None
