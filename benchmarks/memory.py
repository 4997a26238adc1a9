"""Peak resident memory of mine_hard_neg.py as the pool grows, with a tiny model.

    python benchmarks/memory.py
    python benchmarks/memory.py --passages 100000 1000000 --queries 1000

Passages are 40 random words, 270 bytes on average. Every run has a process of its own; the peak is its VmHWM.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from common import new_parser, peak_memory


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of mine_hard_neg.py")
    args = parser.parse_args()
    from helpers.tiny import WORDS, make_tiny_bert

    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_bert(Path(folder) / "model")
        for count in args.passages:
            pool, rows = Path(folder) / "pool.jsonl", Path(folder) / "rows.jsonl"
            with pool.open("w") as file, rows.open("w") as questions:
                for number in range(count):
                    text = f"{number} " + " ".join(rng.choices(WORDS, k=40))
                    file.write(json.dumps({"text": text}) + "\n")
                    if number < args.queries:
                        questions.write(json.dumps({"query": text[:60], "pos": [text]}) + "\n")
            flags = ["--model_name_or_path", str(model), "--input_file", str(rows), "--candidate_pool", str(pool)]
            flags += ["--output_file", f"{folder}/mined.jsonl", *args.flags]
            peak, seconds = peak_memory("mine_hard_neg", flags)
            print(f"{count} passages of {pool.stat().st_size // count} bytes: peak {peak} MiB, {seconds} s", flush=True)


if __name__ == "__main__":
    main()
