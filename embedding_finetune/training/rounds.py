"""Mining while training: a run in rounds of equal length, before each of which the rows get new negatives.

They are mined with the model as it stands, among the rows' positives and --candidate_pool, by the code of
mine_hard_neg.py. Each round has a learning-rate schedule of its own. To transformers' Trainer a round is an epoch: it
ends where its data loader ends, and a run that is resumed finds its round by counting steps.

Shapes: R rows, N negatives of all rows.
"""

import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import datasets
import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Sampler

from embedding_finetune.command_line import UserError, scratch_folder
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.distributed import once_per_machine
from embedding_finetune.files import AnyPath
from embedding_finetune.mining.arguments import RankingOptions, SelectionOptions
from embedding_finetune.mining.audit import audit_text
from embedding_finetune.mining.negatives import mine_negatives
from embedding_finetune.mining.stopwatch import Stopwatch
from embedding_finetune.training.batches import EpochSampler, Key
from embedding_finetune.training.rows import all_positives, replace_negatives, stored_rows

logger = logging.getLogger(__name__)

MINED_FILE = "mined_negatives.npz"
"""The negatives of the round in which a checkpoint was saved, and the audits so far."""
_RATE_OF_NEXT_ROUND = 0.5
"""Each round's learning rate is this share of that of the round before. benchmarks/mining_quality.py measured two."""


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
        self.corpus = Corpus(itertools.chain(all_positives(rows), pool))
        self.audits: list[Record] = []
        self._options = {
            **vars(selection),
            "embeddings_dir": embeddings_dir,
            "trust_remote_code": trust_remote_code,
        }
        self._mined = _Negatives(np.empty(0, np.int64), np.empty(0, np.int64))

    def mine(self, save: Callable[[Path], None]) -> datasets.Dataset:
        """Mine for the next round; gives the rows with their negatives.

        save: writes the model as it stands into a folder. All processes call this together, and get the same rows.
        Leaves the random numbers of training as they are. Raises UserError where no row gets a negative.
        """
        number, stopwatch = len(self.audits) + 1, Stopwatch()
        logger.info("round %d of %d: mining among %d candidates", number, self.count, len(self.corpus))
        with torch.random.fork_rng():
            model = once_per_machine(lambda: _saved(save))
            stopwatch.lap("save")
            options = RankingOptions(model_name_or_path=[model], **self._options)
            mined = mine_negatives(list(stored_rows(self.rows)), self.corpus, options, stopwatch)
        once_per_machine(lambda: shutil.rmtree(model))
        positions = [position for selection in mined.selections for position in selection.negatives]
        if not positions:
            raise UserError("no row has a negative: widen --range_for_sampling, or relax the filters")
        lengths = [len(selection.negatives) for selection in mined.selections]
        self._mined = _Negatives(np.array(lengths, np.int64), np.array(positions, np.int64))
        audit = mined.audit(self.corpus, self.selection, stopwatch)
        # By name it would be that of a folder that is gone.
        self.audits.append({"round": number, **audit, "weights_sha256": mined.weights_digests[model]})
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


def _saved(save: Callable[[Path], None]) -> str:
    folder = tempfile.mkdtemp(dir=scratch_folder())
    save(Path(folder))
    return folder


class RoundSampler(Sampler[Key]):
    """Yields the keys of a round: those of as many epochs as fill it, cut to its length.

    epochs: what orders the rows of one epoch. length: keys in a round. Each round begins with an epoch of its own.
    """

    def __init__(self, epochs: EpochSampler, *, length: int) -> None:
        self.epochs = epochs
        self.length = length
        self.round = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the round to draw for, counted from 0; the Trainer calls it, to which a round is an epoch."""
        self.round = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        return itertools.islice(self._keys(), self.length)

    def _keys(self) -> Iterator[Key]:
        epochs_in_round = -(-self.length // len(self.epochs))
        for epoch in itertools.count(self.round * epochs_in_round):
            self.epochs.set_epoch(epoch)
            yield from self.epochs


def steps_in_round(steps: int, rounds: int) -> int:
    """Steps of each round, where a run of so many steps is cut into rounds of equal length; a rest is left out."""
    if steps < rounds:
        raise UserError(f"--mining_rounds {rounds}: the run has {steps} steps; give fewer rounds, or more epochs")
    if steps % rounds:
        logger.info("%d of %d steps are made: %d rounds are of equal length", steps - steps % rounds, steps, rounds)
    return steps // rounds


def schedule_of_rounds(schedule: LRScheduler, steps: int) -> LambdaLR:
    """The schedule of one round repeated at half the rate in each further one. steps: of a round.

    Raises UserError for a schedule that follows a measure, which no step number tells.
    """
    if not isinstance(schedule, LambdaLR):
        raise UserError("--mining_rounds needs an --lr_scheduler_type that depends on the step alone, such as linear")
    factors = schedule.lr_lambdas

    def of_rounds(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: _RATE_OF_NEXT_ROUND ** (step // steps) * factor(step % steps)

    return LambdaLR(schedule.optimizer, [of_rounds(factor) for factor in factors])
