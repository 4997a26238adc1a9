"""Attention as two products: what it is, and what is left to transformers' sdpa."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from embedding_finetune.model.attention import (
    attention_scores,
    is_plain_attention,
    replace_sdpa,
    weighted_values,
)
from embedding_finetune.model.encoding_attention import attention_in_batched_products
from embedding_finetune.model.training_kernels import attention_with_cheap_dropout

PADDED_RIGHT = torch.ones(3, 1, 6, 6, dtype=torch.bool)  # (n, 1, t, t)
PADDED_RIGHT[1, :, :, 4:] = False


def test_a_causal_model_without_a_mask_stays_causal():
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    module = nn.Module()
    module.is_causal = True
    ours, _ = attention_in_batched_products(module, query, key, value, None)
    changed = value.clone()
    changed[:, :, -1] += 1
    after, _ = attention_in_batched_products(module, query, key, changed, None)
    assert torch.equal(ours[:, :-1], after[:, :-1])
    assert not torch.equal(ours[:, -1], after[:, -1])


@pytest.mark.parametrize("attention", [attention_in_batched_products, attention_with_cheap_dropout])
def test_a_keyword_that_changes_attention_is_never_dropped(attention):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if attention is attention_in_batched_products else torch.float32
    query, key, value = (torch.randn(3, 2, 6, 8, dtype=dtype) for _ in range(3))
    bias, mask = torch.randn(1, 2, 6, 6, dtype=dtype) * 3, PADDED_RIGHT
    inputs = (nn.Module(), query, key, value, mask)
    ours, _ = attention(*inputs, position_bias=bias)
    scores = (query @ key.transpose(2, 3)).float() * 8**-0.5 + bias.float()
    expected = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value.float()).transpose(1, 2)
    assert torch.allclose(ours.float(), expected, atol=0.05)
    assert not torch.allclose(attention(*inputs)[0].float(), expected, atol=0.05)
    for name in ("softcap", "s_aux", "sinks"):  # sdpa refuses the first itself, and would drop the others
        with pytest.raises(ValueError, match=name):
            attention(*inputs, **{name: torch.ones(2)})
    assert torch.equal(attention(*inputs, sliding_window=3, use_cache=False)[0], attention(*inputs)[0])


@pytest.mark.parametrize("attention", [attention_in_batched_products, attention_with_cheap_dropout])
def test_values_of_another_size_than_keys_are_left_to_sdpa(attention):
    dtype = torch.bfloat16 if attention is attention_in_batched_products else torch.float32
    query, key = (torch.randn(3, 2, 6, 8, dtype=dtype) for _ in range(2))
    value, mask = torch.randn(3, 2, 6, 4, dtype=dtype), PADDED_RIGHT
    ours, _ = attention(nn.Module(), query, key, value, mask)
    assert torch.equal(ours, sdpa_attention_forward(nn.Module(), query, key, value, mask)[0])
    assert attention(nn.Module(), query, key, query, mask)[0].is_contiguous()


def test_the_two_products_are_those_of_the_definition():
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 6, 8) for _ in range(3))
    bias = torch.randn(3, 1, 6, 6)
    products = torch.einsum("nhqd,nhkd->nhqk", query, key)
    assert torch.allclose(attention_scores(query, key, None).view(3, 2, 6, 6), products / 8**0.5, atol=1e-5)
    assert torch.allclose(attention_scores(query, key, 0.3, bias).view(3, 2, 6, 6), products * 0.3 + bias, atol=1e-5)
    weights = torch.rand(3, 2, 6, 6)
    expected = torch.einsum("nhqk,nhkd->nqhd", weights, value)
    assert torch.allclose(weighted_values(weights.flatten(0, 1), value), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "keywords", "plain"),
    [
        (PADDED_RIGHT, {}, True),
        (PADDED_RIGHT, {"is_causal": True, "use_cache": False, "sliding_window": 4, "position_ids": 1}, True),
        (PADDED_RIGHT, {"softcap": None}, True),
        (PADDED_RIGHT, {"softcap": 30.0}, False),
        (PADDED_RIGHT, {"a_keyword_of_tomorrow": 1}, False),
        (None, {"is_causal": False}, True),
        (None, {"is_causal": True}, False),
        (None, {}, False),  # as sdpa has it: causal unless the layer says that it is not
    ],
)
def test_attention_is_plain_only_where_every_keyword_is_known_to_change_nothing(mask, keywords, plain):
    query = torch.randn(3, 2, 6, 8)
    assert is_plain_attention(nn.Module(), query, query, query, mask, keywords) is plain
    layer = nn.Module()
    layer.is_causal = False
    assert is_plain_attention(layer, query, query, query, None, {})


def test_only_sdpa_is_replaced():
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    for theirs, ours in (("sdpa", "cheap_dropout"), ("eager", "eager")):
        backbone = BertModel(BertConfig(vocab_size=9, attn_implementation=theirs, **config))
        replace_sdpa(backbone, "cheap_dropout")
        assert backbone.config._attn_implementation == ours
