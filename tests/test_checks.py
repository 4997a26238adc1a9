"""What a model and its tokenizer are tried on: what fails here is told in one line, before anything is computed."""

import pytest
import torch
from helpers import kinds, running
from helpers.tiny import make_tokenizer
from transformers import AutoModel

from embedding_finetune.command_line import UserError
from embedding_finetune.model import checks as model_checks
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.loading import load_backbone


def encoder_for(folder, *flags):
    return running.encoder_for(folder, "--sentence_pooling_method", "mean", *flags)


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


@pytest.mark.parametrize("kind", kinds.FLOAT32_ONLY)
def test_a_model_that_fails_in_bfloat16_names_the_flag_that_helps(kind, tmp_path):
    folder = kinds.make_kind(kind, tmp_path / kind)
    with pytest.raises(UserError, match=r"give --dtype float32 instead of torch\.bfloat16"):
        encoder_for(folder, "--dtype", "bfloat16")


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
