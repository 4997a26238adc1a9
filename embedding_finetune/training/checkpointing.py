"""transformers' Trainer whose checkpoints are models that any tool loads, and that takes back only its own.

A run that is killed while it saves leaves no half checkpoint. What is damaged is named in one line.
"""

import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.model.adapters import AdapterBase, load_adapter, merged, save_adapter
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.card import CardFacts, write_card
from embedding_finetune.model.checkpoint import EmbeddingConfig, read_config, save_beside_weights, save_checkpoint
from embedding_finetune.model.folder import model_replaced
from embedding_finetune.model.modules import load_projection
from embedding_finetune.model.routes import Route
from embedding_finetune.model.training_queries import write_training_queries
from embedding_finetune.training.frozen import FrozenPassages
from embedding_finetune.training.rounds import Rounds
from embedding_finetune.training.run_folder import Run, is_finished, write_run
from embedding_finetune.training.snapshot import Snapshot, Snapshots
from embedding_finetune.training.weights import saved_weights

logger = logging.getLogger(__name__)

_CHECKPOINT_IN_MODELS = 3
"""A checkpoint holds two numbers of the optimizer's for each weight."""
_TORCH_CANNOT_WRITE = re.compile("inline_container|iostream error|PytorchStreamWriter")
"""What torch.save says, as a RuntimeError, when the disk is full."""


class CheckpointingTrainer(Trainer):
    """Saves and loads the BiEncoder that is trained, which its subclass sets.

    saved_config: how the model embeds, as checkpoints say it. training_queries: ids of the queries that it has seen.
    rounds: what mines before each round, if training has rounds; checkpoints keep its negatives. run: what checkpoints
    say about the run, see run_folder.py. card: what their README.md says; None for none. written: the files that were
    saved as the finished model, relative to its folder. adapter_base: the model that adapters belong to, where they
    are trained. frozen: the passages that stay as they are, whose model is part of a checkpoint; None where passages
    are trained.
    """

    bi_encoder: BiEncoder
    saved_config: EmbeddingConfig
    training_queries: np.ndarray
    rounds: Rounds | None = None
    run: Run | None = None
    card: CardFacts | None = None
    written: Sequence[str] = ()
    adapter_base: AdapterBase | None = None
    frozen: FrozenPassages | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._snapshots = Snapshots(self.write_model)
        self.seconds_of_checkpoints: list[float] = []

    @property
    def route(self) -> Route | None:
        """Which of a checkpoint's models is trained; None where it has one."""
        return None if self.frozen is None else "query"

    def write_model(self, folder: Path) -> None:
        """Write the trained model as it stands, with what its adapters learned, into an empty folder."""
        save_checkpoint(folder, *self._parts())

    def write_checkpoint(self, folder: Path) -> None:
        """Write the same, beside the model of passages that stay as they are, if they do."""
        if self.frozen is None:
            self.write_model(folder)
        else:
            self.frozen.write_checkpoint(folder, *self._parts())

    def _parts(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EmbeddingConfig, nn.Sequential]:
        backbone, projection = merged(self.bi_encoder.backbone), self.bi_encoder.projection
        return backbone, self.processing_class, self.saved_config, projection

    def snapshot(self) -> Snapshot:
        """The model as it stands, to be loaded for mining and measuring. All processes call this together."""
        self.check_weights()
        return self._snapshots.of(self.state.global_step)

    def seconds_of_checkpoint(self) -> float:
        """How long it takes to write one: as long as the last, or before the first as that takes to write the model."""
        if self.args.save_strategy == "no":
            return 0.0
        if self.seconds_of_checkpoints:
            return self.seconds_of_checkpoints[-1]
        self.snapshot()
        return _CHECKPOINT_IN_MODELS * self._snapshots.seconds_of_writing

    def forget_snapshot(self) -> None:
        """To be called where weights change without a step."""
        self._snapshots.forget()

    def check_weights(self) -> None:
        """Raise UserError for weights that are not to be saved."""

    def facts_of_run(self, run: Run) -> Run:
        """What a checkpoint says about the run, and how far it is."""
        return run

    def facts_of_card(self, card: CardFacts) -> CardFacts:
        """What the card of a checkpoint says, and how far the run is."""
        return card

    def create_model_card(self, **_: Any) -> None:
        """Write README.md of the finished model as `card` says; transformers' own asks the model for its config."""
        if self.card is not None:
            write_card(self.args.output_dir, self.facts_of_card(self.card))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder, model = output_dir or self.args.output_dir, self.bi_encoder
        with model_replaced(folder) as staging:
            if self.adapter_base is not None:
                alone = self.args.save_adapter_only
                save_adapter(model.backbone, staging, base=self.adapter_base, alone=alone)
            if not self.args.save_adapter_only:
                self.write_checkpoint(staging)
            else:
                dimensions = model.backbone.config.hidden_size
                save_beside_weights(staging, self.processing_class, dimensions, self.saved_config)
            write_training_queries(staging, self.training_queries)
            if self.rounds is not None and folder != self.args.output_dir:  # a checkpoint, to go on from
                self.rounds.write(staging)
            if self.frozen is not None and self.frozen.hardest is not None and folder != self.args.output_dir:
                self.frozen.hardest.write(staging)
            if self.run is not None:
                write_run(staging, self.facts_of_run(self.run))
            if self.card is not None:
                write_card(staging, self.facts_of_card(self.card))
            self.written = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.check_weights()
        began = time.monotonic()
        try:
            super()._save_checkpoint(model, trial)
            self.seconds_of_checkpoints.append(time.monotonic() - began)
        except BaseException as error:
            if self.args.should_save and not is_finished(folder):
                shutil.rmtree(folder, ignore_errors=True)  # half of one is of no use, and may fill the disk
            if isinstance(error, OSError) or _TORCH_CANNOT_WRITE.search(str(error)):
                raise UserError(f"{folder}: cannot be written: {first_line(error)}") from error
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.forget_snapshot()
        try:
            if self.args.lora_rank is not None:
                load_adapter(self.bi_encoder.backbone, resume_from_checkpoint)
            else:
                config = read_config(resume_from_checkpoint, route=self.route)
                weights = saved_weights(Path(resume_from_checkpoint) / config.backbone_folder)
                self.bi_encoder.backbone.load_state_dict(weights)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{resume_from_checkpoint}: its weights are damaged, or those of another model: {first_line(error)}"
            ) from error
        if self.saved_config.modules:
            saved = load_projection(resume_from_checkpoint, read_config(resume_from_checkpoint, route=self.route))
            self.bi_encoder.projection.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _damage_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _damage_named(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        logger.info("the best weights are those of %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@contextmanager
def _damage_named(checkpoint: str | None) -> Iterator[None]:
    """Raise UserError for whatever torch raises for a file of a checkpoint that is cut short or none of its own."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{checkpoint}: a file of it is damaged: {first_line(error)}; give another one") from error
