"""Optimizer, schedule and activation checkpointing are tried before there are data and a model."""

import re

import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.optimizer import check_optimizer_takes


def arguments(tmp_path, **flags):
    """Arguments check their optimizer, schedule and checkpointing when they are made."""
    return RetrieverTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
)
def test_what_can_be_trained_with_is_taken(tmp_path, flags):
    assert arguments(tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"optim": "adalomo"}, "--optim adalomo: not supported"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "--optim sgd --optim_args momentum=-1: Invalid momentum"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "--optim_args momentun: --optim sgd takes no such option"),
        ({"optim": "sgd", "optim_target_modules": "attn"}, "--optim sgd and --optim_target_modules"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "--lr_scheduler_type polynomial"),
        (
            {"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "lr_scheduler_kwargs": {"mode": "min"}},
            '--lr_scheduler_kwargs {"mode": ...}',
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant must be false",
        ),
    ],
)
def test_what_could_not_be_trained_with_names_its_flag(tmp_path, flags, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        arguments(tmp_path, **flags)


@pytest.mark.parametrize(("optimizer", "flag"), [("sgd", "adam_beta1"), ("adafactor", "adam_epsilon")])
def test_only_a_flag_that_was_given_has_to_be_of_use_to_the_optimizer(tmp_path, optimizer, flag):
    args = arguments(tmp_path, optim=optimizer)
    check_optimizer_takes({"optim": optimizer}, args)
    with pytest.raises(UserError, match=f"--{flag}: --optim {optimizer} does not take it"):
        check_optimizer_takes({"optim": optimizer, flag: 0.5}, args)
