"""What a GPU makes of the suite: one command, no network, some minutes. Without a GPU it runs in reduced form.

    python benchmarks/gpu.py [--minutes 9] [--output_dir DIR] [--sections encode train]

Models have random weights in the shapes of all-MiniLM-L6-v2, bge-base and bge-large, texts are made of a made-up
WordPiece vocabulary and have the lengths of the Debian descriptions: queries of 12 tokens, passages of 98. So nothing
is downloaded, and only speed, memory and agreement mean anything.

Each section runs in a process of its own, in the order below, while there is time. After each, gpu.json and gpu.md in
--output_dir (default: $OUT, else the folder `gpu`) hold what is known.

It runs on torch 2.11 and transformers 5.17 too, outside of what the suite promises. Beside torch, transformers,
accelerate, numpy and tqdm it wants datasets (with dill and multiprocess) for training, 1 MB of wheels, and for the
tests faiss-cpu, 19 MB. Where one is missing, a section says so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import REPOSITORY
from gpu_encoding import agreement, attention, encode, kernels, search
from gpu_models import GPU, Row, allow_older_transformers, milliseconds
from gpu_training import large, processes, profile, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output_dir", type=Path, default=Path(os.environ.get("OUT", "gpu")))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        allow_older_transformers()
        for row in SECTIONS[args.run](args.folder):
            print("row " + json.dumps(row), flush=True)
        return
    end = time.monotonic() + 60 * args.minutes
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for section in args.sections:
            began = time.monotonic()
            results[section] = run(section, Path(folder), args.output_dir, seconds=end - began)
            write(results, args.output_dir)
            print(f"-- {section}: {time.monotonic() - began:.0f} s\n{table(results[section])}", flush=True)


def run(section: str, folder: Path, output_dir: Path, *, seconds: float) -> list[Row]:
    """The rows of a section, run in a process of its own; the last one says so where it failed or had no time."""
    if seconds < 10:
        return [{"left out": "no time"}]
    command = [sys.executable, __file__, "--run", section, "--folder", str(folder)]
    environment = os.environ | {"TQDM_DISABLE": "1", "OUT": str(output_dir)}
    with (output_dir / f"{section}.log").open("w+") as log:
        try:
            status = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        log.seek(0)
        lines = log.read().splitlines()
    rows = [json.loads(line.removeprefix("row ")) for line in lines if line.startswith("row ")]
    if status:
        rows.append({"ended with status": status, "last line": lines[-1][:200] if lines else ""})
    return rows


def write(results: dict[str, list[Row]], output_dir: Path) -> None:
    """Write gpu.json and gpu.md."""
    (output_dir / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join(f"### {section}\n\n{table(rows)}" for section, rows in results.items())
    (output_dir / "gpu.md").write_text(text + "\n")


def table(rows: list[Row]) -> str:
    """Rows as Markdown; rows that follow each other with the same columns share a table."""
    lines: list[str] = []
    before: list[str] = []
    for row in rows:
        if list(row) != before:
            before = list(row)
            lines += ["", "| " + " | ".join(before) + " |", "|" + " --- |" * len(before)]
        lines.append("| " + " | ".join(shown(value) for value in row.values()) + " |")
    return "\n".join(lines).strip()


def shown(value: object) -> str:
    """A number with three digits or more."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


def libraries(_: Path) -> Iterator[Row]:
    """Versions, and the two ceilings of the card: a bf16 product and a copy."""
    import importlib.metadata as metadata

    names = ["transformers", "accelerate", "tokenizers", "datasets", "faiss-cpu", "sentence-transformers", "triton"]
    found = {"torch": torch.__version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    yield {"python": sys.version.split()[0], **found}
    if not GPU:
        return
    properties = torch.cuda.get_device_properties(0)
    yield {
        "card": properties.name,
        "GiB": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "attention, best first": str(torch._C._get_sdp_priority_order()),
    }
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    large = torch.randn(2**28, device="cuda")
    product, copy = milliseconds(lambda: a @ b), milliseconds(lambda: large.clone())
    yield {"bf16 TFLOP/s": 2 * 8192**3 / product / 1e9, "copy TB/s": 2 * 2**30 / copy / 1e9}


def tests(_: Path) -> Iterator[Row]:
    """The tests that need a GPU, then the fast ones: on a machine with a GPU they use it by themselves."""
    for marks, seconds in (("gpu", 60), ("not slow and not demo_model and not full_size and not gpu", 150)):
        log = Path(os.environ["OUT"]) / f"tests_{marks.split()[0]}.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "8" if GPU else "0", "-m", marks, "--tb", "short"]
        command += ["-p", "no:cacheprovider", "--dist", "worksteal"] if GPU else ["--collect-only"]
        with log.open("w") as file:
            try:
                subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, timeout=seconds)
            except subprocess.TimeoutExpired:
                yield {"ended": f"after {seconds} s"}
        lines = log.read_text().splitlines()
        yield {"marked": marks, "result": lines[-1] if lines else ""}
        yield from ({"failed": line[:300]} for line in lines if line.startswith(("FAILED", "ERROR ")))


SECTIONS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "libraries": libraries,
    "tests": tests,
    "attention": attention,
    "train": train,
    "encode": encode,
    "agreement": agreement,
    "kernels": kernels,
    "search": search,
    "processes": processes,
    "large": large,
    "profile": profile,
}


if __name__ == "__main__":
    main()
