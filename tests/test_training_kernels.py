import pytest
import torch
from helpers.kinds import make_config
from torch import nn
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from embedding_finetune.model import training_kernels as dropout_module
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.training_kernels import (
    CheapDropout,
    attention_with_cheap_dropout,
    scaled_keep_mask,
    set_dropout,
    use_cheap_dropout,
)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_mask_drops_with_the_probability_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    mask = scaled_keep_mask(torch.empty(1000, 999), probability)
    # Standard deviation of the share dropped: below 0.0005 for a million elements.
    assert (mask == 0).double().mean().item() == pytest.approx(probability, abs=0.002)
    assert mask.max().item() == pytest.approx(1 / (1 - probability), rel=1e-3)
    assert mask.double().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "distilbert", "roberta", "modernbert", "qwen2"])
def test_the_probability_of_dropout_is_set_everywhere_but_in_the_config(kind, tmp_path):
    config = make_config(kind)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), int | float):
            setattr(config, name, 0.25)
    backbone = AutoModel.from_config(config, attn_implementation="sdpa" if kind != "mpnet" else "eager").train()
    ids = torch.arange(40).reshape(2, 20)

    def differs():
        first, second = (backbone(input_ids=ids).last_hidden_state for _ in range(2))
        return not torch.equal(first, second)

    for probability, expected in ((0.0, False), (0.5, True), (0.0, False)):
        set_dropout(backbone, probability)
        use_cheap_dropout(backbone)
        assert differs() == expected
    assert backbone.config.to_dict() == config.to_dict()


def test_neighbours_rows_and_successive_masks_are_independent():
    torch.manual_seed(0)
    first, second = (scaled_keep_mask(torch.empty(512, 512), 0.5).bool().double() for _ in range(2))
    for a, b in (
        (first, second),
        (first[:, :-1], first[:, 1:]),
        (first[:-1], first[1:]),
        (first[:, :-4], first[:, 4:]),
    ):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.01


def test_probabilities_at_the_ends():
    assert (scaled_keep_mask(torch.empty(9), 0.0) == 1).all()
    assert (scaled_keep_mask(torch.empty(9), 1.0) == 0).all()


def test_masks_follow_torchs_seed_and_leave_the_input_elsewhere_alone():
    layer, x = CheapDropout(0.3), torch.randn(7, 5)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), x)


def test_the_gradient_passes_where_the_value_did():
    layer, x = CheapDropout(0.5), torch.randn(50, 50, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(x.grad, (y / x).detach(), rtol=1e-4)


def attention_inputs(seed=0):
    torch.manual_seed(seed)
    query, key, value = (torch.randn(3, 2, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    return query, key, value, mask


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_attention_equals_sdpa_when_the_mask_drops_nothing(monkeypatch, kind):
    query, key, value, mask = attention_inputs()
    masks = {"none": None, "bool": mask, "additive": torch.zeros(mask.shape).masked_fill(~mask, -1e9)}
    monkeypatch.setattr(dropout_module, "scaled_keep_mask", lambda like, _: torch.ones_like(like))
    ours, _ = attention_with_cheap_dropout(nn.Module(), query, key, value, masks[kind], dropout=0.1, is_causal=False)
    theirs, _ = sdpa_attention_forward(nn.Module(), query, key, value, masks[kind], dropout=0.0, is_causal=False)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_attention_drops_weights_as_the_definition_says(monkeypatch):
    query, key, value, mask = attention_inputs()
    torch.manual_seed(1)
    ours, _ = attention_with_cheap_dropout(nn.Module(), query, key, value, mask, dropout=0.4, scaling=0.3)
    weights = (query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf")).softmax(-1)
    torch.manual_seed(1)
    kept = scaled_keep_mask(weights.flatten(0, 1), 0.4).view_as(weights)
    assert torch.allclose(ours, (weights * kept @ value).transpose(1, 2), atol=1e-6)


def test_causal_attention_is_left_to_sdpa():
    query, key, value, _ = attention_inputs()
    module = nn.Module()
    module.is_causal = True
    torch.manual_seed(0)
    ours, _ = attention_with_cheap_dropout(module, query, key, value, None, dropout=0.2)
    torch.manual_seed(0)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None, dropout=0.2)
    assert torch.equal(ours, theirs)


def test_a_backbone_keeps_its_probabilities_and_its_embeddings_outside_training(tiny_bert):
    plain, _, _ = load_backbone(str(tiny_bert), flag="--model")
    cheap, _, _ = load_backbone(str(tiny_bert), flag="--model")
    use_cheap_dropout(cheap)
    layers = [module for module in cheap.modules() if isinstance(module, nn.Dropout)]
    assert {(type(layer), layer.p) for layer in layers} == {(CheapDropout, 0.1)}
    ids, mask = torch.randint(5, 50, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    plain.eval(), cheap.eval()
    assert torch.allclose(plain(ids, mask).last_hidden_state, cheap(ids, mask).last_hidden_state, atol=1e-6)
    cheap.train()
    first, second = (cheap(ids, mask).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_leaves_the_mean_output_of_a_training_backbone_where_torchs_dropout_has_it(tiny_bert):
    means = []
    for cheap in (False, True):
        backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
        if cheap:
            use_cheap_dropout(backbone)
        torch.manual_seed(0)
        ids = torch.arange(5, 21).repeat(4000, 1)
        with torch.no_grad():
            means.append(backbone.train()(ids).last_hidden_state[:, 0].mean(dim=0))
    # Standard error of each mean: about 0.3 / sqrt(4000) = 0.005.
    assert (means[0] - means[1]).abs().max() < 0.03
