"""What it costs to train queries alone, with frozen passages: beside joint training, and with a large pool.

    python benchmarks/query_side.py
    python benchmarks/query_side.py --pool 1000000 --steps 10

The first trains on the rows of make_debian.py, both ways with the same batch, lengths, precision and optimizer, in
turns, and prints milliseconds of training for each row. The second trains against so many random vectors, which it
writes as embeddings of made-up passages into a store: it prints steps per second, and the peak memory of the run.
"""

import argparse
import gzip
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import data_file, new_parser, peak_memory, records

PASSAGES_PER_BLOCK = 2**16


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pool", type=int, help="random passages, instead of the comparison")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.pool is not None:
            against_random_passages(args, Path(folder))
        else:
            beside_joint_training(args, Path(folder))


def beside_joint_training(args: argparse.Namespace, folder: Path) -> None:
    kept, pool = folder / "kept", data_file(args.data, "pool")
    ways = {
        "passages are trained": ["--train_group_size", "1", "--passage_max_len", "256"],
        "passages are frozen": [
            *("--freeze_passages", "True", "--candidate_pool", str(pool), "--embeddings_dir", str(kept))
        ],
    }
    costs: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, flags in ways.items():
            seconds, peak = trained(args, data_file(args.data, "train"), folder / "out", flags)
            costs[way].append(1000 * seconds / (args.steps * args.batch))
            print(f"{way}: {costs[way][-1]:.2f} ms a row, peak {peak} MiB", flush=True)
    together, alone = (statistics.median(costs[way]) for way in ways)
    print(f"median: {together:.2f} and {alone:.2f} ms a row, {together / alone:.1f} times")


def against_random_passages(args: argparse.Namespace, folder: Path) -> None:
    kept, pool = folder / "kept", folder / "pool.jsonl.gz"
    keep_random_embeddings(args, pool, kept)
    rows = [row for _, row in zip(range(args.steps * args.batch), records(args.data, "train"))]
    texts = [{**row, "pos": [f"passage {number}"]} for number, row in enumerate(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    flags = ["--freeze_passages", "True", "--candidate_pool", str(pool), "--embeddings_dir", str(kept)]
    seconds, peak = trained(args, folder / "rows.jsonl", folder / "out", flags)
    print(f"{args.pool} passages: {args.steps / seconds:.3f} steps a second of {args.batch} rows, peak {peak} MiB")


def keep_random_embeddings(args: argparse.Namespace, pool: Path, kept: Path) -> None:
    """Write passages, and random vectors of length 1 as what the model makes of them."""
    from embedding_finetune.data.texts import raw_digests
    from embedding_finetune.retrieval.arguments import EncodingOptions
    from embedding_finetune.retrieval.encoder import load_tower

    tower, rng = load_tower(args.model, EncodingOptions(), flag="--model"), np.random.default_rng(0)
    tower.keep_embeddings(tower.passage, str(kept))
    with gzip.open(pool, "wt", compresslevel=1) as file:
        for first in range(0, args.pool, PASSAGES_PER_BLOCK):
            texts = [f"passage {number}" for number in range(first, min(first + PASSAGES_PER_BLOCK, args.pool))]
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            vectors = rng.standard_normal((len(texts), tower.model.dimensions), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            tower.stores["passage"].keep(raw_digests(texts), vectors)


def trained(args: argparse.Namespace, rows: Path, output: Path, flags: list[str]) -> tuple[float, int]:
    """Seconds of training, and the peak memory of the whole run in MiB."""
    flags = [
        *("--model_name_or_path", args.model, "--train_data", str(rows), "--output_dir", str(output)),
        *("--per_device_train_batch_size", str(args.batch), "--max_steps", str(args.steps), "--dropout", "0"),
        *("--query_max_len", "64", "--bf16", "True", "--temperature", "0.05"),
        *("--overwrite_output_dir", "True", "--save_strategy", "no", *flags),
    ]
    peak, _ = peak_memory("finetune", flags)
    return json.loads((output / "training_summary.json").read_text())["seconds"], peak


if __name__ == "__main__":
    main()
