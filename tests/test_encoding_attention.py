import numpy as np
import pytest
import torch
from helpers.kinds import make_kind
from helpers.running import embed_passages, encoder_for
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from embedding_finetune.model import encoding_attention
from embedding_finetune.model.encoding_attention import attention_in_batched_products


def masks(kind, length):
    """Bidirectional with padding on either side, or causal: (3, 1, length, length)."""
    mask = torch.ones(3, 1, length, length, dtype=torch.bool)
    if kind == "right":
        mask[1, :, :, 4:] = False
    elif kind == "left":
        mask[2, :, :, :3] = False
    elif kind == "causal":
        mask = mask.tril()
    elif kind == "causal, left":  # a token of padding that sees nothing
        mask[2, :, :, :3] = False
        mask = mask.tril()
    return None if kind == "none" else mask


@pytest.mark.parametrize("kind", ["none", "full", "right", "left", "causal", "causal, left"])
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("size", [1, 30])  # exponentials that fit, and such that need a softmax
def test_attention_in_batched_products_is_sdpa(kind, scaling, size):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 12, 8, dtype=torch.bfloat16) for _ in range(3))
    query *= size
    mask = masks(kind, 12)
    ours, _ = attention_in_batched_products(nn.Module(), query, key, value, mask, scaling=scaling, is_causal=False)
    exact = (tensor.float() for tensor in (query, key, value))
    theirs, _ = sdpa_attention_forward(nn.Module(), *exact, mask, scaling=scaling, is_causal=False)
    seeing = slice(None) if mask is None else mask.any(dim=-1)[:, 0]  # what a token of padding gets does not matter
    difference = (ours.float() - theirs)[seeing]
    # Scores of 100 have steps of 0.5 in bfloat16.
    assert difference.abs().max() < 0.03 if size == 1 else difference.norm() < 0.1 * theirs[seeing].norm()
    assert ours.isfinite().all()


@pytest.mark.parametrize("shift", [200, -200])
def test_scores_beyond_the_exponentials_of_bfloat16_get_the_same_attention(shift):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    query[1, 1, :, 0] = shift  # adds the same to all scores of a head: the softmax stays as it is
    key[1, 1, :, 0] = 8**0.5
    ours, _ = attention_in_batched_products(nn.Module(), query, key, value, None, is_causal=False)
    exact = (tensor.float() for tensor in (query, key, value))
    theirs, _ = sdpa_attention_forward(nn.Module(), *exact, None, is_causal=False)
    # Scores of 200 have steps of 1 in bfloat16, so weights are off by up to e^0.5.
    assert torch.allclose(ours.float(), theirs, atol=1.5)
    assert ours.isfinite().all()
    assert torch.allclose(ours.float()[0], theirs[0], atol=0.03)


@pytest.mark.parametrize("kind", ["none", "right", "causal"])
@pytest.mark.parametrize("most", [2 * 12 * 12, 5 * 12 * 12])  # one text at a time, and two
def test_the_number_of_texts_decides_no_bit(monkeypatch, kind, most):
    torch.manual_seed(0)
    given = [torch.randn(3, 2, 12, 8, dtype=torch.bfloat16) for _ in range(3)]
    for mask in (masks(kind, 12), None if kind == "none" else masks(kind, 12)[:1]):
        together, _ = attention_in_batched_products(nn.Module(), *given, mask, is_causal=False)
        with monkeypatch.context() as context:
            context.setattr(encoding_attention, "_MOST_SCORES", most)
            context.setattr(encoding_attention, "attention_by_sdpa", None)
            parts, _ = attention_in_batched_products(nn.Module(), *given, mask, is_causal=False)
        assert torch.equal(parts, together)


def test_a_head_that_needs_a_softmax_changes_no_bit_of_the_others():
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 12, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = masks("right", 12)

    def attention(part=slice(None)):
        given = (tensor[part] for tensor in (query, key, value, mask))
        return attention_in_batched_products(nn.Module(), *given, is_causal=False)[0]

    before = attention()
    query[1, 0] *= 1000
    after = attention()
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert torch.equal(before[1, :, 1], after[1, :, 1])
    assert not torch.equal(before[1, :, 0], after[1, :, 0])
    assert torch.equal(attention(slice(1, 2))[0], after[1])  # alone as beside others


def test_no_softmax_is_computed_where_the_exponentials_fit(monkeypatch):
    monkeypatch.setattr(encoding_attention, "_use_softmax_where_needed", None)
    query, key, value = (torch.randn(3, 2, 12, 8, dtype=torch.bfloat16) for _ in range(3))
    attention_in_batched_products(nn.Module(), query, key, value, masks("right", 12), is_causal=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_a_decoder_gives_a_text_that_needs_no_padding_the_bits_that_it_has_beside_others(kind, dtype, tmp_path):
    encoder = encoder_for(make_kind(kind, tmp_path / kind), "--dtype", dtype, "--passage_max_len", "16")
    texts = ["reset the pump and " * 9, "call the alarm desk before the next month or", "open the gate " * 9]
    lengths = {len(text.ids) for text in encoder.passages.passage.tokenize(encoder.passages.tokenizer, texts)[0]}
    assert max(lengths) == 16 > min(lengths) > 8  # of one padded length, and one of them padded
    together = embed_passages(encoder, texts)
    for text, embedding in zip(texts, together):
        assert np.array_equal(embed_passages(encoder, [text])[0], embedding)
