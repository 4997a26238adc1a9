"""Rows per second and peak memory of reading, beside datasets.load_dataset, for each format.

    python benchmarks/reading.py
    python benchmarks/reading.py --rows 100000 --formats jsonl parquet

A row has a query of 9 words, a positive and a negative of 40 words each. Every reader has a process of its own:
`validate` reads and validates the rows as all scripts do, `load_rows` also writes and maps them as finetune.py does,
and `load_dataset` is datasets' own, with an empty cache. Seconds are without imports. The peak is VmHWM, with mapped
files.
"""

import csv
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import REPOSITORY, new_parser

FORMATS = ("jsonl", "jsonl.gz", "json", "csv", "parquet")
PROGRAMS = {
    "validate": """
import pyarrow.csv, pyarrow.parquet
from embedding_finetune.data.records import read_training_rows
read = lambda: sum(1 for _ in read_training_rows(path))""",
    "load_rows": """
from embedding_finetune.training.rows import load_rows
read = lambda: len(load_rows(path))""",
    "load_dataset": """
import datasets
kind = {"csv": "csv", "parquet": "parquet"}.get(path.split(".")[-1], "json")
datasets.disable_progress_bars()
read = lambda: len(datasets.load_dataset(kind, data_files=path, cache_dir=cache, split="train"))""",
}
MEASURE = """
import sys, time
sys.path.insert(0, {repository!r})
path, cache = {path!r}, {cache!r}
{program}
began, used = time.monotonic(), time.process_time()
rows = read()
began, used = time.monotonic() - began, time.process_time() - used
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(rows, began, used, int(peak.split()[1]) // 1024)
"""


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    args = parser.parse_args()
    print(
        "| format | MB | reader | seconds | of load_dataset's | CPU seconds | of load_dataset's | rows/s | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"rows.{name}"
            write(path, args.rows)
            size = path.stat().st_size / 1e6
            rounds = [{reader: measure(reader, path, args.rows) for reader in PROGRAMS} for _ in range(args.rounds)]
        medians = {
            reader: [statistics.median(times[reader][n] for times in rounds) for n in range(3)] for reader in PROGRAMS
        }
        for reader, (seconds, used, peak) in medians.items():
            print(
                f"| {name} | {size:.0f} | {reader} | {seconds:.2f} | {seconds / medians['load_dataset'][0]:.2f} | "
                f"{used:.2f} | {used / medians['load_dataset'][1]:.2f} | {args.rows / seconds:,.0f} | {peak:.0f} |",
                flush=True,
            )


def rows(count: int) -> Iterator[dict]:
    """Made-up rows."""
    from helpers.tiny import WORDS

    rng = random.Random(0)
    words = rng.choices(WORDS, k=100_000)

    def text(length: int) -> str:
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    for number in range(count):
        yield {"query": f"{number} {text(8)}", "pos": [text(40)], "neg": [text(40)]}


def write(path: Path, count: int) -> None:
    """Write rows in the format of the name."""
    if path.name.endswith(".parquet"):
        from embedding_finetune.data.parquet_output import schema_of, write_parquet

        write_parquet(path, rows(count), schema_of(path, ["query", "pos", "neg"], [], like=[]))
        return
    with gzip.open(path, "wt", compresslevel=1) if path.name.endswith(".gz") else path.open("w", newline="") as file:
        if path.name.endswith(".csv"):
            table = csv.writer(file)
            table.writerow(["query", "pos", "neg"])
            table.writerows([row["query"], *row["pos"], *row["neg"]] for row in rows(count))
        elif path.name.endswith(".json"):
            file.writelines(f"{',' if n else '['}\n{json.dumps(row)}" for n, row in enumerate(rows(count)))
            file.write("\n]\n")
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows(count))


def measure(reader: str, path: Path, count: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak MiB."""
    with tempfile.TemporaryDirectory() as cache:
        program = MEASURE.format(repository=str(REPOSITORY), path=str(path), cache=cache, program=PROGRAMS[reader])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": cache}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    read, seconds, used, peak = result.stdout.split()[-4:]
    if int(read) != count:
        raise SystemExit(f"{reader} read {read} of {count} rows")
    return float(seconds), float(used), int(peak)


if __name__ == "__main__":
    main()
