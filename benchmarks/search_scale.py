"""Seconds of searching on a CPU: ours, with exact scores and merging, beside faiss alone for the same products.

    python benchmarks/search_scale.py --queries 2000
    python benchmarks/search_scale.py --queries 2000 --ascending

Random vectors of length 1 come block by block, as from the encoder. Each engine has a process of its own, and rounds
take turns. "faiss" holds all passages in one index and searches once; "faiss in blocks" searches the blocks one by
one, and merges nothing. To make the vectors, and to copy them into the one index, is not counted. With --ascending all
passages of a block are better than all before it, for every query.
"""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from common import new_parser

_GROWTH = 1.2
"""Lengths grow by this from block to block with --ascending, more than the scores of a block differ."""


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--top_k", type=int, default=210)
    parser.add_argument("--block", type=int, default=8192)
    parser.add_argument("--ascending", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engines", nargs="+", choices=list(_ENGINES), default=list(_ENGINES))
    parser.add_argument("--measure", choices=list(_ENGINES), help="of a process of its own; the script sets it")
    args = parser.parse_args()
    if args.measure:
        from embedding_finetune.process import as_a_run, importing

        with as_a_run():
            with importing():  # as the scripts do, which also keep freed memory
                import embedding_finetune.retrieval.top_k  # noqa: F401
            print(_ENGINES[args.measure](args), peak())
        return
    measured = {name: [] for name in args.engines}
    for _ in range(args.rounds):
        for name, runs in measured.items():
            command = [sys.executable, *sys.argv, "--measure", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(tuple(map(float, output.split())))
            print(f"{name}: {runs[-1][0]:.1f} s, peak {runs[-1][1]:.0f} MiB", flush=True)
    seconds = {name: median(run[0] for run in runs) for name, runs in measured.items()}
    for name in seconds:
        ratio = f", ours is {seconds['ours'] / seconds[name]:.2f} times it" if "ours" in seconds else ""
        print(f"{name}: median {seconds[name]:.1f} s{ratio}")


def queries_of(args: Namespace) -> np.ndarray:
    return _unit(np.random.default_rng(0), args.queries, args)


def blocks_of(args: Namespace) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position of the first passage, embeddings (n, H))."""
    rng = np.random.default_rng(1)
    for number, start in enumerate(range(0, args.passages, args.block)):
        block = _unit(rng, min(args.block, args.passages - start), args)
        yield start, block * np.float32(_GROWTH**number) if args.ascending else block


def _unit(rng: np.random.Generator, count: int, args: Namespace) -> np.ndarray:
    vectors = rng.standard_normal((count, args.dimensions), dtype=np.float32)
    if args.ascending:
        np.abs(vectors, out=vectors)  # all scores are positive
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ours(args: Namespace) -> float:
    from embedding_finetune.retrieval.top_k import TopK

    top, seconds = TopK(queries_of(args), args.top_k), 0.0
    for start, block in blocks_of(args):
        began = time.perf_counter()
        top.add(start, block)
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    top.ranking()
    return seconds + time.perf_counter() - began


def faiss_in_blocks(args: Namespace) -> float:
    import faiss

    queries, seconds = queries_of(args), 0.0
    for _, block in blocks_of(args):
        began = time.perf_counter()
        index = faiss.IndexFlatIP(args.dimensions)
        index.add(block)
        index.search(queries, min(args.top_k, len(block)))
        seconds += time.perf_counter() - began
    return seconds


def faiss_at_once(args: Namespace) -> float:
    import faiss

    queries, index = queries_of(args), faiss.IndexFlatIP(args.dimensions)
    for _, block in blocks_of(args):
        index.add(block)
    began = time.perf_counter()
    index.search(queries, args.top_k)
    return time.perf_counter() - began


def peak() -> int:
    """VmHWM of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


_ENGINES = {"ours": ours, "faiss": faiss_at_once, "faiss in blocks": faiss_in_blocks}


if __name__ == "__main__":
    main()
