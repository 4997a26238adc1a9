"""Every kind of model of transformers: embeddings as the model gives them text by text, or one line that says no."""

import numpy as np
import pytest
import torch
from helpers import kinds
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.running import encoding_arguments
from helpers.tiny import make_tokenizer
from transformers import AutoModel, AutoTokenizer

import finetune
from embedding_finetune.command_line import UserError
from embedding_finetune.model import checks as model_checks
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.loading import length_limit, load_backbone
from embedding_finetune.retrieval.encoder import load_encoder

TEXTS = ["reset the pump", "a", passage_about("pump"), "who do i call?", passage_about("desk") + " red green blue"]
MENDED = ["deepseek_v3", "jetmoe", "layoutlm", "mamba", "squeezebert", "xlnet"]
FAST = ["bert", "gemma3_text", "modernbert", "qwen3", *MENDED]


def encoder_for(folder, *flags):
    return load_encoder(str(folder), encoding_arguments("--sentence_pooling_method", "mean", *flags), flag="--model")


def text_by_text(folder):
    """Mean states of each text alone, by transformers, scaled to length 1."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
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


@pytest.mark.parametrize("kind", kinds.SEEING_PADDING)
def test_a_model_that_sees_its_padding_is_refused(kind, tmp_path):
    folder = kinds.make_kind(kind, tmp_path / kind)
    with pytest.raises(UserError, match=r"^--model .*Model sees the padding on the right .* such models are not supp"):
        encoder_for(folder)


def test_a_model_whose_positions_shift_with_the_padding_is_refused_with_the_side_that_helps(tmp_path):
    folder = kinds.make_kind("gpt2", tmp_path / "gpt2", padding_side="left")
    with pytest.raises(UserError, match=r'sees the padding on the left .* write "padding_side": "right" into'):
        encoder_for(folder)
    encoder_for(kinds.make_kind("opt", tmp_path / "opt", padding_side="left"))


@pytest.mark.parametrize("kind", kinds.NOT_EMBEDDING)
def test_a_model_that_gives_no_state_for_each_token_is_refused(kind, tmp_path):
    folder = kinds.make_kind(kind, tmp_path / kind)
    with pytest.raises(UserError, match=r"^--model .*Model") as refusal:
        encoder_for(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", kinds.NOT_TRAINABLE)
def test_a_model_that_takes_no_token_embeddings_is_refused_before_training(kind, tmp_path, capsys):
    folder = kinds.make_kind(kind, tmp_path / kind)
    with pytest.raises(SystemExit) as exit:
        train(folder, tmp_path)
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"finetune.py: error: --model_name_or_path {folder}, in training: a ")


@pytest.mark.parametrize("kind", kinds.FLOAT32_ONLY)
def test_a_model_that_fails_in_bfloat16_names_the_flag_that_helps(kind, tmp_path):
    folder = kinds.make_kind(kind, tmp_path / kind)
    with pytest.raises(UserError, match=r"give --dtype float32 instead of torch\.bfloat16"):
        encoder_for(folder, "--dtype", "bfloat16")


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


def test_trying_a_model_takes_no_random_numbers_and_leaves_its_modes(tiny_bert):
    backbone, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    model = BiEncoder(backbone.train(), EmbeddingConfig(pooling="mean"))
    backbone.encoder.eval()
    before, state = {name: module.training for name, module in model.named_modules()}, torch.get_rng_state()
    model_checks.check_training(model, tokenizer, limit=128, what="--model")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_not_numbers_are_refused_as_such(tmp_path):
    folder = kinds.make_kind("bert", tmp_path / "bert")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="a BertModel gives a text the embedding NaN"):
        encoder_for(folder)


def without(folder, *names):
    for name in names:
        (folder / name).unlink()
    return folder


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    files = "tokenizer.json", "tokenizer_config.json"
    for kind in ("bert", "xlm-roberta", "gpt2", "mbart", "mpnet"):
        folder = without(kinds.make_kind(kind, tmp_path / kind), *files)
        with pytest.raises(UserError, match=r"^--model .*the tokenizer knows no words, only \d+ special tokens"):
            load_backbone(str(folder), flag="--model")
    empty = without(kinds.make_kind("bert", tmp_path / "empty"), *files)
    (empty / "vocab.txt").write_text("")
    with pytest.raises(UserError, match=r"^--model .*empty"):
        load_backbone(str(empty), flag="--model")
    folder = without(kinds.make_kind("llama", tmp_path / "llama"), *files)
    with pytest.raises(UserError, match=r"^--model .*cannot be loaded"):
        load_backbone(str(folder), flag="--model")


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused_with_both_numbers(tmp_path):
    folder, other = kinds.make_kind("bert", tmp_path / "bert"), tmp_path / "other"
    tokenizer = make_tokenizer()
    words = len(tokenizer)
    tokenizer.add_tokens([f"word{number}" for number in range(160 - words)])
    tokenizer.save_pretrained(other)
    load_backbone(str(folder), flag="--model", tokenizer_name=str(other))
    tokenizer.add_tokens(["rare"])
    tokenizer.save_pretrained(other)
    complaint = (
        f"^--tokenizer_name {other}: the tokenizer numbers its tokens up to 160, but the model has 160 token emb"
    )
    with pytest.raises(UserError, match=complaint):
        load_backbone(str(folder), flag="--model", tokenizer_name=str(other))
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"^--model .*up to 160"):
        load_backbone(str(folder), flag="--model")


def test_weights_in_several_files_are_those_in_one(tmp_path):
    folder, parts = kinds.make_kind("bert", tmp_path / "whole"), tmp_path / "parts"
    AutoModel.from_pretrained(folder).save_pretrained(parts, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(parts)
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    whole, sharded = encoder_for(folder), encoder_for(parts)
    assert np.array_equal(whole.encode_queries(TEXTS), sharded.encode_queries(TEXTS))
    assert whole.weights_digest == sharded.weights_digest
