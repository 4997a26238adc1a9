"""What the model card says about a run: its base, its flags, its measures."""

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
import transformers

from embedding_finetune import __version__
from embedding_finetune.data.hold_out import what_is_new
from embedding_finetune.data.jsonl import Record
from embedding_finetune.model.card import CardFacts, Measured, base_names
from embedding_finetune.model.revisions import at_revision
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.same_run import decides_something
from embedding_finetune.training.trainer import RetrievalTrainer
from embedding_finetune.training.verdict import Verdict

_ALWAYS_SHOWN = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps temperature "
    "train_group_size query_max_len passage_max_len seed"
).split()
_ABOUT_TRAINED_PASSAGES = ("train_group_size", "passage_max_len")
SHOWN_TEXTS = set(
    "recipe hold_out_by query_instruction_for_retrieval passage_instruction_for_retrieval sentence_pooling_method "
    "sampling_strategy train_sampling_strategy optim_args".split()
)
"""Flags whose values are texts and may be shown. Any other may be a path, or a secret."""


def card_of(
    trainer: RetrievalTrainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    given: Mapping[str, object],
    repository: str | None,
) -> CardFacts:
    """What is known before the first step. given: flag -> value, of the flags that are not at their default."""
    args, base = trainer.args, model_args.model_name_or_path
    shown = [flag for flag in _ALWAYS_SHOWN if trainer.frozen is None or flag not in _ABOUT_TRAINED_PASSAGES]
    return CardFacts(
        config=trainer.saved_config,
        dimensions=trainer.bi_encoder.dimensions,
        rows=len(trainer.train_dataset),
        losses=losses_of(args),
        settings=settings_of({**{flag: _value(flag, args, data_args) for flag in shown}, **given}, args),
        versions={
            "embedding_finetune": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        base=base_names(base),
        revision=at_revision(base)[1].get("revision"),
        repository=repository,
        adapter_alone=args.save_adapter_only,
        runs_own_code=model_args.trust_remote_code,
        passage_model=None if trainer.frozen is None else trainer.frozen.described,
    )


def losses_of(args: RetrieverTrainingArguments) -> list[str]:
    """sentence-transformers' names of the losses, by which the hub finds models."""
    names = ["MultipleNegativesRankingLoss"]
    if args.matryoshka_dims:
        names.insert(0, "MatryoshkaLoss")
    if args.distillation_weight > 0:
        names.append("DistillKLDivLoss")
    return names


def settings_of(given: Mapping[str, object], args: RetrieverTrainingArguments) -> dict[str, Any]:
    """The flags that say how the weights came about, without those whose values are paths or may be."""
    shown = {}
    for flag, value in given.items():
        if not (flag in _ALWAYS_SHOWN or decides_something(flag)) or value in (None, [], {}):
            continue
        value = value.value if isinstance(value, Enum) else value
        texts = [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, str)]
        if not texts or flag in SHOWN_TEXTS or isinstance(given[flag], Enum):
            shown[flag] = value
    if args.max_steps > 0:
        shown.pop("num_train_epochs", None)
    else:
        shown.pop("max_steps", None)
    return shown | ({"processes": args.world_size} if args.world_size > 1 else {})


def _value(flag: str, *groups: Any) -> Any:
    return next(getattr(group, flag) for group in groups if hasattr(group, flag))


def with_outcome(
    card: CardFacts, trainer: RetrievalTrainer, data_args: DataArguments, summary: Record, verdict: Verdict | None
) -> CardFacts:
    """The card of the finished model: with what was measured, if anything was."""
    after = summary["metrics_after"]
    note = ""
    if trainer.base_kept:
        note = "Training measured worse than the base, so these are the weights of the base."
    elif trainer.best_step() is not None:
        note = f"These are the weights of step {trainer.best_step()}, which measured best."
    if after is None:
        return replace(card, note=note)
    by_file = data_args.eval_query_file_jsonl_path is not None
    measured = Measured(
        what="questions of an evaluation file" if by_file else what_is_new(data_args.hold_out_by),
        queries=len(trainer.judges()[0].queries),
        before=summary["metrics_before"],
        after=after,
        verdict="" if verdict is None else told(verdict),
    )
    return replace(card, measured=measured, note=note)


def told(verdict: Verdict) -> str:
    """The verdict without the name of the file that judges."""
    return (
        f"Beside the model before training: {verdict.outcome}. {verdict.measure} differs by {verdict.difference:+.4f} "
        f"(95% interval {verdict.low:+.4f} to {verdict.high:+.4f}, p = {verdict.p_value:.2g})."
    )
