"""transformers' Trainer for a BiEncoder: our sampler, our checkpoints, progress on stderr."""

import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from embedding_finetune.checkpoint import EmbeddingConfig, save_checkpoint
from embedding_finetune.data import EmbedCollator, EpochSampler, TrainDataset
from embedding_finetune.model import BiEncoder
from embedding_finetune.training_arguments import RetrieverTrainingArguments

logger = logging.getLogger(__name__)


class RetrievalTrainer(Trainer):
    """Trains a BiEncoder on a TrainDataset and saves it so that any tool embeds with it alike."""

    def __init__(
        self,
        model: BiEncoder,
        args: RetrieverTrainingArguments,
        *,
        train_dataset: TrainDataset,
        data_collator: EmbedCollator,
        saved_config: EmbeddingConfig,
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=data_collator.tokenizer,
        )
        self.saved_config = saved_config
        # The loss is a mean over one micro-batch: accumulated ones are to be averaged.
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StderrProgress(disabled=args.disable_tqdm))

    def _get_train_sampler(self, train_dataset: TrainDataset | None = None) -> EpochSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffle = self.args.train_sampling_strategy == "random"
        return EpochSampler(len(self.train_dataset), seed=seed, shuffle=shuffle)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_checkpoint(
                output_dir or self.args.output_dir,
                self.model.backbone,
                self.processing_class,
                self.saved_config,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        self.model.backbone.load_state_dict(weights)


class StderrProgress(ProgressCallback):
    """A progress bar and log lines, all on stderr: stdout carries results only."""

    def __init__(self, *, disabled: bool):
        super().__init__()
        self.disabled = disabled

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and self.disabled:
            self.training_bar.disable = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs is not None:
            line = "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in logs.items()
                if name != "total_flos"
            )
            tqdm.write(f"step {state.global_step}  {line}", file=sys.stderr)
