"""What the frameworks raise for a flag becomes one line that names the flag; everything else keeps its traceback."""

import re

import pytest
import torch

from embedding_finetune.command_line import UserError
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.flag_errors import errors_name_their_flag, flags_not_at_default


def raised_in(package, error, folder):
    """A function that raises the error from a file that lies where the package's files do."""
    file = folder / "site-packages" / package / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text("def fail(error):\n    raise error\n")
    scope = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    return lambda: scope["fail"](error)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("BertModel does not support gradient checkpointing."), "--gradient_checkpointing True: BertModel"),
        (ValueError("fp16 mixed\nprecision requires a GPU"), "--fp16 True: fp16 mixed precision requires a GPU"),
        (ImportError("install it for --report_to wandb"), "install it for --report_to wandb"),
        (OSError("cannot use galore_adamw here"), "--optim galore_adamw: cannot use"),
        (ValueError("Your assigned backend mpi is not available"), "--ddp_backend mpi: Your assigned"),
        (ImportError("something is missing"), "something is missing"),
        (NotImplementedError("fp16 is not for this device"), "--fp16 True"),
    ],
)
def test_what_a_framework_raises_for_a_flag_becomes_a_line_with_the_flag(tmp_path, error, line):
    given = {"gradient_checkpointing": True, "fp16": True, "optim": "galore_adamw", "report_to": "wandb", "seed": 1}
    given["ddp_backend"] = "mpi"
    with pytest.raises(UserError, match="^" + re.escape(line)), errors_name_their_flag(given):
        raised_in("transformers", error, tmp_path)()


def test_what_peft_raises_is_laid_to_the_adapters(tmp_path):
    with pytest.raises(UserError, match="--lora_rank 4: Target modules"), errors_name_their_flag({"lora_rank": 4}):
        raised_in("peft", ValueError("Target modules {'x'} not found"), tmp_path)()


@pytest.mark.parametrize(
    ("package", "error"),
    [
        ("numpy", ValueError("fp16 is wrong")),  # called by us, not by a framework
        ("transformers", ValueError("shapes differ")),  # no flag is named
        ("transformers", OSError(28, "No space left on device")),
        ("transformers", KeyError("fp16")),
        ("torch", ValueError("Caught ValueError in DataLoader worker process 0.\nfp16")),
    ],
)
def test_what_cannot_be_laid_to_a_flag_keeps_its_traceback(tmp_path, package, error):
    with pytest.raises(type(error)), errors_name_their_flag({"fp16": True}):
        raised_in(package, error, tmp_path)()


def test_a_fault_of_ours_keeps_its_traceback_also_when_a_framework_called_us(tiny_bert):
    backbone, _, config = load_backbone(str(tiny_bert), flag="--model")
    model = BiEncoder(backbone, config.with_flags(pooling="fp16"))
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="unknown pooling method 'fp16'"), errors_name_their_flag({"fp16": True}):
        model(**inputs)


def test_only_what_differs_from_its_default_may_be_the_cause(tmp_path):
    found = flags_not_at_default(RetrieverTrainingArguments(str(tmp_path), temperature=0.5, matryoshka_dims=[8]))
    assert found["temperature"] == 0.5
    assert found["matryoshka_dims"] == [8]
    assert "learning_rate" not in found
    assert "include_for_metrics" not in found  # its default is made by a factory
