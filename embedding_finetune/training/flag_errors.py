"""What the frameworks raise for a flag, or for want of memory, becomes one line that names the flag."""

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedding_finetune.command_line import UserError
from embedding_finetune.model.encoding_kernels import is_out_of_memory

if TYPE_CHECKING:
    from embedding_finetune.training.arguments import RetrieverTrainingArguments

_FRAMEWORKS = {"transformers", "accelerate", "peft"}
_FLAGS_OF_PACKAGE = {"peft": "lora_rank"}
_OURS = Path(__file__).resolve().parent.parent


@contextmanager
def errors_name_their_flag(given: Mapping[str, object]) -> Iterator[None]:
    """Raise UserError with the flag where a framework refuses a flag, by a ValueError, ImportError or OSError.

    Everything else keeps its traceback: what this package raised, what numpy or torch raised when it called them, and
    what names no flag. given: flag -> value, of the flags that may be the cause.
    """
    try:
        yield
    except (ValueError, ImportError, OSError, NotImplementedError) as error:
        package = _raised_for(error)
        if package is None or getattr(error, "errno", None) is not None:
            raise  # an errno is the system's: a file, a disk
        message = " ".join(str(error).split()) or type(error).__name__
        flag = _named_flag(message, given) or _FLAGS_OF_PACKAGE.get(package)
        if flag is None or flag not in given:
            if isinstance(error, ImportError):
                raise UserError(message) from error
            raise
        raise UserError(message if f"--{flag}" in message else f"--{flag} {given[flag]}: {message}") from error


@contextmanager
def memory_errors_name_the_remedy(args: "RetrieverTrainingArguments | None") -> Iterator[None]:
    """Raise UserError with the flags that save memory where training runs out of the device's; None for measuring."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if args is None:
            raise UserError("out of GPU memory in an evaluation: use a GPU that nothing else uses") from error
        raise UserError(f"out of GPU memory: {_saving_memory(args)}") from error


def _saving_memory(args: "RetrieverTrainingArguments") -> str:
    """What to try next, by what was tried."""
    batch = f"--per_device_train_batch_size below {args.per_device_train_batch_size}"
    if not args.recompute_sub_batches:
        return (
            "give --recompute_sub_batches True, which keeps the activations of one sub-batch of --tokens_per_sub_batch "
            f"at a time and gives the same result; or a {batch}"
        )
    tokens = args.tokens_per_sub_batch
    remedies = [f"a --tokens_per_sub_batch below {tokens}" if tokens else "--tokens_per_sub_batch 4096", f"a {batch}"]
    if args.mixed_precision == "no":
        remedies.append("--bf16 True")
    if args.lora_rank is None and not args.freeze_passages:
        remedies.append("--lora_rank 16, which trains few weights")
    return f"give {', or '.join(remedies)}"


def flags_not_at_default(*arguments: Any) -> dict[str, object]:
    """flag -> value of every flag of these dataclasses that is not at its default."""
    changed = {}
    for group in arguments:
        for field in (field for field in fields(group) if field.init):
            value = getattr(group, field.name)
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if value != default:
                changed[field.name] = value
    return changed


def _raised_for(error: Exception) -> str | None:
    """The framework that raised it, itself or by way of other libraries; None where this package did.

    The innermost frame that belongs to a framework or to this package decides. What a worker process raised comes
    through torch's DataLoader, and is our collator's.
    """
    if "in DataLoader worker process" in str(error):
        return None
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).resolve()
        package = next((part for part in reversed(path.parts) if part in _FRAMEWORKS), None)
        if path.is_relative_to(_OURS):
            return None
        if package is not None and "site-packages" in path.parts:
            return package
    return None


def _named_flag(message: str, given: Mapping[str, object]) -> str | None:
    """The longest of these flags that the message names, else the one whose value it quotes."""
    said = re.sub(r"[^a-z0-9]+", " ", message.lower())
    named = [flag for flag in given if re.search(rf"\b{flag.replace('_', ' ')}", said)]
    words = message.lower().split()
    quoted = [flag for flag, value in given.items() if isinstance(value, str) and value.lower() in words]
    return max(named or quoted, key=len, default=None)
