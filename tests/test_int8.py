import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.data import passage_about
from helpers.kinds import make_kind
from helpers.running import embed_passages, encoder_for
from torch import nn

from embedding_finetune.command_line import UserError
from embedding_finetune.model.calibration import Calibration, Gelu, Range
from embedding_finetune.model.encoding_kernels import choose_dtype
from embedding_finetune.model.int8 import (
    Codes,
    Int8Linear,
    Int8Product,
    SharedInput,
    has_int8_products,
    quantize_linear_layers,
)

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
needs_vnni = pytest.mark.skipif(not has_int8_products(), reason="this CPU has no VNNI")


def range_of(low, high, inputs=8):
    return Range(torch.full((inputs,), float(low)), torch.full((inputs,), float(high)))


@BOTH
def test_codes_are_the_nearest_steps_and_what_lies_beyond_the_range_has_the_last_one(dtype):
    codes = Codes(range_of(-1, 3), None)
    assert codes.scale == pytest.approx(4 / 255, rel=0.004)  # its reciprocal is exact in bfloat16
    assert codes.zero_point == 64
    values = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 1.0, 2.5, 3.0, 9.0]], dtype=dtype)
    coded = codes(values)
    assert coded.dtype == torch.uint8
    assert coded.tolist() == [[0, 32, 64, 80, 128, 223, 255, 255]]
    decoded = (coded.float() - codes.zero_point) * codes.scale
    assert (decoded - values.float())[0, :7].abs().max() <= codes.scale


def test_a_range_without_negative_or_without_any_values_has_codes_too():
    assert Codes(range_of(0.5, 2), None).zero_point == 0
    never = Codes(range_of(0, 0), torch.zeros(8))
    assert never(torch.zeros(1, 8)).tolist() == [[0] * 8]


def test_an_input_ten_times_as_large_takes_no_resolution_from_the_others():
    torch.manual_seed(0)
    x, weight = torch.randn(200, 8), torch.randn(16, 8)
    x[:, 3] *= 30
    values = Range(x.amin(dim=0), x.amax(dim=0))

    def error(codes):
        decoded = (codes(x).float() - codes.zero_point) / codes.multipliers
        return (F.linear(decoded, weight) - F.linear(x, weight)).norm()

    assert error(Codes(values, weight.abs().amax(dim=0))) < 0.4 * error(Codes(values, None))


@needs_vnni
@BOTH
def test_a_product_is_the_sum_over_integers(dtype):
    rng = np.random.default_rng(0)
    whole = rng.integers(-127, 128, (16, 8))
    whole[:, 0] = 127  # so that a weight's step is exactly 1/64
    bias = torch.from_numpy(rng.standard_normal(16, dtype=np.float32))
    codes = Codes(range_of(-1, 3), None)
    coded = torch.from_numpy(rng.integers(0, 256, (5, 8), dtype=np.uint8))
    product = Int8Product(torch.from_numpy(whole).float() / 64, bias, codes, dtype)(coded)
    sums = (coded.numpy().astype(np.int64) - codes.zero_point) @ whole.T
    expected = torch.from_numpy(sums * codes.scale / 64).float() + bias
    assert product.dtype == dtype
    assert torch.allclose(product.float(), expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-4)


@needs_vnni
@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_8_bits_is_within_a_hundredth_of_the_layer(dtype, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96, bias=bias), torch.randn(3, 7, 64)
    codes = Codes(
        Range(x.flatten(end_dim=1).amin(dim=0), x.flatten(end_dim=1).amax(dim=0)), linear.weight.abs().amax(0)
    )
    with torch.no_grad():
        exact, ours = linear(x), Int8Linear(linear, codes, dtype)(x.to(dtype)).float()
    assert ours.shape == (3, 7, 96)
    assert (ours - exact).norm() < 0.013 * exact.norm()


@needs_vnni
def test_layers_with_one_input_are_one_product_that_is_computed_again_when_the_input_has_changed(monkeypatch):
    torch.manual_seed(0)
    linears = [nn.Linear(8, 4), nn.Linear(8, 6, bias=False), nn.Linear(8, 2)]
    codes = Codes(range_of(-4, 4), torch.ones(8))
    shared = SharedInput(linears, codes, torch.float32)
    alone = [Int8Linear(linear, codes, torch.float32) for linear in linears]
    products = []
    shared.product = lambda coded, product=shared.product: products.append(1) or product(coded)
    x = torch.randn(2, 3, 8)

    def outputs(numbers):
        return all(torch.equal(shared.output(number, x), alone[number](x)) for number in numbers)

    with torch.no_grad():
        assert outputs([0, 1, 2])
        assert len(products) == 1
        assert outputs([2, 0])  # in another order, and not all of them
        x += 1  # in place: the same tensor with other values
        assert outputs([1, 0, 2, 1])
        x = x.clone()
        assert outputs([0, 1, 2])
        assert shared._input is None  # no tensor is held longer than needed
    assert len(products) == 5


@needs_vnni
@BOTH
def test_a_few_large_inputs_behind_a_gelu_take_no_resolution_from_the_others(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    net[0].weight.data[5] *= 60
    x = torch.randn(400, 32)
    net_weight = net[2].weight.detach()[:, 5]
    with torch.no_grad():
        exact, hidden = net(x), net[:2](x)
        ranges = {name: Range(value.amin(dim=0), value.amax(dim=0)) for name, value in (("0", x), ("2", hidden))}
        assert ranges["2"].high.sort().values[-1] > 20 * ranges["2"].high.sort().values[-9]
        quantize_linear_layers(net, Calibration(ranges, [], [Gelu("0", "1", "2")], torch.empty(0, 0)), dtype)
        ours = net(x.to(dtype)).float()
    # The large input's part is known, and in the rest an error shows.
    large = hidden[:, 5:6] * net_weight
    assert (ours - exact).norm() < 0.02 * (exact - large).norm() + 0.004 * large.norm()


@needs_vnni
@pytest.mark.parametrize(
    "kind", "albert bert deberta-v2 distilbert gpt_neox modernbert mpnet qwen3 t5 xlm-roberta".split()
)
@pytest.mark.parametrize("native", [True, False])  # whether the CPU has bfloat16
def test_models_keep_their_embeddings(tmp_path, monkeypatch, kind, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    folder = make_kind(kind, tmp_path / kind)
    texts = [passage_about("pump"), "the red light", "a"]
    exact = embed_passages(encoder_for(folder, "--dtype", "float32"), texts)
    encoder = encoder_for(folder, "--dtype", "int8")
    assert encoder.passages.model.backbone.dtype == (torch.bfloat16 if native else torch.float32)
    assert (exact * embed_passages(encoder, texts)).sum(axis=1).min() > 0.997


@needs_vnni
def test_a_model_that_looks_at_the_weights_behind_a_gelu_works_too(tmp_path):
    folder = make_kind("t5", tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "feed_forward_proj": "gelu", "dense_act_fn": "gelu"}))
    exact, ours = (embed_passages(encoder_for(folder, "--dtype", name), ["a red pump"]) for name in ("float32", "int8"))
    assert (exact * ours).sum() > 0.997


@needs_vnni
@pytest.mark.parametrize("native", [True, False])
def test_an_embedding_in_8_bits_does_not_depend_on_its_neighbours_or_on_the_batch(tiny_bert, monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    texts = [passage_about(word) * length for word in ("pump", "desk", "alarm") for length in (1, 2, 3)]
    together = embed_passages(encoder_for(tiny_bert, "--dtype", "int8"), texts)
    small = encoder_for(tiny_bert, "--dtype", "int8", "--tokens_per_batch", "64")
    assert np.array_equal(embed_passages(small, texts[::-1])[::-1], together)
    assert all(np.array_equal(embed_passages(small, [text])[0], row) for text, row in zip(texts, together))


@needs_vnni
def test_a_store_keeps_8_bit_embeddings_apart_and_finds_them_again(tiny_bert, tmp_path, caplog):
    def stored(dtype):
        caplog.clear()
        with caplog.at_level("INFO"):
            embed_passages(encoder_for(tiny_bert, "--dtype", dtype, "--embeddings_dir", str(tmp_path)), ["a pump"])
        return "1 of 1 passage texts were in --embeddings_dir" in caplog.text

    assert [stored(dtype) for dtype in ("bfloat16", "int8", "int8")] == [False, False, True]
    tower = encoder_for(tiny_bert, "--dtype", "int8").passages
    settings = [json.loads(path.read_text()) for path in tmp_path.glob("*/settings.json")]
    assert {one["dtype"] for one in settings} == {"bfloat16", tower.settings(tower.passage)["dtype"]}


@needs_vnni
def test_a_run_says_how_near_8_bits_are_to_float32(tiny_bert, caplog):
    with caplog.at_level("INFO"):
        encoder_for(tiny_bert, "--dtype", "int8")
    assert "encoding in int8 on cpu" in caplog.text
    assert "int8: the smallest cosine to float32 is " in caplog.text


@needs_vnni
def test_a_model_of_a_kind_without_plain_linear_layers_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"a GPT2Model has no linear layers that int8 would speed up; give --dtype auto"
    ):
        encoder_for(make_kind("gpt2", tmp_path / "gpt2"), "--dtype", "int8")


def test_where_bytes_are_not_multiplied_fast_int8_is_refused_before_a_model_is_read(monkeypatch):
    with pytest.raises(UserError, match=r"--dtype int8 is for encoding on a CPU, and this machine encodes on cuda"):
        choose_dtype("int8", torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(UserError, match=r"--dtype int8 needs a CPU with VNNI \(avx512_vnni or avx_vnni .* drop it"):
        encoder_for("no such model", "--dtype", "int8")


@pytest.mark.parametrize(("flag", "expected"), [("avx512_vnni", True), ("avx_vnni", True), ("avx512_bf16", False)])
def test_either_kind_of_vnni_will_do(monkeypatch, flag, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert has_int8_products() is expected


def test_int8_and_torch_compile_are_refused_with_the_flags():
    with pytest.raises(UserError, match=r"--dtype int8 has kernels of its own.*drop --torch_compile"):
        encoder_for("anything", "--dtype", "int8", "--torch_compile")
