"""Peak resident memory of finetune.py: large batches with recomputed sub-batches, and many rows.

    python benchmarks/train_memory.py
    python benchmarks/train_memory.py --rows 1000000

Every run has a process of its own; the peak is its VmHWM, which includes mapped file pages.
"""

import json
import random
import tempfile
from pathlib import Path

from common import new_parser, peak_memory
from train_throughput import triplets


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--rows", type=int, help="instead: this many rows with five negatives of 100 words each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        if args.rows:
            write_many(data, args.rows)
            peak, seconds = run(
                args.model, data, folder, per_device_train_batch_size=1, train_group_size=6, max_steps=1
            )
            size = data.stat().st_size / 2**30
            print(f"{args.rows} rows, {size:.1f} GiB of JSON Lines: peak {peak} MiB to the end of step 1, {seconds} s")
            return
        data.write_text("".join(json.dumps(row) + "\n" for row in triplets(args.data, max(args.batches))))
        for recompute in (False, True):
            peaks = {}
            for batch in args.batches if recompute else args.batches[:1]:
                peaks[batch], seconds = run(
                    args.model,
                    data,
                    folder,
                    per_device_train_batch_size=batch,
                    train_group_size=2,
                    query_max_len=256,
                    passage_max_len=256,
                    max_steps=2,
                    recompute_sub_batches=recompute,
                    bf16=True,
                )
                print(f"recompute {recompute!s:5}  batch {batch:4}  peak {peaks[batch]} MiB  {seconds} s", flush=True)
            print(f"largest / smallest: {max(peaks.values()) / min(peaks.values()):.2f}")


def write_many(path: Path, count: int) -> None:
    """Write rows of random words; no two texts are equal."""
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("n", "r", "st", "lm")]
    with path.open("w") as file:
        for number in range(count):
            texts = [f"{number} " + " ".join(rng.choices(words, k=100)) for _ in range(6)]
            file.write(json.dumps({"query": f"question {number}", "pos": texts[:1], "neg": texts[1:]}) + "\n")


def run(model: str, data: Path, folder: str, **flags: object) -> tuple[int, float]:
    """Peak MiB and seconds of one finetune.py process."""
    flags = {
        "model_name_or_path": model,
        "train_data": data,
        "output_dir": f"{folder}/out",
        "save_strategy": "no",
        "overwrite_output_dir": True,
        "disable_tqdm": True,
        **flags,
    }
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return peak_memory("finetune", argv)


if __name__ == "__main__":
    main()
