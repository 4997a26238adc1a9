import dataclasses

import pytest
import torch
from helpers.kinds import make_kind
from helpers.tiny import make_tokenizer
from torch import nn
from transformers.activations import GELUActivation

from embedding_finetune.command_line import UserError
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.calibration import Gelu, calibrate, check_likeness, is_gelu
from embedding_finetune.model.checkpoint import EmbeddingConfig


class Net(nn.Module):
    """A backbone of linear layers: `forward_of` says how they are put together."""

    def __init__(self, forward_of, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"hidden_size": 16})()
        self.embed = nn.Embedding(200, 16)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward_of = forward_of

    def forward(self, input_ids, attention_mask):
        states = self._forward_of(self, self.embed(input_ids))
        return type("Output", (), {"last_hidden_state": states})()


def linear(inputs=16, outputs=16):
    return nn.Linear(inputs, outputs)


def observed(net):
    model = BiEncoder(net, EmbeddingConfig(pooling="mean")).eval()
    return calibrate(model, make_tokenizer(), limit=64, what="--model net")


def test_layers_that_get_one_tensor_are_a_group_and_one_that_gets_an_equal_copy_is_not():
    net = Net(
        lambda net, x: net.q(x) + net.k(x) + net.v(x) + net.other(x.clone()),
        **{name: linear() for name in ("q", "k", "v", "other")},
    )
    found = observed(net)
    assert found.groups == [("q", "k", "v")]
    assert set(found.ranges) == {"q", "k", "v", "other"}


def test_layers_that_get_one_tensor_in_some_texts_only_are_no_group():
    net = Net(lambda net, x: net.q(x) + net.k(x if x.shape[1] > 8 else x.clone()), q=linear(), k=linear())
    assert observed(net).groups == []


def test_a_gelu_between_two_layers_is_found_through_a_dropout_that_does_nothing():
    net = Net(
        lambda net, x: net.down(net.drop(net.act(net.up(x)))),
        up=linear(16, 32),
        act=GELUActivation(),
        drop=nn.Dropout(0.5),
        down=linear(32, 16),
    )
    assert observed(net).gelus == [Gelu("up", "act", "down")]


@pytest.mark.parametrize(
    ("forward_of", "also"),
    [
        (lambda net, x: net.down(net.act(net.up(x)) * 1.0), None),  # another tensor
        (lambda net, x: net.down(net.act(net.up(x))) + net.down(net.up(x)), None),  # `down` gets other tensors too
        (lambda net, x: net.both(net.act(net.up(x))), None),  # two layers get it
        (lambda net, x: net.down(net.act(net.up(x))) + net.down(net.act(net.also(x))), (16, 32)),  # of two layers
    ],
)
def test_a_gelu_whose_output_or_layers_are_used_elsewhere_stays(forward_of, also):
    net = Net(forward_of, up=linear(16, 32), act=nn.GELU(), down=linear(32, 16), also=linear(*also or (32, 16)))
    net.both = lambda made: net.down(made) + net.also(made)
    assert observed(net).gelus == []


def test_ranges_hold_the_lowest_and_highest_value_of_each_input():
    seen = []

    def forward_of(net, x):
        seen.append(x.flatten(end_dim=-2))
        return net.q(x)

    ranges = observed(Net(forward_of, q=linear())).ranges["q"]
    values = torch.cat(seen)
    assert torch.equal(ranges.low, values.amin(dim=0))
    assert torch.equal(ranges.high, values.amax(dim=0))


def test_a_layer_that_gets_no_rows_is_left_as_it_is():
    net = Net(lambda net, x: net.q(x) + net.expert(x[:, :0]).sum(), q=linear(), expert=linear())
    assert set(observed(net).ranges) == {"q"}


def test_inputs_that_are_not_finite_are_one_line():
    net = Net(lambda net, x: net.q(x / 0), q=linear())
    with pytest.raises(
        UserError, match=r"--model net: a Net has inputs of linear layers that are NaN or infinite; give"
    ):
        observed(net)


def test_a_model_that_fails_on_a_long_text_is_one_line():
    net = Net(lambda net, x: net.q(x) if x.shape[1] < 20 else x @ x, q=linear())
    with pytest.raises(UserError, match=r"--model net: a Net cannot be calibrated for int8 \(.*\); give --dtype auto"):
        observed(net)


def test_only_gelu_by_the_error_function_is_what_the_product_can_apply():
    assert is_gelu(nn.GELU())
    assert is_gelu(GELUActivation())
    assert not is_gelu(nn.GELU(approximate="tanh"))
    assert not is_gelu(nn.ReLU())


def test_a_model_without_linear_layers_is_one_line():
    with pytest.raises(
        UserError, match=r"--model net: a Net has no linear layers that int8 would speed up; give --dty"
    ):
        observed(Net(lambda net, x: x))


def test_a_model_that_int8_would_change_much_is_one_line_with_the_cosine():
    net = Net(lambda net, x: net.q(x), q=linear())
    model = BiEncoder(net, EmbeddingConfig(pooling="mean")).eval()
    calibration = calibrate(model, make_tokenizer(), limit=64, what="")
    assert check_likeness(model, make_tokenizer(), calibration, limit=64, what="") == pytest.approx(1, abs=1e-6)
    long = dataclasses.replace(calibration, embeddings=calibration.embeddings * 1e25)  # whose squares float32 lacks
    assert check_likeness(model, make_tokenizer(), long, limit=64, what="") == pytest.approx(1, abs=1e-6)
    net.q.weight.data.neg_()
    net.q.bias.data.neg_()
    with pytest.raises(UserError, match=r"--model net: in int8 .* cosine of -1\.000 to its embedding in float32; give"):
        check_likeness(model, make_tokenizer(), calibration, limit=64, what="--model net")
    net.q = nn.Linear(3, 16)
    with pytest.raises(
        UserError, match=r"--model net: a Net does not work in int8 \(.*\); give --dtype auto or float32"
    ):
        check_likeness(model, make_tokenizer(), calibration, limit=64, what="--model net")


def test_bert_has_one_group_and_one_gelu_in_each_layer_and_t5_no_gelu(tmp_path):
    from transformers import AutoModel, AutoModelForTextEncoding

    def found(backbone):
        return calibrate(BiEncoder(backbone, EmbeddingConfig()).eval(), make_tokenizer(), limit=64, what="")

    bert = found(AutoModel.from_pretrained(make_kind("bert", tmp_path / "bert")))
    assert [len(group) for group in bert.groups] == [3, 3]
    assert bert.gelus[1] == Gelu(
        "encoder.layer.1.intermediate.dense",
        "encoder.layer.1.intermediate.intermediate_act_fn",
        "encoder.layer.1.output.dense",
    )
    t5 = found(AutoModelForTextEncoding.from_pretrained(make_kind("t5", tmp_path / "t5")))
    assert [len(group) for group in t5.groups] == [3, 3]
    assert t5.gelus == []
