"""Pooling worked by hand. That it is sentence-transformers', with all modules, is in test_checkpoint.py."""

import math

import pytest
import torch

from embedding_finetune.model.module_configs import DenseConfig, DropoutConfig, LayerNormConfig
from embedding_finetune.model.modules import make_modules, pool

STATES = torch.tensor([[[9.0], [1.0], [2.0], [6.0]], [[1.0], [4.0], [9.0], [9.0]]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])  # padding on either side


@pytest.mark.parametrize(
    ("method", "pooled", "without_the_first"),
    [
        ("cls", [1, 1], [2, 4]),
        ("lasttoken", [6, 4], [6, 4]),
        ("max", [6, 4], [6, 4]),
        ("mean", [3, 2.5], [4, 4]),
        ("mean_sqrt_len_tokens", [9 / math.sqrt(3), 5 / math.sqrt(2)], [8 / math.sqrt(2), 4]),
        ("weightedmean", [(1 + 4 + 18) / 6, (1 + 8) / 3], [(4 + 18) / 5, 8 / 2]),
    ],
)
def test_each_method_worked_by_hand(method, pooled, without_the_first):
    assert pool(STATES, MASK, method)[:, 0].tolist() == pytest.approx(pooled)
    assert pool(STATES, MASK, method, torch.tensor([1, 1]))[:, 0].tolist() == pytest.approx(without_the_first)
    both = pool(STATES, MASK, f"{method}+mean")
    assert torch.equal(both, torch.cat([pool(STATES, MASK, method), pool(STATES, MASK, "mean")], dim=1))


def test_modules_are_made_in_order_and_dropout_acts_in_training_alone():
    modules = make_modules([DenseConfig(3, 4, True, "tanh", ""), DropoutConfig(0.5, ""), LayerNormConfig(4, "")])
    embeddings = torch.randn(5, 3)
    expected = torch.nn.functional.layer_norm(torch.tanh(modules[0].linear(embeddings)), (4,))
    assert torch.allclose(modules.eval()(embeddings), expected, atol=1e-6)
    assert not torch.allclose(modules.train()(embeddings), expected, atol=1e-3)
    with pytest.raises(TypeError, match="no module for a str"):
        make_modules(["x"])
