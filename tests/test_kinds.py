"""Every kind of model of transformers: embeddings as the model gives them text by text, or one line that says no."""

import numpy as np
import pytest
import torch
from helpers import kinds
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.running import encoding_arguments
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

import finetune
from embedding_finetune.model.limits import length_limit
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.retrieval.encoder import load_encoder

TEXTS = ["reset the pump", "a", passage_about("pump"), "who do i call?", passage_about("desk") + " red green blue"]
MENDED = ["deepseek_v3", "jetmoe", "layoutlm", "mamba", "squeezebert", "xlnet"]
FAST = ["bert", "gemma3_text", "modernbert", "qwen3", *MENDED]


def encoder_for(folder, *flags):
    return load_encoder(str(folder), encoding_arguments("--sentence_pooling_method", "mean", *flags), flag="--model")


def text_by_text(folder):
    """Mean states of each text alone, by transformers, scaled to length 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = AutoConfig.from_pretrained(folder).model_type
    model = kinds.class_of(kind).from_pretrained(folder).eval()
    embeddings = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=kinds.POSITIONS)["input_ids"]])
        with torch.no_grad():
            mean = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(dim=0)
        embeddings.append((mean / mean.norm()).numpy())
    return np.stack(embeddings)


def slow_unless_fast(names):
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("kind", slow_unless_fast(kinds.WORKING))
def test_embeddings_are_those_of_each_text_alone(kind, tmp_path):
    folder = kinds.make_kind(kind, tmp_path / kind)
    expected = text_by_text(folder)
    assert np.abs(encoder_for(folder, "--dtype", "float32").encode_queries(TEXTS) - expected).max() < 1e-5
    if kind not in kinds.FLOAT32_ONLY:
        rounded = encoder_for(folder, "--dtype", "bfloat16").encode_queries(TEXTS)
        assert (rounded * expected).sum(axis=1).min() > 0.95
    assert np.abs(expected[0] - expected[1:]).max() > 1e-3


def train(folder, tmp_path):
    """Two steps; the folder of the tuned model."""
    rows = [{"query": f"how do i reset the {topic}?", "pos": [passage_about(topic)]} for topic in TOPICS]
    data, tuned = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "tuned"
    argv = f"--model_name_or_path {folder} --train_data {data} --output_dir {tuned} --query_max_len 16"
    argv += (
        " --passage_max_len 48 --max_steps 2 --per_device_train_batch_size 5 --train_group_size 1 --save_strategy no"
    )
    finetune.main([*argv.split(), "--sentence_pooling_method", "mean", "--learning_rate", "1e-3"])
    return tuned


@pytest.mark.parametrize("kind", slow_unless_fast(kinds.WORKING))
def test_two_steps_of_training_move_the_weights_to_what_any_tool_loads(kind, tmp_path):
    folder = kinds.make_kind(kind, tmp_path / kind)
    tuned = train(folder, tmp_path)
    after = text_by_text(tuned)
    assert np.abs(after - text_by_text(folder)).max() > 1e-4
    assert np.abs(encoder_for(tuned, "--dtype", "float32").encode_queries(TEXTS) - after).max() < 1e-5


@pytest.mark.parametrize("kind", kinds.NOT_TRAINABLE)
def test_a_model_that_takes_no_token_embeddings_is_refused_before_training(kind, tmp_path, capsys):
    folder = kinds.make_kind(kind, tmp_path / kind)
    with pytest.raises(SystemExit) as exit:
        train(folder, tmp_path)
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"finetune.py: error: --model_name_or_path {folder}, in training: a ")


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("bert", 64), ("xlm-roberta", 64), ("ibert", 64), ("mpnet", 64), ("opt", 64), ("gpt2", 64), ("xlnet", 10**9)],
)
def test_the_limit_of_lengths_is_what_the_positions_take(kind, limit, tmp_path):
    backbone, tokenizer, _ = load_backbone(str(kinds.make_kind(kind, tmp_path / kind)), flag="--model")
    tokenizer.model_max_length = 10**30
    assert length_limit(backbone, tokenizer) == limit
    if limit == 64:
        backbone(input_ids=torch.full((1, limit), 7))
        with pytest.raises((IndexError, RuntimeError)):
            backbone(input_ids=torch.full((1, limit + 1), 7))


def test_weights_in_several_files_are_those_in_one(tmp_path):
    folder, parts = kinds.make_kind("bert", tmp_path / "whole"), tmp_path / "parts"
    AutoModel.from_pretrained(folder).save_pretrained(parts, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(parts)
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    whole, sharded = encoder_for(folder), encoder_for(parts)
    assert np.array_equal(whole.encode_queries(TEXTS), sharded.encode_queries(TEXTS))
    assert whole.weights_digest == sharded.weights_digest


@pytest.mark.parametrize("kind", kinds.ENCODERS_ALONE)
def test_a_checkpoint_with_a_decoder_embeds_as_its_encoder_alone_does(kind, tmp_path):
    whole, alone = kinds.make_kind(kind, tmp_path / "whole"), tmp_path / "alone"
    torch.manual_seed(1)
    AutoModel.from_config(kinds.make_config(kind)).save_pretrained(whole)
    AutoModelForTextEncoding.from_pretrained(whole).save_pretrained(alone)
    AutoTokenizer.from_pretrained(whole).save_pretrained(alone)
    first, second = (encoder_for(folder).encode_queries(TEXTS) for folder in (whole, alone))
    assert np.array_equal(first, second)
