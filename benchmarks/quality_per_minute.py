"""What a minute of training is worth: --recipe domain beside sentence-transformers' trainer, given the same wall time.

    python benchmarks/quality_per_minute.py
    python benchmarks/quality_per_minute.py --sample

Both train on all rows, and are measured on other queries: on the data of make_debian.py its test queries, with
--sample the sample data's. The recipe is run to its end, from the start of its process, with its mining. The other
trainer gets as many steps as it has time for: MultipleNegativesRankingLoss, no text twice in a batch, bf16, --batch 64,
a linear schedule with a tenth of warm-up. Its first steps are timed, and then it begins anew.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, data_file, new_parser
from datasets import Dataset

from embedding_finetune.data.records import read_training_rows

_TIMED_STEPS, _RESERVE = 6, 0.97
"""Steps of the other trainer's that are timed, and the share of its time that is planned for."""


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--sample", action="store_true", help="the sample data instead of --data")
    parser.add_argument("--folder", type=Path, default=Path("quality_per_minute"), help="where both models are kept")
    parser.add_argument("--batch", type=int, default=64, help="of the other trainer")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="of the other trainer")
    parser.add_argument("--finetune_flags", type=shlex.split, default=[], help="further flags of finetune.py, quoted")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sample:
        rows = REPOSITORY / "example.jsonl"
        queries, passages = REPOSITORY / "example_heldout.jsonl", REPOSITORY / "candidate_context.jsonl"
    else:
        rows, queries, passages = (data_file(args.data, name) for name in ("train", "test", "candidates"))
    if args.seconds is not None:
        train_peer(args, rows, began=time.monotonic())
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    ours, peer = args.folder / "ours", args.folder / "sentence-transformers"
    seconds = run(
        *("finetune.py", "--recipe", "domain", "--hold_out", "0", "--model_name_or_path", args.model),
        *("--train_data", rows, "--output_dir", ours, "--overwrite_output_dir", "True", *args.finetune_flags),
    )
    print(f"ours: {seconds:.0f} s", flush=True)
    print(f"sentence-transformers: {run(*sys.argv, '--seconds', f'{seconds:.0f}'):.0f} s", flush=True)
    run(
        *("evaluate.py", "--model_name", peer, args.model, ours),
        *("--query_file_jsonl_path", queries, "--index_file_jsonl_path", passages),
    )


def run(script: Path | str, *flags: Any) -> float:
    """Run a program of this suite, and return its seconds."""
    began = time.monotonic()
    path = Path(script) if Path(script).is_absolute() or Path(script).is_file() else REPOSITORY / script
    subprocess.run([sys.executable, path, *map(str, flags)], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return time.monotonic() - began


def train_peer(args: argparse.Namespace, rows: Path, *, began: float) -> None:
    """Train with sentence-transformers until args.seconds after `began`."""
    from sentence_transformers import SentenceTransformer

    pairs = [{"anchor": row["query"], "positive": row["pos"][0]} for row in read_training_rows(rows)]
    data = Dataset.from_list(pairs)
    timed = peer_trainer(args, SentenceTransformer(args.model), data, steps=_TIMED_STEPS)
    started = time.monotonic()
    timed.train()
    step = (time.monotonic() - started) / _TIMED_STEPS
    steps = int(_RESERVE * (args.seconds - (time.monotonic() - began)) / step)
    print(json.dumps({"seconds_of_a_step": round(step, 2), "steps": steps}), flush=True)
    model = SentenceTransformer(args.model)
    peer_trainer(args, model, data, steps=steps).train()
    model.save_pretrained(str(args.folder / "sentence-transformers"))


def peer_trainer(args: argparse.Namespace, model: Any, data: Dataset, *, steps: int) -> Any:
    """sentence-transformers' trainer for so many steps."""
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    return SentenceTransformerTrainer(
        model=model,
        args=Arguments(
            output_dir=str(args.folder / "sentence-transformers.run"),
            max_steps=steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            bf16=True,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
    )


if __name__ == "__main__":
    main()
