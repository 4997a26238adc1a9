"""Which values of finetune.py's flags make sense, and which of transformers' flags are refused, each with its reason.

Nothing here needs torch. docs/flags.md is the same for people, and tests/test_flags.py holds the two together.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from embedding_finetune.command_line import UserError
from embedding_finetune.mining.arguments import CHOICE_FLAGS
from embedding_finetune.parser import LARGEST_COUNT, LARGEST_SEED

if TYPE_CHECKING:
    from embedding_finetune.training.arguments import DataArguments, RetrieverTrainingArguments

_MEASURED = "retrieval is measured with the whole candidate set; leave it out"
SHARDED = "not supported; torchrun alone trains on several GPUs, --recompute_sub_batches True saves memory"
_COMPILED = "sub-batches change their shape at every step, and each shape would be compiled anew; leave it out"
_ONE_UPLOAD = "the finished model is uploaded once, at the end; leave it out"
_EXACT = "batches and their order are this suite's own, the same for any number of processes; leave it out"
_TEXTS = "rows are texts, not columns of a model's input; leave it out"

REFUSED = {
    "do_train": "finetune.py trains; leave it out",
    "do_predict": "finetune.py does not predict; evaluate.py ranks passages",
    "eval_on_start": "with queries to measure with, this is done before the first step anyway; leave it out",
    "per_device_eval_batch_size": "evaluation makes its batches by length; leave it out",
    "prediction_loss_only": _MEASURED,
    "eval_do_concat_batches": _MEASURED,
    "eval_use_gather_object": _MEASURED,
    "eval_accumulation_steps": _MEASURED,
    "include_for_metrics": _MEASURED,
    "batch_eval_metrics": _MEASURED,
    "bf16_full_eval": "measures during training are evaluate.py's, in its precision; its --dtype bfloat16 is another",
    "fp16_full_eval": "measures during training are evaluate.py's, in its precision; its --dtype float16 is another",
    "greater_is_better": "every measure is better when it is greater; leave it out",
    "label_smoothing_factor": "it has no meaning for the contrastive loss; leave it out",
    "label_names": _TEXTS,
    "remove_unused_columns": _TEXTS,
    "length_column_name": _TEXTS,
    "use_cache": "an embedding model generates no text; leave it out",
    "use_liger_kernel": "its kernels are for models with a language head; leave it out",
    "liger_kernel_config": "its kernels are for models with a language head; leave it out",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "auto_find_batch_size": "another batch is another training; --recompute_sub_batches True makes any batch fit",
    "average_tokens_across_devices": "the loss is a mean over queries, not over tokens; leave it out",
    "logging_nan_inf_filter": "a loss that is not finite ends the run; leave it out",
    "fsdp": SHARDED,
    "fsdp_config": SHARDED,
    "deepspeed": SHARDED,
    "parallelism_config": SHARDED,
    "accelerator_config": _EXACT,
    "dataloader_in_order": _EXACT,
    "ignore_data_skip": "a resumed run goes on exactly where it stopped; leave it out",
    "debug": "a loss that is not finite ends the run and names its rows; leave it out",
    "restore_callback_states_from_checkpoint": "a resumed run goes on exactly where it stopped; leave it out",
    "enable_jit_checkpoint": "a run that is stopped would be saved as a finished one; --save_steps bounds what is lost",
    "hub_token": "other users of the machine see it in the command line; run `hf auth login`, or set HF_TOKEN",
    "hub_strategy": _ONE_UPLOAD,
    "hub_always_push": _ONE_UPLOAD,
    "trackio_space_id": "trackio's uploads are not supported; leave it out",
    "trackio_bucket_id": "trackio's uploads are not supported; leave it out",
    "trackio_static_space_id": "trackio's uploads are not supported; leave it out",
}
"""Flag -> why any value but the one that describes this suite is refused, and what to do instead."""

OF_OLD = {
    "evaluation_strategy": "--eval_strategy",
    "warmup_ratio": "--warmup_steps with a share below 1",
    "no_cuda": "--use_cpu True",
    "group_by_length": "leaving it out: batches are sorted by length anyway",
    "save_safetensors": "leaving it out: weights are saved as safetensors always",
}
"""Flags of transformers that are gone -> what to use instead."""

_DESCRIBES_THIS_SUITE = {
    **dict.fromkeys(
        ("do_train", "eval_on_start", "greater_is_better", "restore_callback_states_from_checkpoint"), True
    ),
    "hub_strategy": "end",
}
"""Where that value is not transformers' default."""

_Rule = tuple[str, Callable[[float], bool], str]
_RULES: tuple[_Rule, ...] = (
    ("seed data_seed", lambda n: 0 <= n <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}"),
    ("max_steps", lambda n: n >= 1 or n == -1, "at least 1, or -1 for --num_train_epochs to decide"),
    (
        "train_group_size query_max_len passage_max_len max_example_num_per_dataset tokens_per_sub_batch lora_rank "
        "early_stopping_patience per_device_train_batch_size gradient_accumulation_steps torch_empty_cache_steps "
        "save_total_limit dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout matryoshka_dims",
        lambda n: n >= 1,
        "at least 1",
    ),
    (
        "neighbours_in_batch mining_rounds dataloader_num_workers distillation_weight weight_decay max_grad_norm "
        "warmup_steps eval_delay",
        lambda n: n >= 0,
        "at least 0",
    ),
    (
        "temperature teacher_temperature matryoshka_weights learning_rate adam_epsilon num_train_epochs "
        "neftune_noise_alpha logging_steps save_steps eval_steps minutes",
        lambda n: n > 0,
        "greater than 0",
    ),
    (
        "logging_steps save_steps eval_steps warmup_steps",
        lambda n: n <= 1 or n == int(n),
        "a whole number of steps, or a share of all steps below 1",
    ),
    ("dataloader_num_workers dataloader_prefetch_factor", lambda n: n <= 1024, "at most 1024"),
    ("learning_rate", lambda n: n <= 1, "at most 1"),
    ("false_negative_margin", lambda n: n >= 0, "at least 0"),
    ("dropout", lambda n: 0 <= n < 1, "at least 0 and below 1"),
    ("adam_beta1 adam_beta2", lambda n: 0 <= n < 1, "at least 0 and below 1"),
    ("merge_with_base", lambda n: 0 < n < 1, "between 0 and 1"),
    (
        "hold_out",
        lambda n: 0 <= n < 1 or (n >= 1 and n == int(n)),
        "a share of the queries below 1, or a whole number of them",
    ),
)
"""Flags, what holds for their values, and how a value has to be that does not."""

_JSON_OBJECTS = "lr_scheduler_kwargs activation_checkpointing_kwargs gradient_checkpointing_kwargs".split()

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_KWARGS = ("constant", "constant_with_warmup")

_QUERIES = "--hold_out or --eval_query_file_jsonl_path"
"""What measuring during training needs."""
_NAMED_BY_RUN = {"wandb", "trackio", "comet_ml", "mlflow", "swanlab"}

_LAUNCHED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def check_numbers(args: Any) -> None:
    """Raise UserError for a number, in any field of a dataclass of flags, that makes no sense."""
    for flag in (field.name for field in fields(args)):
        value = getattr(args, flag)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                wanted = _what_it_must_be(flag, number)
                if wanted is not None:
                    raise UserError(f"--{flag} {number}: must be {wanted}")


def _what_it_must_be(flag: str, number: float) -> str | None:
    """None where it is."""
    if not math.isfinite(number):
        return "a finite number"
    for flags, holds, wanted in _RULES:
        if flag in flags.split() and not holds(number):
            return wanted
    if number > LARGEST_COUNT and "seed" not in flag:
        return f"at most {LARGEST_COUNT}"
    return None


def check_known(rest: Sequence[str]) -> None:
    """Raise UserError where the parser left anything over."""
    if not rest:
        return
    name = rest[0].lstrip("-").partition("=")[0].replace("-", "_")
    instead = f"; use {OF_OLD[name]}" if name in OF_OLD else ""
    raise UserError(f"unrecognized arguments: {' '.join(rest)}{instead} (--help lists the flags)")


def check_given(given: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raise UserError for a flag that would do nothing here, or harm, and for JSON that is none.

    given: flag -> value, of the flags on the command line alone. defaults: flag -> default, of at least these.
    """
    for flag, value in given.items():
        if flag in REFUSED and value != _DESCRIBES_THIS_SUITE.get(flag, defaults[flag]):
            values = value if isinstance(value, list) else ["..." if flag == "hub_token" else value]
            shown = " ".join(str(getattr(part, "value", part)) for part in values)
            raise UserError(f"--{flag} {shown}: {REFUSED[flag]}")
        if flag in _JSON_OBJECTS:
            _check_json_object(flag, str(value))
    if given.get("local_rank", -1) not in (-1, int(os.environ.get("LOCAL_RANK", "-1"))):
        raise UserError(f"--local_rank {given['local_rank']}: start several processes with torchrun, and leave it out")


def check_needs(given: Mapping[str, object], data: "DataArguments", args: "RetrieverTrainingArguments") -> None:
    """Raise UserError for a flag that does nothing without another one that is not given.

    Steps beside a strategy that was turned off by `no` are let pass: that is how a fixed command is varied.
    """
    holds_out = data.hold_out is not None
    by_recipe = data.recipe is not None  # the flags that it adds are checked when they are there
    has_queries = data.eval_query_file_jsonl_path is not None or holds_out or by_recipe
    evaluates = args.eval_strategy != "no" or by_recipe
    schedule = args.lr_scheduler_type.value
    has_workers = args.dataloader_num_workers > 0
    needs = {
        "logging_steps": (args.logging_strategy in ("steps", "no"), "--logging_strategy steps"),
        "save_steps": (args.save_strategy in ("steps", "no"), "--save_strategy steps"),
        "eval_steps": (args.eval_strategy == "steps" or given.get("eval_strategy") == "no", "--eval_strategy steps"),
        "eval_delay": (evaluates, "--eval_strategy steps or epoch"),
        "early_stopping_patience": (evaluates, "--eval_strategy steps or epoch"),
        "metric_for_best_model": (evaluates, "--eval_strategy steps or epoch"),
        "load_best_model_at_end": (evaluates, "--eval_strategy steps or epoch"),
        "do_eval": (has_queries, _QUERIES),
        "eval_on_start": (has_queries, _QUERIES),
        "hold_out_by": (holds_out or by_recipe, "--hold_out"),
        **dict.fromkeys(CHOICE_FLAGS, (data.mining_rounds > 0 or by_recipe, "--mining_rounds")),
        "embeddings_dir": (
            data.mining_rounds > 0 or args.freeze_passages or by_recipe,
            "--mining_rounds or --freeze_passages True",
        ),
        "candidate_pool": (
            holds_out or data.mining_rounds > 0 or args.freeze_passages or by_recipe,
            "--hold_out, --mining_rounds or --freeze_passages True",
        ),
        "activation_checkpointing_kwargs": (args.activation_checkpointing, "--activation_checkpointing True"),
        "gradient_checkpointing_kwargs": (args.activation_checkpointing, "--gradient_checkpointing True"),
        "dataloader_prefetch_factor": (has_workers, "--dataloader_num_workers"),
        "dataloader_persistent_workers": (has_workers, "--dataloader_num_workers"),
        "dataloader_multiprocessing_context": (has_workers, "--dataloader_num_workers"),
        "run_name": (_NAMED_BY_RUN & set(args.report_to), f"--report_to {' or '.join(sorted(_NAMED_BY_RUN))}"),
        "project": ("trackio" in args.report_to, "--report_to trackio"),
        "warmup_steps": (schedule not in _WITHOUT_WARMUP, "another --lr_scheduler_type, as constant_with_warmup"),
        "lr_scheduler_kwargs": (schedule not in _WITHOUT_KWARGS, "another --lr_scheduler_type"),
        "ddp_timeout": (not args.use_cpu, "GPUs"),
        "teacher_temperature": (args.distillation_weight > 0, "--distillation_weight"),
        **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), (args.uploads, "--push_to_hub True")),
    }
    for flag, value in given.items():
        if flag in needs and value and not needs[flag][0]:
            raise UserError(f"--{flag} needs {needs[flag][1]}: it would do nothing")
    if given.get("do_eval", True) is False and has_queries:
        raise UserError(f"--do_eval False: leave out {_QUERIES}")
    if args.save_strategy == "best" and not evaluates:
        raise UserError("--save_strategy best needs --eval_strategy steps or epoch")


def check_launcher() -> None:
    """Raise UserError where a launcher's environment asks for what training does not do."""
    for variable, name in _LAUNCHED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t"):
            raise UserError(f"{variable} asks for {name}: {SHARDED}")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        raise UserError(f"ACCELERATE_DYNAMO_BACKEND asks for --torch_compile: {_COMPILED}")

    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION asks for {precision}: bf16 and fp16 are supported")


def _check_json_object(flag: str, text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"--{flag} {text}: must be a JSON object, for example '{{\"name\": 1}}'")
