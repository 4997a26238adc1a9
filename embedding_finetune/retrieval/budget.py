"""How many tokens go through a model at once: fewer after the device has run out of memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from embedding_finetune.model.encoding_kernels import free_memory, is_out_of_memory

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_TOKENS_PER_BATCH = {"cpu": 4096, "mps": 8192}
"""The default of --tokens_per_batch by kind of device; see benchmarks/README.md."""
_TOKENS_ON_A_GPU = 2**16


class TokenBudget:
    """The most tokens of a batch. tokens: what the user gave; None for what suits the device."""

    def __init__(self, tokens: int | None, device: torch.device) -> None:
        self.tokens = tokens or _TOKENS_PER_BATCH.get(device.type, _TOKENS_ON_A_GPU)
        self._device = device

    def within(
        self,
        items: Sequence[Item],
        tokens_of: Callable[[Sequence[Item]], int],
        work: Callable[[Sequence[Item]], Result],
    ) -> Iterator[Result]:
        """The results of `work` on items, in their order: on all at once, or on parts that fit into the budget.

        Where the device runs out of memory, parts and budget are halved.
        """
        if len(items) == 1 or tokens_of(items) <= self.tokens:
            try:
                result = work(items)
            except RuntimeError as error:
                if len(items) == 1 or not is_out_of_memory(error):
                    raise
            else:
                yield result
                return
            self.tokens = tokens_of(items) // 2
            logger.warning("warning: out of GPU memory: --tokens_per_batch is %d from now on", self.tokens)
            free_memory(self._device)
        half = len(items) // 2
        yield from self.within(items[:half], tokens_of, work)
        yield from self.within(items[half:], tokens_of, work)
