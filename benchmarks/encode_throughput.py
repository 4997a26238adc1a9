"""Documents per second of encoding, side by side with sentence-transformers, on the passages of make_debian.py.

    python benchmarks/encode_throughput.py
    python benchmarks/encode_throughput.py --rounds 1 --texts 4000 --runs ours:auto "ours:auto --torch_compile"
    PYTHONPATH=/folder/with/openvino python benchmarks/encode_throughput.py --runs openvino:float32 openvino:bfloat16
    PYTHONPATH=/folder/with/these python benchmarks/encode_throughput.py --runs ours:int8 openvino:int8 onnxruntime:int8

Each run has a process of its own; they run one after the other, --rounds times. Loading, compiling and a first pass
over a part of the texts are not counted. `st` names dtype and batch size, `ours` --dtype and further flags.
`without-bfloat16` is ours as on a CPU that has none. `openvino` and `onnxruntime` are our encoder with the model
converted by them; their int8 is NNCF's, calibrated on our texts, and onnxruntime's dynamic quantisation. `limit`
computes only the products of the model's linear layers, for the same number of tokens. The last column is the smallest
cosine to our float32 embeddings over all texts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from common import new_parser, passages

if TYPE_CHECKING:
    import torch

    from embedding_finetune.retrieval.encoder import Encoder
    from embedding_finetune.retrieval.tower import Tower

RUNS = (
    *(f"st:{dtype}:{batch}" for dtype in ("float32", "bfloat16") for batch in (8, 16, 32)),
    *("ours:float32", "ours:bfloat16", "ours:int8", "without-bfloat16:int8"),
    *("ours:float32 --torch_compile", "ours:bfloat16 --torch_compile"),
    *("limit:float32", "limit:bfloat16"),
)


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    rates: dict[str, list[float]] = {run: [] for run in args.runs}
    first_passes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for number, run in enumerate(args.runs):
                command = [sys.executable, __file__, "--model", args.model, "--data", str(args.data)]
                command += ["--texts", str(args.texts), "--measure", run, "--save", f"{folder}/{number}.npy"]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rate, first_passes[run] = json.loads(output.splitlines()[-1])
                rates[run].append(rate)
        vectors = {run: np.load(f"{folder}/{number}.npy") for number, run in enumerate(args.runs)}
    exact = vectors.get("ours:float32")
    print(f"{'run':40} {'documents/s':>12} {'spread':>14} {'first pass':>11} {'min cosine':>11}")
    for run, measured in rates.items():
        comparable = exact is not None and len(vectors[run])
        cosine = f"{(exact * vectors[run]).sum(axis=1).min():.5f}" if comparable else ""
        spread = f"{min(measured):.1f} - {max(measured):.1f}"
        print(f"{run:40} {statistics.median(measured):12.1f} {spread:>14} {first_passes[run]:9.1f} s {cosine:>11}")


def measure(args: argparse.Namespace) -> tuple[float, float]:
    """Documents per second over all texts, and the seconds of a first pass over an eighth of them."""
    kind, _, rest = args.measure.partition(":")
    engines = {
        "st": sentence_transformers,
        "ours": ours,
        "without-bfloat16": without_bfloat16,
        "openvino": openvino,
        "onnxruntime": onnxruntime,
        "limit": limit,
    }
    encode = engines[kind](args.model, rest)
    texts = passages(args.data, args.texts)
    began = time.perf_counter()
    encode(texts[::8])
    first_pass = time.perf_counter() - began
    began = time.perf_counter()
    vectors = encode(texts)
    rate = len(texts) / (time.perf_counter() - began)
    np.save(args.save, vectors)
    return rate, first_pass


def sentence_transformers(model: str, options: str) -> Callable[[Sequence[str]], np.ndarray]:
    from sentence_transformers import SentenceTransformer

    dtype, batch_size = options.split(":")
    peer = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": dtype})

    def encode(texts: Sequence[str]) -> np.ndarray:
        vectors = peer.encode(texts, batch_size=int(batch_size), convert_to_tensor=True, show_progress_bar=False)
        return vectors.float().numpy()

    return encode


def load(model: str, options: str) -> "Encoder":
    """Our encoder. options: the value of --dtype, and further flags."""
    from embedding_finetune.retrieval.arguments import EncodingOptions, add_encoding_arguments
    from embedding_finetune.retrieval.encoder import load_encoder

    parser = argparse.ArgumentParser()
    add_encoding_arguments(parser)
    dtype, *flags = options.split()
    return load_encoder(model, EncodingOptions(**vars(parser.parse_args(["--dtype", dtype, *flags]))), flag="--model")


def ours(model: str, options: str) -> Callable[[Sequence[str]], np.ndarray]:
    encoder = load(model, options)
    return lambda texts: np.concatenate([block for _, block in encoder.encode_passages(texts)])


def without_bfloat16(model: str, options: str) -> Callable[[Sequence[str]], np.ndarray]:
    import torch

    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
    return ours(model, options)


def embedder_of(model: str) -> tuple["Tower", dict[str, "torch.Tensor"]]:
    """Our tower with a plain model, and inputs to trace that with."""
    import torch

    from embedding_finetune.model.bi_encoder import BiEncoder
    from embedding_finetune.model.loading import load_backbone
    from embedding_finetune.retrieval.tower import Tower

    backbone, tokenizer, config = load_backbone(model, flag="--model")
    embedder = BiEncoder(backbone, config).eval()
    tower = Tower(embedder, tokenizer, query_max_len=1, passage_max_len=config.max_seq_length)
    return tower, {name: torch.ones(2, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask")}


def openvino(model: str, dtype: str) -> Callable[[Sequence[str]], np.ndarray]:
    import torch
    from openvino import Core, convert_model

    tower, example = embedder_of(model)
    converted = convert_model(tower.model, example_input=example)
    if dtype == "int8":
        import nncf

        from embedding_finetune.model.calibration import calibration_texts

        tokens = [tower.tokenizer(text, truncation=True, return_tensors="np") for text in calibration_texts()]
        texts = nncf.Dataset([{name: inputs[name] for name in example} for inputs in tokens])
        converted = nncf.quantize(converted, texts, model_type=nncf.ModelType.TRANSFORMER)
    precision = {"float32": "f32", "bfloat16": "bf16", "int8": "bf16"}[dtype]  # of what is not int8
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = Core().compile_model(converted, "CPU", settings).create_infer_request()

    def infer(**inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(request.infer({name: tensor.numpy() for name, tensor in inputs.items()})[0].copy())

    tower.model.forward = infer
    return lambda texts: np.concatenate([block for _, block in tower.encode_passages(texts)])


def onnxruntime(model: str, dtype: str) -> Callable[[Sequence[str]], np.ndarray]:
    import torch
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantType, quantize_dynamic

    tower, example = embedder_of(model)
    with tempfile.TemporaryDirectory() as folder:
        exact, path = f"{folder}/exact.onnx", f"{folder}/model.onnx"
        sizes = {name: {0: "texts", 1: "tokens"} for name in example}
        inputs = tuple(example.values())
        torch.onnx.export(
            tower.model, inputs, exact, input_names=list(example), dynamic_axes=sizes, dynamo=False, opset_version=17
        )
        if dtype == "int8":
            quantize_dynamic(exact, path, weight_type=QuantType.QInt8, per_channel=True)
        session = InferenceSession(path if dtype == "int8" else exact)

    def infer(**inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    tower.model.forward = infer
    return lambda texts: np.concatenate([block for _, block in tower.encode_passages(texts)])


def limit(model: str, dtype: str) -> Callable[[Sequence[str]], np.ndarray]:
    import torch

    from embedding_finetune.model.encoding_kernels import PackedLinear
    from embedding_finetune.retrieval.budget import TokenBudget

    tower = load(model, dtype).passages
    tokens = TokenBudget(None, torch.device("cpu")).tokens  # in a batch
    layers = [module for module in tower.model.backbone.modules() if isinstance(module, PackedLinear)]
    inputs = {
        width: torch.randn(tokens, width).to(getattr(torch, dtype)) for width in {layer.in_features for layer in layers}
    }

    def encode(texts: Sequence[str]) -> np.ndarray:
        texts_as_tokens, _ = tower.passage.tokenize(tower.tokenizer, texts)
        whole, rest = divmod(sum(len(text.ids) for text in texts_as_tokens), tokens)
        with torch.no_grad():
            for layer in layers:
                for _ in range(whole):
                    layer(inputs[layer.in_features])
                layer(inputs[layer.in_features][:rest])
        return np.empty((0, 0))

    return encode


if __name__ == "__main__":
    main()
