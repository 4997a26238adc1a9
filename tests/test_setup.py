"""What finetune.py's flags make of data and model before training."""

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.running import embed_passages, encoder_for
from helpers.tiny import make_tiny_bert
from helpers.training import train, write_rows
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from embedding_finetune.command_line import UserError
from embedding_finetune.model import packing
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import PackedLayout, PaddedLayout
from embedding_finetune.training.arguments import DataArguments, RetrieverTrainingArguments
from embedding_finetune.training.batches import TrainDataset
from embedding_finetune.training.rows import load_rows
from embedding_finetune.training.setup import (
    has_one_file_per_batch,
    make_loss,
    prepare_for_training,
    training_layout,
)


def loss_with(tmp_path, **flags):
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    args = RetrieverTrainingArguments(output_dir=str(tmp_path), **flags)
    return make_loss(BiEncoder(BertModel(config), EmbeddingConfig()), args)


def test_the_loss_has_what_the_flags_say(tmp_path):
    loss = loss_with(tmp_path, temperature=0.5, use_inbatch_neg=False, matryoshka_dims=[4, 2])
    assert (loss.options.temperature, loss.options.use_inbatch_neg) == (0.5, False)
    assert loss.options.matryoshka == {8: 1.0, 4: 1.0, 2: 1.0}
    loss = loss_with(tmp_path, matryoshka_dims=[8, 4], matryoshka_weights=[0.5, 0.25])
    assert loss.options.matryoshka == {8: 0.5, 4: 0.25}
    assert loss_with(tmp_path).options.matryoshka == {8: 1.0}


def test_more_matryoshka_dimensions_than_the_model_has_are_refused(tmp_path):
    with pytest.raises(UserError, match="--matryoshka_dims 9: the model's embeddings have 8 dimensions"):
        loss_with(tmp_path, matryoshka_dims=[9])


def one_file(tmp_path, sizes, **flags):
    paths = [
        str(write_jsonl(tmp_path / f"{n}.jsonl", [{"query": "q", "pos": ["p"]}] * size)) for n, size in enumerate(sizes)
    ]
    dataset = TrainDataset(load_rows(paths), group_size=1, seed=0)
    args = RetrieverTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **flags)
    return has_one_file_per_batch(DataArguments(train_data=paths, one_file_per_batch=True), dataset, args)


def test_with_one_file_alone_one_file_per_batch_is_noted_to_change_nothing(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert one_file(tmp_path, [9, 2])
        assert "changes nothing" not in caplog.text
        assert not one_file(tmp_path, [9])
    assert "--one_file_per_batch changes nothing: all rows are in one file" in caplog.text


def test_a_file_that_drop_last_would_never_train_on_is_refused(tmp_path):
    assert one_file(tmp_path, [9, 4], dataloader_drop_last=True)
    with pytest.raises(UserError, match=r"would never train on \S+1\.jsonl: its 3 rows do not fill a batch of 4; "):
        one_file(tmp_path, [9, 3], dataloader_drop_last=True)


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
    assert encoder.model.backbone.config._attn_implementation == "packed"
    assert np.abs(embed_passages(encoder, texts) - padded).max() < 1e-5
