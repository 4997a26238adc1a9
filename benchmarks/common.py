"""Shared by the benchmarks: parser, data, paths, and the peak memory of a run.

Importing this module makes the suite and its test helpers importable.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "benchmarks" / "data" / "debian"
"""make_debian.py writes here, and the other benchmarks read from here."""
MODEL = REPOSITORY / ".demo" / "model"

sys.path.insert(0, str(REPOSITORY))
sys.path.append(str(REPOSITORY / "tests"))

_MEASURED_RUN = """
import importlib, sys, time
sys.path.insert(0, {repository!r})
script = importlib.import_module({script!r})
began = time.monotonic()
script.main({flags!r})
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024, round(time.monotonic() - began, 1))
"""


def new_parser(docstring: str | None, *, model: bool = False, data: bool = False) -> argparse.ArgumentParser:
    """A parser whose help is the docstring; model, data: whether it has the flags --model and --data."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        parser.add_argument("--model", default=str(MODEL), help="model folder (default: .demo/model)")
    if data:
        parser.add_argument(
            "--data", type=Path, default=DATA, help="folder that make_debian.py wrote (default: benchmarks/data/debian)"
        )
    return parser


def data_file(data: Path, name: str) -> Path:
    """The file of train, test, candidates or pool. Ends the program with one line if it is missing."""
    path = data / f"{name}.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: run python benchmarks/make_debian.py, or name its folder with --data")
    return path


def records(data: Path, name: str) -> Iterator[dict[str, Any]]:
    """The records of train, test, candidates or pool."""
    with gzip.open(data_file(data, name), "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def passages(data: Path, count: int) -> list[str]:
    """`count` passages, evenly spread over the pool."""
    texts = [record["text"] for record in records(data, "pool")]
    return [texts[number * len(texts) // count] for number in range(count)]


def peak_memory(script: str, flags: Sequence[str]) -> tuple[int, float]:
    """Peak resident MiB (VmHWM, with mapped file pages) and seconds of a run of `script` in a process of its own."""
    program = _MEASURED_RUN.format(repository=str(REPOSITORY), script=script, flags=list(flags))
    result = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    peak, seconds = result.stdout.split()[-2:]
    return int(peak), float(seconds)
