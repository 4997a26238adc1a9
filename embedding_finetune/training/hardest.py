"""A pool that is too large for memory: queries are trained against its hardest passages, found anew as they move.

Before every `STEPS` steps the queries of these are searched for in the whole pool, with the model as it stands. Their
positives and the nearest `PER_QUERY` passages of each are a panel: until the next search each query is trained against
all of it, by a softmax that is exact over these passages.

Shapes: N passages of the pool, n of them in the panel, Q queries of some steps, H dimensions.
"""

import copy
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from transformers import TrainerCallback

from embedding_finetune.command_line import UserError
from embedding_finetune.distributed import own_share, random_numbers_kept
from embedding_finetune.files import AnyPath
from embedding_finetune.retrieval.shared_search import encode_queries, merge_rankings
from embedding_finetune.retrieval.top_k import TopK
from embedding_finetune.training.pool_file import PoolFile
from embedding_finetune.training.pool_loss import Panel, PoolLoss
from embedding_finetune.training.query_batches import Numbers
from embedding_finetune.training.sampling import keys_per_step, steps_of_epoch

if TYPE_CHECKING:
    from embedding_finetune.training.trainer import RetrievalTrainer

logger = logging.getLogger(__name__)

STEPS, PER_QUERY = 50, 32
_MOST_PASSAGES = 2**20
"""Of a panel, about: with large batches it is for fewer steps."""
PANEL_FILE = "hardest_passages.npz"
"""The panel with which a checkpoint was saved, and the step that it was found before."""
_SHARE_OF_MEMORY = 0.5
_PASSAGES_PER_BLOCK = 2**16
_LIMIT_OF_GROUP = Path("/sys/fs/cgroup/memory.max")


def fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes of embeddings may be held where training runs: in half of its memory."""
    return size <= _SHARE_OF_MEMORY * memory_of(device)


def memory_of(device: torch.device) -> int:
    """The bytes of a CUDA device, or of the machine, as far as this process may use them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(_LIMIT_OF_GROUP.read_text()))
    except (OSError, ValueError):  # there is no limit
        return memory


class Hardest(TrainerCallback):
    """Gives a PoolLoss the panel of the steps that follow.

    passages: the pool's. numbers: the places of texts in the pool. trainer: set by the one that it is given to.
    seconds_of_step: what the last search took, for each step that it was for.
    """

    trainer: "RetrievalTrainer"

    def __init__(self, loss: PoolLoss, passages: PoolFile, numbers: Numbers) -> None:
        self.loss = loss
        self.passages = passages
        self.numbers = numbers
        self.found_before: int | None = None
        self.seconds_of_step = 0.0

    @property
    def steps(self) -> int:
        """For how many steps a panel is found."""
        return max(min(STEPS, _MOST_PASSAGES // (keys_per_step(self.trainer.args) * PER_QUERY)), 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the panel where it is due."""
        self.refresh()

    def refresh(self) -> None:
        """Find the panel of the steps that follow, unless it is there. All processes call this together."""
        step = self.trainer.state.global_step
        if self.found_before is not None and step - self.found_before < self.steps:
            return
        began = time.monotonic()
        columns = self.trainer.train_dataset.rows.select_columns(["query", "instruction", "pos_ids"])
        rows = columns[self._rows_from(step)]
        with random_numbers_kept():
            encoder = self.trainer.encoder_as_it_stands()
            embedded = encode_queries(encoder, rows["query"], rows["instruction"])
        self.trainer.forget_snapshot()  # its weights change with the next step
        top = TopK(embedded, min(PER_QUERY, len(self.passages)), device=encoder.device)
        share = own_share(len(self.passages))
        for first in range(share.start, share.stop, _PASSAGES_PER_BLOCK):
            top.add(first, self.passages[first : min(first + _PASSAGES_PER_BLOCK, share.stop)].numpy())
        merge_rankings(top)
        positives = self.numbers.of(np.concatenate(rows["pos_ids"]))
        self._take(np.union1d(top.ranking().positions, positives), before=step)
        count, of = len(self.loss.panel.embeddings), len(self.passages)
        logger.info(
            "step %d: trained against %d of %d passages (%.2g%%), the nearest %d of each query of %d steps",
            *(step, count, of, 100 * count / of, PER_QUERY, self.steps),
        )
        self.seconds_of_step = (time.monotonic() - began) / self.steps

    def _rows_from(self, step: int) -> np.ndarray:
        """The rows of the steps that follow, of all processes: (Q,), or all rows where there are fewer."""
        args, epochs = self.trainer.args, copy.copy(self.trainer.epochs)
        per_step, steps = keys_per_step(args), steps_of_epoch(args, len(epochs))
        found: list[np.ndarray] = []
        for epoch in range(step // steps, (step + self.steps - 1) // steps + 1):
            epochs.set_epoch(epoch)
            order = epochs.order(epochs.rng())
            first, last = max(step - epoch * steps, 0), step + self.steps - epoch * steps
            found.append(order[first * per_step : last * per_step])
        return np.unique(np.concatenate(found))

    def _take(self, places: np.ndarray, *, before: int) -> None:
        """Train against these passages from a step on. places: (n,) int64, in the pool, ascending."""
        self.found_before = before
        embeddings = self.passages[places]
        self.loss.panel = Panel(embeddings.to(self.loss.bi_encoder.backbone.device), places)

    def write(self, folder: AnyPath) -> None:
        """Keep the panel with a checkpoint."""
        with (Path(folder) / PANEL_FILE).open("wb") as file:
            np.savez(file, places=np.asarray(self.loss.panel.places), before=np.array(self.found_before))

    def read(self, checkpoint: AnyPath) -> None:
        """Take over the panel of a checkpoint."""
        path = Path(checkpoint) / PANEL_FILE
        try:
            with np.load(path) as saved:
                places = saved["places"].astype(np.int64, casting="safe")
                if not len(places):
                    raise ValueError("no passages")
                self._take(places, before=int(saved["before"]))
        except (OSError, ValueError, TypeError, KeyError, EOFError, IndexError, BadZipFile) as error:
            raise UserError(f"{path}: is missing or damaged; give an earlier checkpoint") from error
