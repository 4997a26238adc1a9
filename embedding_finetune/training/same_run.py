"""Whether a run that is resumed is the one that began: what decides about its result, its data and its flags.

It goes on exactly, or does not go on, or a warning says what is lost.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.training.row_columns import read_column, rows_digest
from embedding_finetune.training.run_data import RunData
from embedding_finetune.training.run_folder import Run, read_run
from embedding_finetune.training.weights import weights_hash

if TYPE_CHECKING:
    from embedding_finetune.training.arguments import RetrieverTrainingArguments
    from embedding_finetune.training.trainer import RetrievalTrainer

logger = logging.getLogger(__name__)

_DECIDES_NOTHING = re.compile(
    r"(log|logging|save|eval|dataloader(?!_drop_last)|ddp|gradient_checkpointing|activation_checkpointing)_\w+"
    r"|(gradient|activation)_checkpointing|per_device_train_batch_size|gradient_accumulation_steps|world_size"
    r"|model_name_or_path|config_name|tokenizer_name|cache_dir|trust_remote_code|train_data|columns|output_dir"
    r"|overwrite_output_dir|resume_from_checkpoint|num_train_epochs|max_steps|tokens_per_sub_batch"
    r"|recompute_sub_batches|report_to|run_name|project|disable_tqdm|use_cpu|local_rank|load_best_model_at_end"
    r"|metric_for_best_model|greater_is_better|early_stopping_patience|merge_with_base|torch_empty_cache_steps"
    r"|restore_callback_states_from_checkpoint|do_train|do_eval|skip_memory_metrics|candidate_pool|embeddings_dir"
    r"|accelerator_config|judgements|push_to_hub|hub_\w+"
)
"""Flags that change nothing of a run's weights, or may change when it is resumed, or are told in another way."""
_OF_THE_DEVICE = "accelerator_config"
"""Set by the suite alone, to how batches are copied. Runs of earlier versions have it among what decides."""


def decides_something(flag: str) -> bool:
    """Whether a run's weights depend on the flag itself; data and length are told in another way."""
    return _DECIDES_NOTHING.fullmatch(flag) is None


def what_decides(
    given: Mapping[str, object],
    args: "RetrieverTrainingArguments",
    data: RunData,
) -> Run:
    """What the result of a run depends on, as JSON takes it: flags, rows, and what held-out rows measure.

    given: flag -> value, of the flags that are not at their default. How long a run is may change when it is resumed,
    unless it has rounds, and so may how many processes share a batch.
    """
    flags = {flag: value for flag, value in given.items() if decides_something(flag)}
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = data.dataset.rows
    described = {**flags, "rows": len(rows), "rows_digest": rows_digest(rows), "batch_of_all_processes": batch}
    if confirmed := int(read_column(rows, "confirmed").sum()):
        described["confirmed_negatives"] = confirmed
    if data.held_out is not None:
        described["held_out_digest"] = data.held_out.digest
    if data.rounds is not None:
        mined_among = data.rounds.corpus.digest_in_order()
        described |= {"mined_among": mined_among, "length": [args.num_train_epochs, args.max_steps]}
    if data.pool is not None:
        described["trained_against"] = data.pool.digest_in_order()
    if flags.get("one_file_per_batch"):
        # Micro-batches end where files end. So their rows depend on files and sizes.
        described["rows_of_one_file"] = args.per_device_train_batch_size * args.world_size
        described["rows_of_files"] = np.bincount(read_column(rows, "file")).tolist()
    return json.loads(json.dumps({"decided_by": described}, default=str))


def what_the_model_decides(trainer: "RetrievalTrainer") -> Run:
    """The part of it that is known when the model is loaded."""
    config = trainer.saved_config
    instructions = [config.query_instruction, config.passage_instruction]
    decided: Run = {"base_weights": weights_hash(trainer.model), "instructions": instructions}
    if trainer.frozen is not None:
        decided |= {"index": trainer.frozen.tower.index_digest, "hardest": trainer.frozen.hardest is not None}
    return decided


def check_same_run(checkpoint: str | None, decided_by: Run) -> None:
    """Raise UserError where a run would go on otherwise than it began: with other rows or flags."""
    began = None if checkpoint is None else read_run(Path(checkpoint))
    if began is None or "decided_by" not in began:
        return
    before, now = ({**run["decided_by"], _OF_THE_DEVICE: None} for run in (began, decided_by))
    names = before.keys() | now.keys()
    if "base_weights" not in now:
        names -= {"base_weights", "instructions", "index", "hardest"}  # no model is loaded yet
    for name in sorted(names, key=lambda name: (name != "rows", name != "rows_digest", name)):
        if before.get(name) != now.get(name):
            what = {
                "rows": f"{now.get('rows')} training rows, where it had {before.get('rows')}",
                "rows_digest": "other training rows",
                "held_out_digest": (
                    "other held-out rows or candidates, by --hold_out or --candidate_pool, or others of them that "
                    "choose weights"
                ),
                "mined_among": "other passages to mine from, by --candidate_pool",
                "trained_against": "other passages to train against, by --candidate_pool",
                "instructions": "other instructions before queries or passages",
                "index": "other embeddings of passages",
                "hardest": "another part of the passages to train against, by the memory of the machine,",
                "length": "rounds of another length, by --num_train_epochs or --max_steps,",
                "base_weights": "another --model_name_or_path",
                "batch_of_all_processes": f"batches of {now.get(name)}, where it had {before.get(name)}",
                "rows_of_one_file": f"batches of {now.get(name)} rows of one file, where it had {before.get(name)}",
                "rows_of_files": "the rows in other files",
            }.get(name, f"--{name} {_shown(now.get(name))}, where it had {_shown(before.get(name))}")
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: the run would go on with {what}; give what it was started "
                "with, or train on from its weights with --model_name_or_path"
            )


def warn_of_what_is_lost(checkpoint: str | None, args: "RetrieverTrainingArguments") -> None:
    """Log a warning for each file that a checkpoint lacks, and without which a run goes on, but not exactly.

    Without others it does not go on: resume_point names them.
    """
    if checkpoint is None:
        return
    folder = Path(checkpoint)
    lost = {}
    if "decided_by" not in (read_run(folder) or {}):
        lost["a training_run.json with rows and flags"] = (
            "it cannot be checked that they are those that the run was started with"
        )
    processes = args.world_size
    states = [f"rng_state_{number}.pth" for number in range(processes)] if processes > 1 else ["rng_state.pth"]
    if missing := [name for name in states if not (folder / name).exists()]:
        lost[", ".join(missing)] = (
            f"another number of processes than {processes} wrote it, and dropout will draw other numbers than there"
        )
    if args.fp16 and not (folder / "scaler.pt").exists():
        lost["scaler.pt"] = "the scale of the loss for --fp16 begins anew"
    for names, what in lost.items():
        logger.warning("warning: --resume_from_checkpoint %s: lacks %s: %s", checkpoint, names, what)


def _shown(value: object) -> str:
    return "the default" if value is None else str(value)
