"""What mining settings are worth after training, on the data of make_debian.py: MRR@10 and Hit@1 before and after.

    python benchmarks/mining_quality.py
    python benchmarks/mining_quality.py --split test --recipes "mined twice"

Recipes are tuned on a split of the training rows (`dev`): 2,000 of them serve as queries, the others are trained on.
`test` trains on all training rows and measures the 2,000 test queries; it is for reporting the recipe chosen on dev.
Both search all passages. Models and mined files are kept in --folder.
"""

import ast
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from common import REPOSITORY, data_file, new_parser, records

DEV_QUERIES = 2000

TRAINING = (
    "--num_train_epochs 1 --per_device_train_batch_size 128 --train_group_size 1 --query_max_len 64 "
    "--passage_max_len 256 --temperature 0.05 --warmup_steps 10 --bf16 True"
)
NEAREST = "--range_for_sampling 0-10 --negative_number 10 --sampling_strategy top"
NEIGHBOURS = "--neighbours_in_batch 7"
NO_DROPOUT = "--config_name {folder}/no_dropout"
# Recipe -> its stages: flags of mine_hard_neg.py, or None for no negatives, and of finetune.py. Each stage mines and
# trains with the model that the one before it left.
RECIPES: dict[str, list[tuple[str | None, str]]] = {
    "random batches": [(None, "--learning_rate 1e-4 --max_steps 60")],
    "neighbours": [(NEAREST, f"{NEIGHBOURS} --learning_rate 1e-4 --max_steps 60")],
    "neighbours, no dropout": [(NEAREST, f"{NEIGHBOURS} {NO_DROPOUT} --learning_rate 1e-4 --max_steps 60")],
    "mined twice": [
        (NEAREST, f"{NEIGHBOURS} {NO_DROPOUT} --learning_rate 1e-4 --max_steps 110"),
        (NEAREST, f"{NEIGHBOURS} {NO_DROPOUT} --learning_rate 5e-5 --max_steps 90 --seed 7"),
    ],
}


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("mining_quality"))
    args = parser.parse_args()
    passages = data_file(args.data, "candidates")
    folder = args.folder / args.split
    folder.mkdir(parents=True, exist_ok=True)
    write_config_without_dropout(args.model, args.folder / "no_dropout")
    if args.split == "dev":
        rows, queries = split_train(args.data, folder)
    else:
        rows, queries = data_file(args.data, "train"), data_file(args.data, "test")
    report("base", None, measure(args.model, queries, passages, folder / "embeddings"))
    for name in args.recipes:
        model, seconds = args.model, 0.0
        for number, (mining, training) in enumerate(RECIPES[name], start=1):
            output = folder / f"{name.replace(', ', '-').replace(' ', '-')}.{number}"
            seconds += train(model, args.data, rows, output, mining, training.format(folder=args.folder))
            model = str(output)
        report(name, seconds, measure(model, queries, passages, folder / "embeddings"))


def write_config_without_dropout(model: str, folder: Path) -> None:
    """A config.json for --config_name with both dropout probabilities 0."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def split_train(data: Path, folder: Path) -> tuple[Path, Path]:
    """Write the rows to train on and the dev queries, and return the two paths."""
    rows = list(records(data, "train"))
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    dev, rest = ([rows[n] for n in sorted(part)] for part in (order[:DEV_QUERIES], order[DEV_QUERIES:]))
    return write(folder / "rows.jsonl", rest), write(folder / "dev.jsonl", dev)


def write(path: Path, lines: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def train(model: str, data: Path, rows: Path, output: Path, mining: str | None, training: str) -> float:
    """Mine if there are flags for it, finetune, and return the seconds of finetune.py, with its start."""
    if mining is not None:
        mined = Path(f"{output}.jsonl")
        run(
            "mine_hard_neg.py",
            f"--model_name_or_path {model} --input_file {rows} --output_file {mined} {mining}",
            f"--candidate_pool {data_file(data, 'pool')} --embeddings_dir {output.parent}/embeddings",
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
