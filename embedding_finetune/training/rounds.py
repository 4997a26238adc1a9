"""Mining while training: a run in rounds of equal length, before each of which the rows get new negatives.

They are mined with the model as it stands, among the rows' positives and --candidate_pool, by the code of
mine_hard_neg.py. To transformers' Trainer a round is an epoch: it ends where its data loader ends. How long rounds are,
and at which rate they learn, is in stages.py.

Shapes: R rows, N negatives of all rows.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import datasets
import numpy as np
from torch.utils.data import Sampler

from embedding_finetune.command_line import UserError
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.distributed import random_numbers_kept
from embedding_finetune.files import AnyPath
from embedding_finetune.mining.arguments import RankingOptions, SelectionOptions
from embedding_finetune.mining.audit import audit_text
from embedding_finetune.mining.negatives import mine_negatives
from embedding_finetune.mining.stopwatch import Stopwatch
from embedding_finetune.training.batches import EpochSampler, Key
from embedding_finetune.training.rows import all_positives, confirmed_negatives, replace_negatives, stored_rows
from embedding_finetune.training.snapshot import Snapshot
from embedding_finetune.training.stages import Stages

logger = logging.getLogger(__name__)

MINED_FILE = "mined_negatives.npz"
"""The negatives of the round in which a checkpoint was saved, and the audits so far."""


class Rounds:
    """Mines for the rows of a run, and keeps what was mined last.

    rows: as rows.load_rows gives them. pool: further candidates. count: how many rounds. embeddings_dir: where
    embeddings are kept between runs, if anywhere. audits: those of the rounds that have begun.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        pool: Iterable[str],
        *,
        count: int,
        selection: SelectionOptions,
        embeddings_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.rows = rows
        self.count = count
        self.selection = selection
        self.corpus = Corpus(itertools.chain(all_positives(rows), pool), beyond=confirmed_negatives(rows))
        self.audits: list[Record] = []
        self._options = {
            **vars(selection),
            "embeddings_dir": embeddings_dir,
            "trust_remote_code": trust_remote_code,
        }
        self._mined = _Negatives(np.empty(0, np.int64), np.empty(0, np.int64))

    def mine(self, snapshot: Snapshot) -> datasets.Dataset:
        """Mine for the next round with the model as it stands; gives the rows with their negatives.

        All processes call this together, and get the same rows.
        Leaves the random numbers of training as they are. Raises UserError where no row gets a negative in the first
        round; later, what was trained is worth more than that.
        """
        number, stopwatch = len(self.audits) + 1, Stopwatch()
        logger.info("round %d of %d: mining among %d candidates", number, self.count, len(self.corpus))
        with random_numbers_kept():
            options = RankingOptions(model_name_or_path=[snapshot.model], **self._options)
            rows = list(stored_rows(self.rows))
            confirmed = [row["confirmed"] for row in rows]
            mined = mine_negatives(rows, self.corpus, options, stopwatch, confirmed=confirmed, scratch=snapshot.scratch)
        positions = [position for selection in mined.selections for position in selection.negatives]
        if not positions and number == 1:
            raise UserError("no row has a negative: widen --range_for_sampling, or relax the filters")
        lengths = [len(selection.negatives) for selection in mined.selections]
        self._mined = _Negatives(np.array(lengths, np.int64), np.array(positions, np.int64))
        audit = mined.audit(self.corpus, self.selection, stopwatch)
        # By name it would be that of a folder that is gone.
        self.audits.append({"round": number, **audit, "weights_sha256": mined.weights_digests[snapshot.model]})
        logger.info("%s", audit_text(self.audits[-1], wanted=self.selection.negative_number))
        return self.rows_with_negatives()

    def write(self, folder: AnyPath) -> None:
        """Keep the round's negatives and the audits with a checkpoint."""
        with (Path(folder) / MINED_FILE).open("wb") as file:
            np.savez(file, **self._mined._asdict(), audits=np.array(json.dumps(self.audits)))

    def read(self, checkpoint: AnyPath) -> None:
        """Take over what a checkpoint keeps: the negatives of its round, and the audits so far."""
        path = Path(checkpoint) / MINED_FILE
        try:
            with np.load(path) as saved:
                self._mined = _Negatives(saved["lengths"], saved["positions"])
                self.audits = json.loads(str(saved["audits"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{path}: is missing or damaged; give an earlier checkpoint") from error

    def rows_with_negatives(self) -> datasets.Dataset:
        """The rows with the negatives that were mined or read last."""
        lengths, positions = self._mined
        texts = (self.corpus.texts[position] for position in positions.tolist())
        return replace_negatives(self.rows, (list(itertools.islice(texts, length)) for length in lengths.tolist()))


class _Negatives(NamedTuple):
    """lengths: (R,), how many each row has. positions: (N,), where they stand in the corpus, row after row."""

    lengths: np.ndarray
    positions: np.ndarray


class RoundSampler(Sampler[Key]):
    """Yields the keys of a round: those of as many epochs as fill it, cut to its length.

    epochs: what orders the rows of one epoch. stages: how long the rounds are; read when a round begins. keys_per_step:
    of all processes. A round begins with an epoch of its own.
    """

    def __init__(self, epochs: EpochSampler, stages: Stages, *, keys_per_step: int) -> None:
        self.epochs = epochs
        self.stages = stages
        self.keys_per_step = keys_per_step
        self.round = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the round to draw for, counted from 0; the Trainer calls it, to which a round is an epoch."""
        self.round = epoch

    def __len__(self) -> int:
        return self.stages.steps[self.round] * self.keys_per_step

    def __iter__(self) -> Iterator[Key]:
        return itertools.islice(self._keys(), len(self))

    def _keys(self) -> Iterator[Key]:
        before = self.stages.steps[: self.round]
        for epoch in itertools.count(sum(-(-steps * self.keys_per_step // len(self.epochs)) for steps in before)):
            self.epochs.set_epoch(epoch)
            yield from self.epochs
