import numpy as np
import pytest
import torch
from helpers.data import passage_about
from helpers.running import encoder_for
from helpers.tiny import make_rotary_model
from torch import nn

from embedding_finetune.command_line import UserError
from embedding_finetune.model.encoding_kernels import (
    PackedLinear,
    choose_dtype,
    prepare_for_encoding,
)
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.process import as_a_run

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_packed_linear_layer_is_the_linear_layer(bias, dtype, tolerance):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 96, bias=bias).to(dtype), torch.randn(3, 7, 48).to(dtype)
    with torch.no_grad():
        assert torch.allclose(PackedLinear(linear)(x), linear(x), atol=tolerance)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_bfloat16_leaves_the_direction_of_a_rotary_model_with_windows(tmp_path, padding_side):
    folder = make_rotary_model(tmp_path / "model", padding_side=padding_side)
    texts = [passage_about("pump") * 3, "a", "red pump"]
    exact = encoder_for(folder, "--dtype", "float32").encode_queries(texts)
    rough = encoder_for(folder, "--dtype", "bfloat16").encode_queries(texts)
    assert ((exact * rough).sum(axis=1) > 0.999).all()
    assert not np.array_equal(exact, rough)


def test_buffers_keep_their_precision(tmp_path):
    folder = make_rotary_model(tmp_path / "model")
    backbone, _, _ = load_backbone(str(folder), flag="--model")
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    prepare_for_encoding(backbone, dtype=torch.bfloat16, device=CPU, torch_compile=False)
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in backbone.named_buffers())


def test_auto_is_bfloat16_only_where_the_hardware_computes_it(monkeypatch):
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_dtype("auto", CPU) is expected
    assert choose_dtype("auto", torch.device("mps")) is torch.float32
    assert choose_dtype("float16", CPU) is torch.float16


@pytest.mark.slow
def test_compiling_changes_no_direction_and_makes_few_graphs_for_many_lengths(tiny_bert):
    texts = [passage_about("pump") * n + "red " * m for n in (0, 1, 2, 3) for m in range(1, 20)]
    plain = encoder_for(tiny_bert, "--dtype", "float32").encode_queries(texts)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = encoder_for(tiny_bert, "--dtype", "bfloat16", "--torch_compile", "--tokens_per_batch", "300")
    assert (compiled.encode_queries(texts) * plain).sum(axis=1).min() > 0.999
    # The last bits are others: it shares no store with the model that is not compiled.
    tower, other = compiled.passages, encoder_for(tiny_bert, "--dtype", "bfloat16").passages
    assert tower.index_digest != other.index_digest
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # a batch of one text is a graph of its own


def test_compiling_without_a_compiler_says_so(tiny_bert, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(UserError, match=r"--torch_compile: there is no C\+\+ compiler.*install g\+\+"):
        encoder_for(tiny_bert, "--torch_compile")


@pytest.mark.demo_model
def test_bfloat16_embeddings_of_the_real_model_keep_their_direction(demo_model):
    from helpers.data import REPOSITORY, read_jsonl

    texts = [text for record in read_jsonl(REPOSITORY / "candidate_context.jsonl") for text in record["context"]]
    exact = encoder_for(demo_model, "--dtype", "float32").encode_queries(texts)
    rough = encoder_for(demo_model, "--dtype", "bfloat16").encode_queries(texts)
    assert (exact * rough).sum(axis=1).min() >= 0.9998


def test_the_weight_of_a_packed_layer_can_be_read():
    linear = nn.Linear(48, 96)
    assert torch.equal(PackedLinear(linear).weight, linear.weight)


def test_compiling_for_a_gpu_without_a_c_compiler_is_refused(tiny_bert, tmp_path, monkeypatch):
    """Triton compiles a launcher in C, and fails in the middle of the first batch without a compiler."""
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    monkeypatch.setattr(backbone, "to", lambda device: backbone)
    compiled = []
    monkeypatch.setattr(backbone, "compile", lambda **options: compiled.append(options))
    monkeypatch.setenv("PATH", str(tmp_path))

    def prepare():
        prepare_for_encoding(backbone, dtype=torch.bfloat16, device=torch.device("cuda"), torch_compile=True)

    monkeypatch.setenv("CC", "nowhere")
    with pytest.raises(UserError, match=r"--torch_compile: there is no C compiler \(CC is nowhere, .*install gcc"):
        prepare()
    monkeypatch.delenv("CC")
    with pytest.raises(UserError, match=r"--torch_compile: there is no C compiler \(neither gcc .*install gcc"):
        prepare()
    assert compiled == []
    (tmp_path / "clang").touch(mode=0o755)
    prepare()
    assert compiled == [{"dynamic": True}]


def test_a_model_that_does_not_fit_into_a_gpu_is_one_line(tiny_bert, monkeypatch):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")

    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backbone, "to", full)
    with pytest.raises(UserError, match="the model does not fit into the memory of cuda:1: free some, or name another"):
        prepare_for_encoding(backbone, dtype=torch.float16, device=torch.device("cuda:1"), torch_compile=False)


def test_cudnns_attention_is_left_out_until_the_run_ends(tiny_bert):
    torch.backends.cuda.enable_cudnn_sdp(True)
    with as_a_run():
        backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
        prepare_for_encoding(backbone, dtype=torch.float32, device=CPU, torch_compile=False)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
