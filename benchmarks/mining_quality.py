"""What mining settings are worth after training, on ../shared/data/debian: MRR@10 and Hit@1 before and after.

    python benchmarks/mining_quality.py --recipes none hard margin
    python benchmarks/mining_quality.py --split test --recipes best

Recipes are tuned on a split of the training rows (`dev`): 2,000 of them serve as queries, searched among 12,000
passages, and the others are trained on. `test` trains on all training rows and measures the 2,000 test queries among
all 28,028 passages; it is for reporting what was chosen on dev. Models and mined files stay in --folder.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from debian import FOLDER, records

REPOSITORY = Path(__file__).resolve().parent.parent
DEV_QUERIES, DEV_PASSAGES = 2000, 12_000

TRAINING = (
    "--num_train_epochs 1 --per_device_train_batch_size 128 --query_max_len 64 --temperature 0.05 "
    "--warmup_steps 20 --bf16 True"
)
PAIRS = "--train_group_size 2"
HARD = "--range_for_sampling 2-10 --negative_number 5"
# Recipe -> its stages: flags of mine_hard_neg.py, or None for no negatives, and of finetune.py. Each stage mines and
# trains with the model that the one before it left.
RECIPES: dict[str, list[tuple[str | None, str]]] = {
    "none": [(None, "--train_group_size 1 --passage_max_len 64 --learning_rate 1e-4")],
    "none-3e-4": [(None, "--train_group_size 1 --passage_max_len 64 --learning_rate 3e-4")],
    "hard-16000-rows": [(HARD, f"{PAIRS} --passage_max_len 64 --learning_rate 2e-4 --max_steps 125")],
    "hard": [(HARD, f"{PAIRS} --passage_max_len 48 --learning_rate 1e-4")],
    "none, then hard": [
        (None, "--train_group_size 1 --passage_max_len 64 --learning_rate 1e-4 --max_steps 180"),
        (
            f"{HARD} --passage_max_len 128",
            f"{PAIRS} --passage_max_len 48 --learning_rate 5e-5 --seed 7 --max_steps 130",
        ),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / ".demo" / "model"))
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("mining_quality"))
    args = parser.parse_args()
    folder = args.folder / args.split
    folder.mkdir(parents=True, exist_ok=True)
    if args.split == "dev":
        rows, queries, passages = split_train(folder)
    else:
        rows, queries, passages = (FOLDER / f"{name}.jsonl.gz" for name in ("train", "test", "candidates"))
    report("base", None, measure(args.model, queries, passages, folder / "embeddings"))
    for name in args.recipes:
        model, seconds = args.model, 0.0
        for number, (mining, training) in enumerate(RECIPES[name], start=1):
            output = folder / f"{name.replace(', ', '-').replace(' ', '-')}.{number}"
            seconds += train(model, rows, output, mining, training)
            model = str(output)
        report(name, seconds, measure(model, queries, passages, folder / "embeddings"))


def split_train(folder: Path) -> tuple[Path, Path, Path]:
    """Files of the rows to train on, of the dev queries, and of the passages to search for these."""
    rows, pool = list(records("train")), [record["text"] for record in records("pool")]
    rng = random.Random(0)
    order = list(range(len(rows)))
    rng.shuffle(order)
    dev, rest = ([rows[n] for n in sorted(part)] for part in (order[:DEV_QUERIES], order[DEV_QUERIES:]))
    answers = sorted({text for row in dev for text in row["pos"]})
    others = [text for text in pool if text not in set(answers)]
    rng.shuffle(others)
    texts = ({"text": text} for text in (answers + others)[:DEV_PASSAGES])
    return tuple(
        write(folder / name, part) for name, part in (("rows.jsonl", rest), ("dev.jsonl", dev), ("pool.jsonl", texts))
    )


def write(path: Path, lines: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def train(model: str, rows: Path, output: Path, mining: str | None, training: str) -> float:
    """Mine if asked for, finetune, and return the seconds that finetune.py took, its start included."""
    if mining is not None:
        mined = Path(f"{output}.jsonl")
        run(
            "mine_hard_neg.py",
            f"--model_name_or_path {model} --input_file {rows} --output_file {mined} {mining}",
            f"--candidate_pool {FOLDER}/pool.jsonl.gz --embeddings_dir {output.parent}/embeddings",
        )
        rows = mined
    began = time.monotonic()
    run(
        "finetune.py",
        f"--model_name_or_path {model} --train_data {rows} --output_dir {output}",
        "--overwrite_output_dir True --save_strategy no --disable_tqdm True",
        TRAINING,
        training,
    )
    return time.monotonic() - began


def measure(model: str, queries: Path, passages: Path, embeddings: Path) -> dict[str, float]:
    flags = f"--model_name {model} --query_file_jsonl_path {queries} --index_file_jsonl_path {passages}"
    output = run("evaluate.py", f"{flags} --embeddings_dir {embeddings}")
    return ast.literal_eval(output.splitlines()[-1])


def run(script: str, *flags: str) -> str:
    command = [sys.executable, REPOSITORY / script, *" ".join(flags).split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ).stdout


def report(name: str, seconds: float | None, metrics: dict[str, float]) -> None:
    took = "" if seconds is None else f"{seconds:6.0f} s"
    print(f"{name:24} {took:>9}  MRR@10 {metrics['MRR@10']:.4f}  Hit@1 {metrics['Hit@1']:.4f}", flush=True)


if __name__ == "__main__":
    main()
