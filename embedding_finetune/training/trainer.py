"""transformers' Trainer for a RetrievalLoss: our sampler, checkpoints and evaluation, progress on stderr."""

import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from embedding_finetune import __version__
from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.data.corpus import RetrievalTask
from embedding_finetune.data.jsonl import Record
from embedding_finetune.distributed import gather_objects
from embedding_finetune.evaluation.ranking import measure
from embedding_finetune.model.adapters import load_adapter, merged, save_adapter
from embedding_finetune.model.checkpoint import EmbeddingConfig, read_config, save_checkpoint
from embedding_finetune.model.folder import model_replaced
from embedding_finetune.model.loading import load_projection
from embedding_finetune.model.training_queries import write_training_queries
from embedding_finetune.retrieval.encoder import Encoder
from embedding_finetune.training.arguments import EVAL_CUTOFFS, EVAL_MEASURES, RetrieverTrainingArguments
from embedding_finetune.training.batches import EmbedCollator, EpochSampler, TrainDataset
from embedding_finetune.training.callbacks import CutTexts, RunLength, StderrProgress
from embedding_finetune.training.flags import SHARDED
from embedding_finetune.training.held_out import HeldOut
from embedding_finetune.training.loss import RetrievalLoss
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.one_file import OneFileSampler
from embedding_finetune.training.run_folder import Run, is_finished, write_run
from embedding_finetune.training.weights import saved_weights, trained_weight_hashes

logger = logging.getLogger(__name__)

_JUDGED = "judged"
"""The prefix of measures on the user's queries, where held-out ones choose the best weights."""
_TORCH_CANNOT_WRITE = re.compile("inline_container|iostream error|PytorchStreamWriter")
"""What torch.save says, as a RuntimeError, when the disk is full."""


class RetrievalTrainer(Trainer):
    """Trains the BiEncoder of a RetrievalLoss on a TrainDataset, and measures it on a RetrievalTask.

    With a task and held-out queries, these choose the best weights, and the task judges before and after training.

    What it saves is the BiEncoder alone, so that any tool loads it. trained_before: what read_training_queries gave for
    the weights that training starts from. neighbours: the rows that are to share a batch with each row.
    one_file_per_batch: whether only rows of one file share a batch. `run`: what checkpoints say about the run, see
    run_folder.py.
    """

    run: Run | None = None
    _sampler: EpochSampler

    def __init__(
        self,
        model: RetrievalLoss,
        args: RetrieverTrainingArguments,
        *,
        train_dataset: TrainDataset,
        data_collator: EmbedCollator,
        saved_config: EmbeddingConfig,
        trained_before: np.ndarray,
        neighbours: Neighbours | None = None,
        one_file_per_batch: bool = False,
        task: RetrievalTask | None = None,
        held_out: HeldOut | None = None,
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
        self.one_file_per_batch = one_file_per_batch
        self.held_out = held_out
        self.judge = None if held_out is None else task
        self.saved_config = saved_config
        self.training_queries = np.union1d(trained_before, train_dataset.known_positives.query_ids)
        # Measured as evaluate.py will measure the finished model.
        length = saved_config.max_seq_length or max(data_collator.query.max_length, data_collator.passage.max_length)
        self.encoder = Encoder(
            model.bi_encoder,
            data_collator.tokenizer,
            query_max_len=length,
            passage_max_len=length,
        )
        # The loss is a mean over one micro-batch: accumulated ones are to be averaged.
        self.loss_is_scaled_for_ga = False
        self.cut_texts = CutTexts(query=data_collator.query.max_length, passage=data_collator.passage.max_length)
        self.weights_before = trained_weight_hashes(model)
        self.largest_loss: float | None = None  # of this process's micro-batches
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StderrProgress(disabled=args.disable_tqdm))
        self.add_callback(self.cut_texts)
        self.add_callback(RunLength())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        """Train as transformers does, after a first evaluation where there is a task.

        A resumed run takes over all that the checkpoint's had counted: it was measured then, and early stopping would
        count another evaluation. Raises UserError when nothing was learned, whatever the cause.
        """
        self.args.eval_on_start = self.eval_dataset is not None and resume_from_checkpoint is None
        self.args.restore_callback_states_from_checkpoint = resume_from_checkpoint is not None
        result = super().train(resume_from_checkpoint)
        largest_losses = [loss for loss in gather_objects(self.largest_loss) if loss is not None]
        if not self.state.global_step:
            reason = "no step was made; give more rows, or a smaller batch"
        elif largest_losses and max(largest_losses) == 0:
            reason = "the loss was 0 at every step: no query had a negative; mine some, or enlarge the batch"
        elif trained_weight_hashes(self.model) == self.weights_before:
            reason = "no weight has moved; raise --learning_rate, or leave --fp16 out"
        else:
            return result
        raise UserError(f"nothing was learned, and no model is saved: {reason}")

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # In a resumed run of several processes neither transformers nor accelerate would reach it.
        self._sampler.set_epoch(epoch)
        if self.state.global_step >= self.state.max_steps:  # resumed from its last step, in the middle of an epoch
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The loss of a micro-batch. Raises UserError naming step and rows when it is not a finite number."""
        rows = inputs["rows"]
        if self.model.training and (self.state.epoch or 0) < 1:
            self.cut_texts.count(inputs["cut_texts"])
        inputs = {name: tensor for name, tensor in inputs.items() if name not in ("rows", "cut_texts")}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if not torch.isfinite(loss):
            counted = "counted from 1 over all files" if self.train_dataset.files.any() else "counted from 1"
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in a batch of the rows "
                f"{', '.join(str(row + 1) for row in rows.tolist())} ({counted}); "
                "lower --learning_rate, raise --temperature, or look at these rows"
            )
        self.largest_loss = max(self.largest_loss or 0.0, loss.item())
        return (loss, outputs) if return_outputs else loss

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
            self.log(self._measure(self.judge, _JUDGED))
        metrics = self._measure(self.eval_dataset, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def _measure(self, task: RetrievalTask, prefix: str) -> dict[str, float]:
        began, was_training = time.monotonic(), self.model.training
        self.model.eval()
        try:
            values = measure(self.encoder, task, measures=EVAL_MEASURES, cutoffs=EVAL_CUTOFFS)
        finally:
            self.model.train(was_training)
        metrics = {f"{prefix}_{name}": value for name, value in values.items()}
        metrics[f"{prefix}_runtime"] = time.monotonic() - began
        return metrics

    def metrics_at(self, step: int, prefix: str = "eval") -> dict[str, float] | None:
        """The measures that were logged at a step, without their prefix; None when there was no evaluation."""
        for entry in self.state.log_history:
            if entry["step"] == step and f"{prefix}_MRR@10" in entry:
                return {name.removeprefix(f"{prefix}_"): entry[name] for name in entry if "@" in name}
        return None

    def summary(self, train_metrics: dict[str, float]) -> Record:
        """What the run did, for people and for training_summary.json; evaluates the final weights if need be.

        train_metrics: those of train()'s result; time and rate are of this process, also in a resumed run.
        """
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        final = best or self.state.global_step
        if self.eval_dataset is not None and self.metrics_at(final) is None:
            self.evaluate()
        before, after = self.metrics_at(0), self.metrics_at(final)
        held_out = None if self.held_out is None else self.held_out.facts | _before_and_after(before, after)
        if self.judge is not None:
            self.log(judged := self._measure(self.judge, _JUDGED))
            before = self.metrics_at(0, _JUDGED)
            after = {name.removeprefix(f"{_JUDGED}_"): value for name, value in judged.items() if "@" in name}
        return {
            "rows": len(self.train_dataset),
            "steps": self.state.global_step,
            "epochs": self.state.epoch,
            "seconds": train_metrics["train_runtime"],
            "samples_per_second": train_metrics["train_samples_per_second"],
            "best_step": best,
            **_before_and_after(before, after),
            "hold_out": held_out,
            "checkpoint": self.args.output_dir,
            "version": __version__,
        }

    def _get_train_sampler(self, train_dataset: TrainDataset | None = None) -> EpochSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffle = self.args.train_sampling_strategy == "random"
        order: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "neighbours": self.neighbours}
        if self.one_file_per_batch:
            self._sampler = OneFileSampler(
                self.train_dataset.files,
                per_process=self.args.per_device_train_batch_size,
                processes=self.args.world_size,
                drop_last=self.args.dataloader_drop_last,
                **order,
            )
        else:
            self._sampler = EpochSampler(len(self.train_dataset), **order)
        return self._sampler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder, model = output_dir or self.args.output_dir, self.bi_encoder
        with model_replaced(folder) as staging:
            if self.args.lora_rank is not None:
                save_adapter(model.backbone, staging, alone=self.args.save_adapter_only)
            if not self.args.save_adapter_only:
                backbone = merged(model.backbone)
                save_checkpoint(staging, backbone, self.processing_class, self.saved_config, model.projection)
                write_training_queries(staging, self.training_queries)
            if self.run is not None:
                write_run(staging, self.run)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            if self.args.should_save and not is_finished(folder):
                shutil.rmtree(folder, ignore_errors=True)  # half of one is of no use, and may fill the disk
            if isinstance(error, OSError) or _TORCH_CANNOT_WRITE.search(str(error)):
                raise UserError(f"{folder}: cannot be written: {first_line(error)}") from error
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            if self.args.lora_rank is not None:
                load_adapter(self.bi_encoder.backbone, resume_from_checkpoint)
            else:
                self.bi_encoder.backbone.load_state_dict(saved_weights(resume_from_checkpoint))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{resume_from_checkpoint}: its weights are damaged, or those of another model: {first_line(error)}"
            ) from error
        if self.saved_config.dense:
            saved = load_projection(resume_from_checkpoint, read_config(resume_from_checkpoint))
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


def _before_and_after(before: dict[str, float] | None, after: dict[str, float] | None) -> Record:
    return {"metrics_before": before, "metrics_after": after}


@contextmanager
def _damage_named(checkpoint: str | None) -> Iterator[None]:
    """Raise UserError for whatever torch raises for a file of a checkpoint that is cut short or none of its own."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{checkpoint}: a file of it is damaged: {first_line(error)}; give another one") from error
