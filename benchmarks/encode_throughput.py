"""Documents per second of encoding, side by side with sentence-transformers, on ../shared/data/debian.

    python benchmarks/encode_throughput.py
    python benchmarks/encode_throughput.py --rounds 1 --texts 4000 --runs ours:auto "ours:auto --torch_compile"

Each engine runs in a process of its own, one after the other, as often as --rounds says; loading, compiling and a
first pass over a part of the texts are not counted. `st` runs name dtype and batch size, `ours` --dtype and further
flags. The last column is the smallest cosine to our float32 embeddings over all texts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from debian import passages

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

RUNS = (
    *(f"st:{dtype}:{batch}" for dtype in ("float32", "bfloat16") for batch in (8, 16, 32)),
    *("ours:float32", "ours:bfloat16", "ours:float32 --torch_compile", "ours:bfloat16 --torch_compile"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / ".demo" / "model"))
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
                command = [sys.executable, __file__, "--model", args.model, "--texts", str(args.texts)]
                command += ["--measure", run, "--save", f"{folder}/{number}.npy"]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rate, first_passes[run] = json.loads(output.splitlines()[-1])
                rates[run].append(rate)
        vectors = {run: np.load(f"{folder}/{number}.npy") for number, run in enumerate(args.runs)}
    exact = vectors.get("ours:float32")
    print(f"{'run':40} {'documents/s':>12} {'spread':>14} {'first pass':>11} {'min cosine':>11}")
    for run, measured in rates.items():
        cosine = "" if exact is None else f"{(exact * vectors[run]).sum(axis=1).min():.5f}"
        spread = f"{min(measured):.1f} - {max(measured):.1f}"
        print(f"{run:40} {statistics.median(measured):12.1f} {spread:>14} {first_passes[run]:9.1f} s {cosine:>11}")


def measure(args: argparse.Namespace) -> tuple[float, float]:
    """Documents per second over all texts, and the seconds that a first pass over an eighth of them took."""
    kind, _, rest = args.measure.partition(":")
    encode = {"st": sentence_transformers, "ours": ours}[kind](args.model, rest)
    texts = passages(args.texts)
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


def ours(model: str, options: str) -> Callable[[Sequence[str]], np.ndarray]:
    from embedding_finetune.arguments import add_encoding_arguments
    from embedding_finetune.encoding import load_encoder

    parser = argparse.ArgumentParser()
    add_encoding_arguments(parser)
    dtype, *flags = options.split()
    encoder = load_encoder(model, parser.parse_args(["--dtype", dtype, *flags]), flag="--model")
    return lambda texts: np.concatenate([block for _, block in encoder.encode_passages(texts)])


if __name__ == "__main__":
    main()
