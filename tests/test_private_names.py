"""The names of torch and transformers that nobody promised to keep, and that this suite leans on all the same.

After an upgrade this is the first test to look at: it says which of them is gone. Where they are used, it says too.
"""

import importlib
import inspect
import re

import pytest
import torch
from helpers.data import REPOSITORY
from transformers import BertConfig, PreTrainedTokenizerFast, Trainer
from transformers.utils import cached_file

ATTRIBUTES = {
    "torch.ops.mkldnn": ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise"),
    "torch.cpu": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    "torch._inductor.config": ("freezing",),
    "torch._inductor.cpp_builder": ("get_cpp_compiler",),
    "torch._inductor.exc": ("InvalidCxxCompiler",),
    "transformers.masking_utils": ("AttentionMaskInterface", "sdpa_mask"),
    "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
}
TRAINER_HOOKS = {
    "_finalize_training", "_get_train_sampler", "_init_training_state", "_load_best_model", "_load_from_checkpoint",
    "_load_optimizer_and_scheduler", "_load_rng_state", "_run_epoch", "_save", "_save_checkpoint",
}  # fmt: skip
CACHED_FILE = {
    "_raise_exceptions_for_connection_errors",
    "_raise_exceptions_for_gated_repo",
    "_raise_exceptions_for_missing_entries",
}
DOORS = {
    "encoding_kernels.py",
    "training_kernels.py",
    "attention.py",
    "checkpoint.py",
    "checkpointing.py",
    "pacing.py",
}


@pytest.mark.parametrize(("place", "names"), ATTRIBUTES.items(), ids=ATTRIBUTES)
def test_the_private_names_that_we_lean_on_are_there(place, names):
    holder = torch.ops.mkldnn if place == "torch.ops.mkldnn" else importlib.import_module(place)
    assert [name for name in names if not hasattr(holder, name)] == []


def test_the_hooks_of_the_trainer_and_the_keywords_that_we_lean_on_are_there():
    assert {name for name in TRAINER_HOOKS if not hasattr(Trainer, name)} == set()
    # Its signature takes more keywords on to the function that knows them.
    source = inspect.getsource(inspect.getmodule(inspect.unwrap(cached_file)))
    assert {name for name in CACHED_FILE if name not in source} == set()
    assert hasattr(BertConfig(), "_attn_implementation")
    # A tokenizer whose class overrides one of these is called; of others the Rust tokenizer is used, see tokens.py.
    assert hasattr(PreTrainedTokenizerFast, "_encode_plus")
    assert hasattr(PreTrainedTokenizerFast, "_convert_encoding")


def test_private_names_stand_behind_their_doors_and_in_this_list():
    listed = TRAINER_HOOKS | CACHED_FILE | {name for names in ATTRIBUTES.values() for name in names}
    private = re.compile(
        r"\btorch\.(?:\w+\.)*(_[a-z]\w*)|from torch\.(_\w+)|super\(\)\.(_[a-z]\w*)|\b(_raise_exceptions\w+)"
        r"|def (_(?:save|load|get_train|run_epoch)\w*)\(self"
    )
    for path in (REPOSITORY / "embedding_finetune").rglob("*.py"):
        for match in private.finditer(path.read_text(encoding="utf-8")):
            name = next(filter(None, match.groups()))
            assert path.name in DOORS, f"{path.name} uses {name}"
            assert name in listed | {"_inductor"}, f"{path.name} uses {name}, which is not listed"
