"""transformers' Trainer for the loss of a BiEncoder: our sampler, checkpoints and evaluation, progress on stderr."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from embedding_finetune import __version__
from embedding_finetune.command_line import UserError
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.data.texts import text_id
from embedding_finetune.distributed import gather_objects, random_numbers_kept
from embedding_finetune.evaluation.metrics import means
from embedding_finetune.evaluation.ranking import measure
from embedding_finetune.model.adapters import AdapterBase
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.retrieval.arguments import EncodingOptions
from embedding_finetune.retrieval.encoder import Encoder, load_encoder, load_tower
from embedding_finetune.training.arguments import EVAL_CUTOFFS, EVAL_MEASURES, RetrieverTrainingArguments
from embedding_finetune.training.batches import EmbedCollator, TrainDataset
from embedding_finetune.training.callbacks import CutTexts, RunLength, StderrProgress
from embedding_finetune.training.flag_errors import memory_errors_name_the_remedy
from embedding_finetune.training.flags import SHARDED
from embedding_finetune.training.frozen import FrozenPassages
from embedding_finetune.training.held_out import HeldOut
from embedding_finetune.training.loss import BiEncoderLoss
from embedding_finetune.training.loss_watch import LossWatch
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.pacing import PacedTrainer
from embedding_finetune.training.query_batches import QueryCollator
from embedding_finetune.training.rounds import Rounds
from embedding_finetune.training.weights import trained_weight_hashes

logger = logging.getLogger(__name__)

_JUDGED = "judged"
"""The prefix of measures on queries that judge, where held-out ones choose the best weights."""
VERDICT_MEASURE = "MRR@10"
BEFORE_TRAINING = "before_training"
"""The key in the log of [text_id, VERDICT_MEASURE] of each query that judges: resumed runs find them there."""


class RetrievalTrainer(PacedTrainer):
    """Trains the BiEncoder of a loss on a TrainDataset, and measures it on a RetrievalTask.

    With held-out queries that choose the best weights, others of them, or the task, judge before and after training.

    What it saves is the BiEncoder alone, so that any tool loads it. trained_before: what read_training_queries gave for
    the weights that training starts from. neighbours: the rows that are to share a batch with each row. rounds: what
    mines before each round, if training has rounds; neighbours_in: what finds the neighbours in the rows of a round.
    one_file_per_batch: whether only rows of one file share a batch. encoding: how the model is measured. frozen: the
    passages that stay as they are, if they do. `run`: what checkpoints say about the run, see run_folder.py.
    """

    def __init__(
        self,
        model: BiEncoderLoss,
        args: RetrieverTrainingArguments,
        *,
        train_dataset: TrainDataset,
        data_collator: EmbedCollator | QueryCollator,
        saved_config: EmbeddingConfig,
        trained_before: np.ndarray,
        neighbours: Neighbours | None = None,
        rounds: Rounds | None = None,
        neighbours_in: Callable[[Dataset], Neighbours] | None = None,
        one_file_per_batch: bool = False,
        task: RetrievalTask | None = None,
        held_out: HeldOut | None = None,
        encoding: EncodingOptions | None = None,
        adapter_base: AdapterBase | None = None,
        frozen: FrozenPassages | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            eval_dataset=task if held_out is None else held_out.task,
            processing_class=data_collator.tokenizer,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(f"FSDP or DeepSpeed: {SHARDED}")  # a launcher may have asked for it
        self.bi_encoder = model.bi_encoder
        self.neighbours = neighbours
        self.rounds, self.neighbours_in = rounds, neighbours_in
        self.one_file_per_batch = one_file_per_batch
        self.held_out = held_out
        self.judge = None if held_out is None else held_out.judging if task is None else task
        self.base_kept = False  # whether the weights are those from before the first step again
        self.latest: dict[str, tuple[int, np.ndarray]] = {}  # prefix -> step, (Q,) of the last VERDICT_MEASURE
        self.saved_config = saved_config
        self.adapter_base = adapter_base
        self.frozen = frozen
        self.training_queries = np.union1d(trained_before, train_dataset.known_positives.query_ids)
        self.encoding = encoding or EncodingOptions()
        # The loss is a mean over one micro-batch: accumulated ones are to be averaged.
        self.loss_is_scaled_for_ga = False
        self.cut_texts = CutTexts(query=data_collator.query.max_length, passage=data_collator.passage.max_length)
        self.weights_before = trained_weight_hashes(model)
        several = " over all files" if train_dataset.files.any() else ""
        self.losses = LossWatch(rows_are_of=f"counted from 1{several}")  # of this process's micro-batches
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StderrProgress(disabled=args.disable_tqdm))
        self.add_callback(self.cut_texts)
        self.add_callback(RunLength())
        if frozen is not None and frozen.hardest is not None:
            frozen.hardest.trainer = self
            self.add_callback(frozen.hardest)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        """Train as transformers does, after a first evaluation where there is a task.

        A resumed run takes over all that the checkpoint's had counted: it was measured then, and early stopping would
        count another evaluation. Raises UserError when nothing was learned, whatever the cause.
        """
        self.args.eval_on_start = self.eval_dataset is not None and resume_from_checkpoint is None
        self.args.restore_callback_states_from_checkpoint = resume_from_checkpoint is not None
        self._start_clock(resume_from_checkpoint)
        with memory_errors_name_the_remedy(self.args):
            result = super().train(resume_from_checkpoint)
        self.check_weights()
        largest_losses = [loss for loss in gather_objects(self.losses.largest) if loss is not None]
        if not self.state.global_step:
            reason = "no step was made; give more rows, or a smaller batch"
        elif largest_losses and max(largest_losses) == 0:
            reason = "the loss was 0 at every step: no query had a negative; mine some, or enlarge the batch"
        elif trained_weight_hashes(self.model) == self.weights_before:
            reason = "no weight has moved; raise --learning_rate, or leave --fp16 out"
        else:
            return result
        raise UserError(f"nothing was learned, and no model is saved: {reason}")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The loss of a micro-batch. Raises UserError when one is not a finite number, as LossWatch does."""
        rows = inputs["rows"]
        if self.model.training and (self.state.epoch or 0) < 1:
            self.cut_texts.count(inputs["cut_texts"])
        inputs = {name: tensor for name, tensor in inputs.items() if name not in ("rows", "cut_texts")}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        self.losses.look_at(loss, step=self.state.global_step + 1, rows=rows)
        return (loss, outputs) if return_outputs else loss

    def check_weights(self) -> None:
        """Raise UserError where a loss was not finite: the weights after it are no numbers."""
        self.losses.look_back(wait=True)

    def evaluate(
        self,
        eval_dataset: RetrievalTask | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Retrieval measures of the task on its whole candidate set, logged as `eval_MRR@10` and so on.

        There is one task: what transformers may give as eval_dataset and ignore_keys is not used.
        """
        if self.judge is not None and self.state.global_step == 0:
            self.log(self.measure(self.judge, _JUDGED))
        metrics = self.measure(self.eval_dataset, metric_key_prefix)
        self.log(metrics)
        if self.state.global_step == 0 and self.held_out is not None:
            task, prefix = self.judges()
            first = zip(map(text_id, task.queries), self.latest[prefix][1].tolist(), strict=True)
            self.state.log_history.append({"step": 0, BEFORE_TRAINING: list(map(list, first))})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def judges(self) -> tuple[RetrievalTask, str]:
        """The queries that judge the finished model, and the prefix of measures on them."""
        return (self.eval_dataset, "eval") if self.judge is None else (self.judge, _JUDGED)

    def measure(self, task: RetrievalTask, prefix: str) -> dict[str, float]:
        """Means of all measures over the queries of a task, `{"<prefix>_MRR@10": ...}`, and how long it took.

        They are those that evaluate.py gives for the weights as they are.
        """
        began = time.monotonic()
        with random_numbers_kept(), memory_errors_name_the_remedy(None):
            values = measure(self.encoder_as_it_stands(), task, measures=EVAL_MEASURES, cutoffs=EVAL_CUTOFFS)
        self.latest[prefix] = self.state.global_step, values[VERDICT_MEASURE]
        metrics = {f"{prefix}_{name}": value for name, value in means(values).items()}
        metrics[f"{prefix}_runtime"] = seconds = time.monotonic() - began
        self.seconds_measuring += seconds
        self.seconds_of_measurement = max(self.seconds_of_measurement, seconds)
        return metrics

    def encoder_as_it_stands(self) -> Encoder:
        """The model as it stands, for encoding. All processes call this together."""
        snapshot, options, flag = self.snapshot(), self.encoding, "--model_name_or_path"
        if self.frozen is not None:
            return self.frozen.encoder_with(load_tower(snapshot.model, options, flag=flag))
        if not self.mines_with_weights_that_are_measured():
            options = dataclasses.replace(options, embeddings_dir=None)  # nobody would look for them there
        return load_encoder(snapshot.model, options, flag=flag, scratch=snapshot.scratch)

    def metrics_at(self, step: int, prefix: str = "eval") -> dict[str, float] | None:
        """The measures that were logged at a step, without their prefix; None when there was no evaluation."""
        for entry in self.state.log_history:
            if entry["step"] == step and f"{prefix}_MRR@10" in entry:
                return {name.removeprefix(f"{prefix}_"): entry[name] for name in entry if "@" in name}
        return None

    def best_step(self) -> int | None:
        """The step whose weights measured best while training; None where no step was chosen."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def summary(self, train_metrics: dict[str, float]) -> Record:
        """What the run did, for people and for training_summary.json; evaluates the final weights if need be.

        train_metrics: those of train()'s result; time and rate are of this process, also in a resumed run.
        """
        best = 0 if self.base_kept else self.best_step()
        final = self.state.global_step if best is None else best
        if self.eval_dataset is not None and self.metrics_at(final) is None:
            self.evaluate()
        before, after = self.metrics_at(0), self.metrics_at(final)
        held_out = None if self.held_out is None else self.held_out.facts | _before_and_after(before, after)
        if self.judge is not None:
            self.log(judged := self.measure(self.judge, _JUDGED))
            before = self.metrics_at(0, _JUDGED)
            after = {name.removeprefix(f"{_JUDGED}_"): value for name, value in judged.items() if "@" in name}
        return {
            "rows": len(self.train_dataset),
            "steps": self.state.global_step,
            "epochs": self.epochs_made(),
            "seconds": train_metrics["train_runtime"],
            "samples_per_second": train_metrics["train_samples_per_second"],
            "best_step": best,
            **_before_and_after(before, after),
            "hold_out": held_out,
            "mining_rounds": None if self.rounds is None else self.rounds.audits,
            "frozen_passages": None if self.frozen is None else self.frozen.facts(),
            "checkpoint": self.args.output_dir,
            "version": __version__,
        }


def _before_and_after(before: dict[str, float] | None, after: dict[str, float] | None) -> Record:
    return {"metrics_before": before, "metrics_after": after}
