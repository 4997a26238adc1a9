"""CPU seconds and peak memory of finetune.py --hold_out, from reading the rows to the written files, without training.

    python benchmarks/hold_out.py
    python benchmarks/hold_out.py --rows 100000 --by question

Rows are made up: a question of 10 words, two passages and a negative of 40. A third of the questions stand in two
rows, and passages are shared in chains of up to 100 rows. Everything is one process of its own, with one thread; the
peak is its VmHWM.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import REPOSITORY, new_parser

CHAIN = 100
_MEASURED = """
import sys, time
sys.path.insert(0, {repository!r})
from embedding_finetune.training.arguments import DataArguments
from embedding_finetune.training.held_out import hold_out, write_held_out
from embedding_finetune.training.rows import load_rows
times = [time.process_time()]
options = DataArguments(train_data={data!r}, hold_out=0.1, hold_out_by={by!r})
rows = load_rows({data!r}, may_be_held_out=True)
times.append(time.process_time())
left, held_out = hold_out(rows, options, seed=42)
times.append(time.process_time())
write_held_out({folder!r}, held_out)
times.append(time.process_time())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
read, split, write = (after - before for before, after in zip(times, times[1:]))
print(f"read and validate {{read:.1f}} s, hold out {{split:.1f}} s, write {{write:.1f}} s")
print(f"with imports {{time.process_time():.1f}} s, peak {{int(peak.split()[1]) // 1024}} MiB")
print(held_out.facts, len(held_out.task.corpus), "candidates")
"""


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--by", choices=["passage", "question"], default="passage")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, args.rows)
        print(f"{args.rows} rows, {data.stat().st_size / 2**30:.2f} GiB of JSON Lines", flush=True)
        program = _MEASURED.format(repository=str(REPOSITORY), data=str(data), by=args.by, folder=folder)
        subprocess.run([sys.executable, "-c", program], check=True)


def write_rows(path: Path, count: int) -> None:
    """Write rows of random words: row n shares a passage with row n - 1, unless a chain begins there."""
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("n", "r", "st", "lm")]
    shared = ""
    with path.open("w") as file:
        for number in range(count):
            own, negative = (f"{number} " + " ".join(rng.choices(words, k=40)) for _ in range(2))
            question = f"Question {number - (number % 3 == 2)}: " + " ".join(words[number % 7 : number % 7 + 8]) + "?"
            pos = [own] if number % CHAIN < number // CHAIN % CHAIN or not shared else [shared.upper(), own]
            file.write(json.dumps({"query": question, "pos": pos, "neg": [negative]}) + "\n")
            shared = own


if __name__ == "__main__":
    main()
