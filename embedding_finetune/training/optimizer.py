"""Optimizer, schedule and activation checkpointing, tried on one small parameter before there are data and a model."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler, trainer_optimizer

from embedding_finetune.command_line import UserError, first_line

if TYPE_CHECKING:
    from embedding_finetune.training.arguments import RetrieverTrainingArguments

_NOT_SAVED_BY_US = ("lomo", "adalomo", "schedule_free_", "_layerwise")
"""They step inside the backward pass, or keep other weights for evaluation: nothing here would save or resume these."""

_NOT_FINITE = ("nan", "inf", "+inf", "-inf", "infinity", "-infinity")
_ON_MODULES = ("galore_", "apollo_")
_CHECKPOINTING_OPTIONS = ("every_n_layers", "offload", "determinism_check", "debug", "early_stop")


def check_optimizer(args: "RetrieverTrainingArguments") -> None:
    """Raise UserError where --optim cannot be had, or would not use what --optim_args gives it."""
    name = args.optim.value
    if any(part in name for part in _NOT_SAVED_BY_US):
        raise UserError(f"--optim {name}: not supported; adamw_torch_fused, adafactor and sgd are")
    low_rank = name.startswith(_ON_MODULES)
    if (args.optim_target_modules is not None) != low_rank:
        raise UserError(f"--optim {name} and --optim_target_modules: galore and apollo need it, no other takes it")
    if low_rank:
        _check_package(name)
        return
    options_given = _optimizer_options(args.optim_args)
    with _named(f"--optim {name}" if args.optim_args is None else f"--optim {name} --optim_args {args.optim_args}"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    for option in options_given:
        if option == "weight_decay":
            raise UserError("--optim_args weight_decay: give --weight_decay instead")
        if not _is_read(args, options_given, option):
            raise UserError(f"--optim_args {option}: --optim {name} takes no such option")


def check_optimizer_takes(given: Mapping[str, object], args: "RetrieverTrainingArguments") -> None:
    """Raise UserError for a flag that was given and that --optim does not take; check_optimizer has passed."""
    name = args.optim.value
    if name.startswith(_ON_MODULES):
        return
    _, options = Trainer.get_optimizer_cls_and_kwargs(args)
    for flag, option in {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}.items():
        if flag in given and option not in options:
            raise UserError(f"--{flag}: --optim {name} does not take it; leave it out")


def _optimizer_options(text: str | None) -> dict[str, str]:
    """`momentum=0.9,nesterov=true` as a dict."""
    options = {}
    for part in text.replace(" ", "").split(",") if text else ():
        option, _, value = part.partition("=")
        if not re.fullmatch(r"\w+", option) or not re.fullmatch(r"[\w.+-]+", value) or value.lower() in _NOT_FINITE:
            raise UserError(f"--optim_args {text}: must be name=value, several with commas")
        options[option] = value
    return options


def _check_package(name: str) -> None:
    """The optimizers that ask for modules of the model look for their package first."""
    available = getattr(trainer_optimizer, f"is_{name.split('_')[0]}_torch_available")
    if not available():
        package = f"{name.split('_')[0]}_torch"
        raise UserError(f"--optim {name} needs the package {package}: pip install {package.replace('_', '-')}")


def _is_read(args: "RetrieverTrainingArguments", options: Mapping[str, str], option: str) -> bool:
    """Whether what the optimizer gets changes with this one of --optim_args."""
    seen = set()
    for value in ("0.123", "true", options[option]):
        tried = copy.copy(args)
        tried.optim_args = ",".join(f"{name}={given}" for name, given in {**options, option: value}.items())
        try:
            seen.add(str(Trainer.get_optimizer_cls_and_kwargs(tried)))
        except (ValueError, AttributeError):
            return True  # it was read, and this is no value for it
    return len(seen) > 1


def check_schedule(args: "RetrieverTrainingArguments") -> None:
    """Raise UserError where --lr_scheduler_type cannot be had with --lr_scheduler_kwargs, or gives no learning rate."""
    steps = args.max_steps if args.max_steps > 0 else 1000
    warmup = args.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    name = args.lr_scheduler_type.value
    what = f"--lr_scheduler_type {name}"
    if args.lr_scheduler_kwargs:
        what += f" --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
    with _named(what):
        schedule = get_scheduler(
            name,
            optimizer=optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if isinstance(schedule, LambdaLR):
            for step in (0, 1, warmup, (warmup + steps) // 2, steps - 1):
                factor = schedule.lr_lambdas[0](step)
                if not 0 <= factor < float("inf"):
                    raise ValueError(f"the learning rate at step {step} would be {factor * args.learning_rate}")


def check_activation_checkpointing(args: "RetrieverTrainingArguments") -> None:
    """Raise UserError for an option that nothing takes, or that would spoil gradients.

    With use_reentrant, or without preserve_rng_state, the second forward pass would draw other dropout masks.
    """
    if not args.activation_checkpointing:
        return
    options = dict(args.activation_checkpointing_kwargs or {})
    with _named(f"--activation_checkpointing_kwargs {args.activation_checkpointing_kwargs}"):
        if options.pop("use_reentrant", False) is not False:
            raise ValueError("use_reentrant must be false, else dropout differs between the two forward passes")
        if options.pop("preserve_rng_state", True) is not True:
            raise ValueError("preserve_rng_state must be true, else dropout differs between the two forward passes")
        for name in options:
            if name not in _CHECKPOINTING_OPTIONS:
                raise ValueError(f"{name} is unknown; {', '.join(_CHECKPOINTING_OPTIONS)} are known")
        layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        if type(layers) is not int or layers < 1:
            raise ValueError(f"every_n_layers is {layers!r}, not a whole number of at least 1")
        if not isinstance(offload, bool) or (offload and args.use_cpu):
            raise ValueError(f"offload is {offload!r}; it is true or false, and true needs a GPU")
        checkpoint(torch.neg, torch.zeros(1, requires_grad=True), use_reentrant=False, **options)


@contextmanager
def _named(flags: str) -> Iterator[None]:
    """Whatever the block raises becomes a UserError that names the flags it tries."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{flags}: {first_line(error)}") from error
