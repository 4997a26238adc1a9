"""What a loaded model takes."""

import pytest
import torch
from transformers import MPNetConfig, MPNetModel

from embedding_finetune.command_line import UserError
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.limits import (
    check_instructions,
    check_max_length,
    check_truncate_dim,
    freeze_position_embeddings,
    length_limit,
)
from embedding_finetune.model.loading import load_backbone


def test_positions_counted_from_the_padding_index_shorten_the_limit(tiny_bert):
    _, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    tokenizer.model_max_length = 10**30
    config = MPNetConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=34,
    )  # fmt: skip
    model = MPNetModel(config)
    limit = length_limit(model, tokenizer)
    assert limit == 32
    ids = torch.full((1, limit), 7)
    model(input_ids=ids)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, limit + 1), 7))


def test_position_embeddings_can_be_frozen(tiny_bert):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    freeze_position_embeddings(backbone)
    assert not backbone.embeddings.position_embeddings.weight.requires_grad
    assert backbone.embeddings.word_embeddings.weight.requires_grad


def test_a_length_of_the_limit_is_taken_and_one_more_is_not():
    check_max_length("--query_max_len", 128, 128)
    with pytest.raises(UserError, match=r"^--query_max_len 129: the model takes at most 128 tokens"):
        check_max_length("--query_max_len", 129, 128)


def test_an_instruction_leaves_room_for_one_token_of_the_text_or_is_refused(tiny_bert):
    _, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    config = EmbeddingConfig(pooling="cls", query_instruction="reset the pump")
    length = len(tokenizer("reset the pump")["input_ids"])
    check_instructions(tokenizer, config, query_max_len=length + 1, passage_max_len=3)
    with pytest.raises(UserError, match=f"--query_max_len {length} leaves no token for the query itself"):
        check_instructions(tokenizer, config, query_max_len=length, passage_max_len=3)
    with pytest.raises(UserError, match="--passage_max_len 2 has no room beside the 2 special tokens"):
        check_instructions(tokenizer, config, query_max_len=length + 1, passage_max_len=2)


def test_embeddings_are_cut_to_as_many_dimensions_as_there_are(tiny_bert):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    check_truncate_dim(backbone, EmbeddingConfig(pooling="cls", truncate_dim=32))
    with pytest.raises(UserError, match="--truncate_dim 33: the model's embeddings have 32 dimensions"):
        check_truncate_dim(backbone, EmbeddingConfig(pooling="cls", truncate_dim=33))
