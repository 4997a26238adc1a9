"""Weights as a run compares and restores them."""

import torch
from safetensors.torch import save_file

from embedding_finetune.training.weights import saved_weights, trained_weight_hashes, weights_hash


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def test_the_hash_tells_the_last_bit_of_any_weight_or_buffer():
    before = weights_hash(make_model())
    assert before == weights_hash(make_model())
    for name, tensor in make_model().state_dict().items():
        if tensor.is_floating_point():
            model = make_model()
            value = model.state_dict()[name].view(-1)
            value[0] = torch.nextafter(value[0], torch.tensor(torch.inf))
            assert weights_hash(model) != before, name


def test_the_hash_tells_weights_that_changed_their_names():
    model = make_model()
    assert weights_hash(model) != weights_hash(torch.nn.Sequential(model[0], torch.nn.Identity(), model[1]))


def test_only_what_is_trained_is_compared_to_see_whether_anything_was_learned():
    model = make_model()
    model[0].weight.requires_grad_(False)
    before = trained_weight_hashes(model)
    assert before.keys() == {"0.bias", "1.weight", "1.bias"}
    with torch.no_grad():
        model[0].weight += 1
    assert trained_weight_hashes(model) == before
    with torch.no_grad():
        model[1].bias += 1
    after = trained_weight_hashes(model)
    assert {name for name in after if after[name] != before[name]} == {"1.bias"}


def test_weights_in_several_files_are_read_as_one(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    weights = saved_weights(str(tmp_path))
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {"a": [1, 1], "b": [0, 0]}
