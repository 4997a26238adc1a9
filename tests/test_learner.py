"""The model as it is prepared for training, by finetune.py's flags."""

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.running import embed_passages, encoder_for
from helpers.tiny import make_tiny_bert
from helpers.training import train, write_rows
from safetensors.torch import load_file

from embedding_finetune.command_line import UserError
from embedding_finetune.model import packing
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import PackedLayout, PaddedLayout
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.learner import load_learner, prepare_for_training, training_layout


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"bf16": True}, "packed"),
        ({"bf16": True, "dropout": 0.1}, "cheap_dropout"),
        ({}, "cheap_dropout"),
        ({"bf16": True, "model": "eager"}, "eager"),
    ],
)
def test_texts_are_trained_end_to_end_where_kernel_precision_dropout_and_model_allow_it(
    tmp_path, monkeypatch, flags, name
):
    monkeypatch.setattr(packing, "kernel_serves", lambda device, dtype: dtype == torch.bfloat16)
    folder = make_tiny_bert(tmp_path / "bert", dropout=0.0)
    backbone, tokenizer, config = load_backbone(str(folder), flag="--model")
    if flags.pop("model", None):
        backbone.set_attn_implementation("eager")
    args = RetrieverTrainingArguments(output_dir=str(tmp_path), **flags)
    prepare_for_training(backbone, config, args)
    layout = training_layout(backbone, tokenizer, args, limit=128, longest=32)
    assert isinstance(layout, PackedLayout if name == "packed" else PaddedLayout)
    assert backbone.config._attn_implementation == name
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("recompute", ["False", "True"])
def test_training_end_to_end_gives_the_weights_of_padded_training(tmp_path, monkeypatch, recompute):
    folder, rows = make_tiny_bert(tmp_path / "bert", dropout=0.0), write_rows(tmp_path)
    flags = ("--recompute_sub_batches", recompute, "--optim", "sgd")
    padded = train(folder, rows, tmp_path / "padded", *flags)
    monkeypatch.setattr(packing, "kernel_serves", lambda *_: True)
    packed = train(folder, rows, tmp_path / "packed", *flags, "--tokens_per_sub_batch", "100")
    weights = [load_file(output / "model.safetensors") for output in (padded, packed)]
    before = load_file(folder / "model.safetensors")
    for name in before:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-6), name
    assert any(not torch.equal(before[name], weights[1][name]) for name in before)


def test_encoding_end_to_end_gives_the_embeddings_of_padded_texts(tiny_bert, monkeypatch):
    texts = [passage_about(topic) * (1 + number % 3) for number, topic in enumerate(TOPICS)]
    padded = embed_passages(encoder_for(tiny_bert, "--dtype", "float32"), texts)
    monkeypatch.setattr(packing, "kernel_serves", lambda *_: True)
    encoder = encoder_for(tiny_bert, "--dtype", "float32", "--tokens_per_batch", "100")
    assert encoder.passages.model.backbone.config._attn_implementation == "packed"
    assert np.abs(embed_passages(encoder, texts) - padded).max() < 1e-5


def learner(model, tmp_path, *, freeze_passages, **flags):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"]}])
    return load_learner(
        ModelArguments(str(model)),
        DataArguments(train_data=[str(rows)], **flags),
        RetrieverTrainingArguments(output_dir=str(tmp_path), freeze_passages=freeze_passages),
    )


def test_the_longest_training_length_is_saved(tiny_bert, tmp_path):
    assert learner(tiny_bert, tmp_path, freeze_passages=False, passage_max_len=64).saved_config.max_seq_length == 128
    with pytest.raises(UserError, match="--passage_max_len 129: the model takes at most 128 tokens"):
        learner(tiny_bert, tmp_path, freeze_passages=False, passage_max_len=129)


def test_a_length_of_passages_says_nothing_about_a_model_of_queries_alone(tiny_bert, tmp_path):
    assert learner(tiny_bert, tmp_path, freeze_passages=True, passage_max_len=129).lengths["query_max_len"] == 32
