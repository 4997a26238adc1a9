"""What --freeze_passages does not take beside it: flags about passages that are trained, and about other models."""

from collections.abc import Mapping

from embedding_finetune.command_line import UserError

_WHOLE_POOL = "each query is trained against the whole pool, whatever its batch; leave it out"
_KEPT = "passages keep the embeddings that they have; leave it out"

REFUSED_BESIDE = {
    "train_group_size": _WHOLE_POOL,
    "use_inbatch_neg": _WHOLE_POOL,
    "negatives_cross_device": _WHOLE_POOL,
    "neighbours_in_batch": _WHOLE_POOL,
    "one_file_per_batch": _WHOLE_POOL,
    "mining_rounds": _WHOLE_POOL,
    "matryoshka_dims": _KEPT,
    "distillation_weight": "a teacher's scores are not for it; leave it out",
    "config_name": "passages are embedded with the model's own; leave it out",
    "tokenizer_name": "passages are embedded with the model's own; leave it out",
    "lora_rank": "its checkpoint holds two whole models; leave it out",
    "merge_with_base": "its checkpoint holds two whole models; leave it out",
}
"""Flag -> why it is refused, and what to do instead; flags that need one of these are refused with it."""


def check_freezing(given: Mapping[str, object]) -> None:
    """Raise UserError for a flag that would do nothing beside --freeze_passages.

    given: flag -> value, of the flags on the command line alone.
    """
    for flag, reason in REFUSED_BESIDE.items():
        value = given.get(flag)
        asks_for_nothing = value is True if flag == "use_inbatch_neg" else not value
        if flag in given and not asks_for_nothing:
            raise UserError(f"--freeze_passages True and --{flag} {_shown(value)}: {reason}")


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
