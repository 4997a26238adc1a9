"""Training samples per second and loss, side by side with sentence-transformers, on the rows of make_debian.py.

    python benchmarks/train_throughput.py

Model, rows, order, batch, lengths, dropout, temperature and optimizer (fused AdamW) are the same for both. Each engine
runs in a process of its own; they run one after the other, --rounds times. The figure is the batch size divided by the
median step.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import new_parser, records

MAX_LENGTH, TEMPERATURE, LEARNING_RATE = 256, 0.05, 2e-5


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--engines", nargs="+", default=["sentence-transformers", "ours"])
    parser.add_argument("--run", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(ENGINES[args.run](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.rows = Path(folder) / "rows.jsonl"
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in triplets(args.data, args.batch * args.steps)))
        for dtype in args.dtypes:
            compare(args, dtype)


def triplets(data: Path, count: int) -> list[dict]:
    """The first training rows, each with one other row's passage as its negative."""
    rows = [row for _, row in zip(range(20_000), records(data, "train"))]
    rng = random.Random(0)
    return [{**row, "neg": rng.choice(rows)["pos"]} for row in rows[:count]]


def compare(args: argparse.Namespace, dtype: str) -> None:
    rates: dict[str, list[float]] = {engine: [] for engine in args.engines}
    for _ in range(args.rounds):
        for engine in args.engines:
            command = [sys.executable, __file__, "--run", engine, "--rows", str(args.rows), "--model", args.model]
            command += [
                "--data",
                str(args.data),
                "--batch",
                str(args.batch),
                "--steps",
                str(args.steps),
                "--dtypes",
                dtype,
            ]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            rates[engine].append(args.batch / statistics.median(result["seconds"][1:]))
            losses = " ".join(f"{loss:.3f}" for loss in result["losses"])
            print(f"{dtype}  {engine:22}  {rates[engine][-1]:6.2f} samples/s   losses {losses}", flush=True)
    medians = {engine: statistics.median(values) for engine, values in rates.items()}
    peer = medians.get("sentence-transformers")
    for engine, rate in medians.items():
        ratio = f"   {rate / peer:.2f}x sentence-transformers" if peer else ""
        print(f"{dtype}  {engine:22}  median {rate:.2f} samples/s{ratio}", flush=True)


def step_clock() -> Any:
    """A Trainer callback that notes the seconds of each step and each logged loss."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds, self.losses = [], []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return StepClock()


def run_ours(args: argparse.Namespace) -> dict:
    import finetune
    from embedding_finetune.training import trainer

    clock = step_clock()

    class TimedTrainer(trainer.RetrievalTrainer):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named)
            self.add_callback(clock)

    trainer.RetrievalTrainer = TimedTrainer
    with tempfile.TemporaryDirectory() as output:
        flags = f"""--model_name_or_path {args.model} --train_data {args.rows} --output_dir {output}
            --per_device_train_batch_size {args.batch} --num_train_epochs 1 --train_sampling_strategy sequential
            --learning_rate {LEARNING_RATE} --temperature {TEMPERATURE} --train_group_size 2
            --query_max_len {MAX_LENGTH} --passage_max_len {MAX_LENGTH} --logging_steps 1 --save_strategy no
            --mask_known_positives False
            --bf16 {args.dtypes[0] == "bf16"}"""
        finetune.main(flags.split())
    return {"seconds": clock.seconds, "losses": clock.losses}


def run_sentence_transformers(args: argparse.Namespace) -> dict:
    import datasets
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.utils.data import BatchSampler, SequentialSampler

    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    columns = {"anchor": [r["query"] for r in rows], "positive": [r["pos"][0] for r in rows]}
    dataset = datasets.Dataset.from_dict({**columns, "negative": [r["neg"][0] for r in rows]})
    model = SentenceTransformer(args.model, device="cpu")
    model.max_seq_length = MAX_LENGTH
    clock = step_clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=Arguments(
                output_dir=output,
                use_cpu=True,
                per_device_train_batch_size=args.batch,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=args.dtypes[0] == "bf16",
                optim="adamw_torch_fused",
                batch_sampler=lambda data, **_: BatchSampler(SequentialSampler(data), args.batch, True),
            ),
            train_dataset=dataset,
            loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
            callbacks=[clock],
        )
        trainer.train()
    return {"seconds": clock.seconds, "losses": clock.losses}


ENGINES = {"sentence-transformers": run_sentence_transformers, "ours": run_ours}

if __name__ == "__main__":
    main()
