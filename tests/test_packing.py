"""Texts that lie end to end get what each gets alone; attention text by text stands for the GPU's kernel."""

import numpy as np
import pytest
import torch
from helpers.tiny import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig

from embedding_finetune.model import packing
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.limits import first_position
from embedding_finetune.model.modules import pool, pool_packed
from embedding_finetune.model.packing import (
    Packed,
    kernel_serves,
    pack_if_possible,
    places_of,
    takes_packed,
    text_by_text,
)
from embedding_finetune.model.pooling import POOLING_METHODS

LENGTHS = [40, 1, 13, 150, 2]


@pytest.fixture(autouse=True)
def nothing_was_tried(monkeypatch):
    monkeypatch.setattr(packing, "_tried", {})


def model_of(kind):
    """A tiny backbone of a kind, with attention by sdpa, that takes 160 tokens."""
    from transformers import AutoConfig

    options = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 170,
        "initializer_range": 0.2,
        "pad_token_id": 1,
    }
    options |= {
        "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4},
        "modernbert": {"local_attention": 24, "global_attn_every_n_layers": 2, "reference_compile": False},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    }.get(kind, {})
    torch.manual_seed(0)
    attention = "eager" if kind == "mpnet" else "sdpa"
    return AutoModel.from_config(AutoConfig.for_model(kind, **options), attn_implementation=attention).eval()


def flat_ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 99, (sum(LENGTHS),), generator=generator)


KINDS = ["bert", "xlm-roberta", "modernbert", "qwen3", "distilbert", "roberta", "llama"]


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_embeddings_and_gradients_are_the_padded_ones(kind, pooling):
    backbone = model_of(kind)
    model = BiEncoder(backbone, EmbeddingConfig(pooling=pooling, normalized=True))
    ids = flat_ids()
    position = first_position(backbone)
    assert takes_packed(backbone, first_position=position, limit=160)
    width = max(LENGTHS)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    padded = torch.ones(len(LENGTHS), width, dtype=torch.long).masked_scatter(mask.bool(), ids)
    prompts = torch.tensor([3, 0, 2, 5, 1])
    position_ids, boundaries = map(torch.from_numpy, places_of(LENGTHS, position))
    results = []
    for packed in (False, True):
        backbone.zero_grad()
        if packed:
            backbone.set_attn_implementation("packed")
            embeddings = model.embed_packed(Packed(position_ids, boundaries, width), prompts, input_ids=ids[None])
        else:
            embeddings = model(padded, mask, prompts)
        (embeddings * torch.linspace(-1, 1, 32)).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])
        results.append((embeddings.detach(), gradients))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-6
    assert (results[0][1] - results[1][1]).norm() < 1e-5 * results[0][1].norm()


@pytest.mark.parametrize("kind", ["mpnet", "own positions"])
def test_a_model_that_gives_packed_texts_other_states_keeps_the_padded_path(kind, monkeypatch):
    backbone = model_of("bert" if kind == "own positions" else kind)
    if kind == "own positions":  # positions it was not told of
        embeddings = backbone.embeddings
        forward = embeddings.forward
        monkeypatch.setattr(embeddings, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    assert not takes_packed(backbone, first_position=first_position(backbone), limit=160)
    assert backbone.config._attn_implementation == ("eager" if kind == "mpnet" else "sdpa")
    assert not backbone.training


def test_an_architecture_is_tried_once(monkeypatch):
    tried = []
    trial = packing._try_packed
    monkeypatch.setattr(packing, "_try_packed", lambda *given: tried.append(1) or trial(*given))
    assert [takes_packed(model_of("bert"), first_position=0, limit=160) for _ in range(3)] == [True] * 3
    assert not takes_packed(model_of("bert"), first_position=2, limit=160)
    assert len(tried) == 2


@pytest.mark.parametrize(("heads", "fits"), [(4, True), (8, False), (2, True)])
def test_heads_that_the_kernel_refuses_keep_the_padded_path(heads, fits):
    """32 dimensions: heads of 8, 4 and 16."""
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=48
    )
    backbone = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    assert takes_packed(backbone, first_position=0, limit=160) is fits


def test_a_tokenizer_without_special_tokens_could_give_texts_without_tokens(monkeypatch):
    monkeypatch.setattr(packing, "kernel_serves", lambda *_: True)
    tokenizer, backbone = make_tokenizer(), model_of("bert")
    given = torch.device("cuda"), torch.bfloat16
    assert pack_if_possible(backbone, tokenizer, *given, first_position=0, limit=160)
    assert backbone.config._attn_implementation == "packed"
    tokenizer.backend_tokenizer.post_processor = None
    assert not pack_if_possible(model_of("bert"), tokenizer, *given, first_position=0, limit=160)


def test_a_window_too_large_to_be_tried_is_refused_unless_no_text_is_longer():
    from transformers import AutoConfig

    options = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(
        "mistral", **options, intermediate_size=48, num_key_value_heads=2, sliding_window=2000
    )
    backbone = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    assert not takes_packed(backbone, first_position=0, limit=2001)
    assert takes_packed(backbone, first_position=0, limit=2000)


def test_a_wrong_first_position_is_found_out():
    assert not takes_packed(model_of("xlm-roberta"), first_position=0, limit=160)


def test_the_trial_leaves_modes_and_random_numbers_as_they_were():
    backbone = model_of("bert").train()
    backbone.encoder.eval()
    before = torch.get_rng_state()
    assert takes_packed(backbone, first_position=0, limit=160)
    assert torch.equal(before, torch.get_rng_state())
    assert (backbone.training, backbone.encoder.training, backbone.embeddings.training) == (True, False, True)


def test_places_of_three_texts():
    positions, boundaries = places_of([2, 1, 3], 5)
    assert positions.tolist() == [5, 6, 5, 5, 6, 7]
    assert boundaries.tolist() == [0, 2, 3, 6]
    assert boundaries.dtype == np.int32


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
@pytest.mark.parametrize("method", [*POOLING_METHODS, "weightedmean+max+cls"])
def test_pooling_of_packed_states_is_that_of_padded_ones(lengths, data, method):
    prompts = torch.tensor([data.draw(st.integers(0, length - 1)) for length in lengths])
    states = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    padded = torch.zeros(len(lengths), 9, 4).masked_scatter(mask[..., None].bool(), states)
    position_ids, boundaries = map(torch.from_numpy, places_of(lengths, 0))
    texts = Packed(position_ids, boundaries, max(lengths))
    for given_prompts in (None, prompts):
        expected = pool(padded, mask, method, given_prompts)
        assert torch.allclose(pool_packed(states, texts, method, given_prompts), expected, atol=1e-6)


def test_an_unknown_pooling_raises():
    with pytest.raises(ValueError, match="median"):
        pool_packed(torch.ones(2, 3), Packed(torch.arange(2), torch.tensor([0, 2]), 2), "median")


@pytest.mark.parametrize(
    ("window", "seen"), [((-1, -1), "1111"), ((-1, 0), "0111"), ((1, 1), "1110"), ((1, 0), "0110")]
)
def test_a_window_says_how_far_back_and_ahead_a_token_sees(window, seen):
    """The third token of a text of four that follows another text; the last one stands first."""
    query = torch.zeros(6, 1, 8)  # so all that are seen have the same weight
    value = torch.eye(6, 8)[:, None]
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    weights = text_by_text(query, query, value, boundaries, 4, None, window)[4, 0, 2:6]
    assert "".join("1" if weight > 0 else "0" for weight in weights.tolist()[::-1]) == seen
    assert weights.sum().item() == pytest.approx(1)


def test_the_kernel_is_for_half_precision_on_a_gpu():
    assert not kernel_serves(torch.device("cpu"), torch.bfloat16)
    assert not kernel_serves(torch.device("mps"), torch.bfloat16)
    assert not kernel_serves(torch.device("cuda"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpus_kernel_gives_the_states_of_attention_text_by_text(kind):
    backbone = model_of(kind)
    ids, position = flat_ids(), first_position(backbone)
    position_ids, boundaries = map(torch.from_numpy, places_of(LENGTHS, position))
    backbone.set_attn_implementation("packed")
    with torch.no_grad():
        exact = backbone(input_ids=ids[None], **Packed(position_ids, boundaries, max(LENGTHS)).keywords())[0]
        backbone.cuda().bfloat16()
        packed = Packed(position_ids.cuda(), boundaries.cuda(), max(LENGTHS))
        found = backbone(input_ids=ids[None].cuda(), **packed.keywords())[0].float().cpu()
    assert (found - exact).norm() < 0.03 * exact.norm()
