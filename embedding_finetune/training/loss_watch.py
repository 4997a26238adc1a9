"""Looks at every loss, without letting an accelerator wait: there a loss that is no number shows some steps later."""

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedding_finetune.command_line import UserError


class _Seen(NamedTuple):
    """A loss on its way to the host, the step and rows it is of; `event` tells when it has come."""

    loss: Tensor
    step: int
    rows: np.ndarray
    event: torch.cuda.Event | None


class LossWatch:
    """Raises UserError naming step and rows for a loss that is not finite. `largest`: of the losses seen so far.

    rows_are_of: what the numbers of rows count, for messages.
    """

    def __init__(self, *, rows_are_of: str) -> None:
        self.largest: float | None = None
        self._rows_are_of = rows_are_of
        self._on_their_way: deque[_Seen] = deque()

    def look_at(self, loss: Tensor, *, step: int, rows: np.ndarray) -> None:
        """See the loss of a micro-batch: at once on a CPU, and else when it has come. rows: from 0."""
        self.look_back(wait=False)
        loss = loss.detach()
        if loss.device.type != "cuda":
            self._judge(_Seen(loss, step, rows, None))
            return
        copied = loss.to("cpu", non_blocking=True)  # torch gives it pinned memory
        event = torch.cuda.Event()
        event.record()
        self._on_their_way.append(_Seen(copied, step, rows, event))

    def look_back(self, *, wait: bool) -> None:
        """See those losses that have come by now; with `wait`, all that were looked at."""
        while self._on_their_way:
            event = self._on_their_way[0].event
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._judge(self._on_their_way.popleft())

    def _judge(self, seen: _Seen) -> None:
        value = seen.loss.item()
        if not np.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {seen.step}, in a batch of the rows "
                f"{', '.join(str(row + 1) for row in seen.rows)} ({self._rows_are_of}); "
                "lower --learning_rate, raise --temperature, or look at these rows"
            )
        self.largest = max(self.largest or 0.0, value)
