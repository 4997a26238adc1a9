"""The sections of gpu.py about training: its speed and memory, and several processes."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import REPOSITORY
from gpu_models import (
    GPU,
    QUERY_TOKENS,
    SIZES,
    Row,
    failure,
    model_folder,
    synchronize,
    trainer_of,
    training_file,
)


def trained(folder: Path, name: str, *flags: str, batch: int, group: int, steps: int, warm_up: int = 5) -> Row:
    """Rows per second, and peak memory, of finetune.py's trainer; steps after the warm-up are timed."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        began = seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == warm_up:
                synchronize()
                self.began = time.perf_counter()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            self.seconds = time.perf_counter() - self.began

    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(folder, name, *flags, batch=batch, group=group, steps=steps + warm_up, output=output)
        timer = Timer()
        trainer.add_callback(timer)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    rate = batch * steps / timer.seconds
    tokens = np.exp(QUERY_TOKENS[0] + QUERY_TOKENS[1] ** 2 / 2) + group * 98.7
    return {
        "model": name,
        "batch": f"{batch} x {group}",
        "flags": " ".join(flags).replace("--", ""),
        "texts": "end to end" if type(trainer.data_collator.layout).__name__ == "PackedLayout" else "padded",
        "rows/s": rate,
        "ms/step": 1000 * batch / rate,
        "TFLOP/s": 6 * SIZES[name].parameters * tokens * rate / 1e12 if GPU else None,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if GPU else None,
    }


def peer_trained(folder: Path, name: str, *, batch: int, group: int, steps: int, warm_up: int = 5) -> Row:
    """Rows per second of sentence-transformers' trainer, in bf16."""
    from datasets import load_dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        began = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (warm_up, warm_up + steps):
                synchronize()
                self.seconds = time.perf_counter() - self.began
                self.began = time.perf_counter()

    path = training_file(folder, rows=batch * (steps + warm_up), negatives=group - 1)
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    columns = {"query": rows["query"], "positive": [pos[0] for pos in rows["pos"]]}
    columns |= {f"negative_{n}": [neg[n] for neg in rows["neg"]] for n in range(group - 1)}
    from datasets import Dataset

    model = SentenceTransformer(str(model_folder(folder, name)))
    with tempfile.TemporaryDirectory() as output:
        arguments = SentenceTransformerTrainingArguments(
            output, per_device_train_batch_size=batch, max_steps=steps + warm_up, bf16=GPU, report_to="none",
            save_strategy="no", logging_steps=1000, dataloader_num_workers=4 if GPU else 0, disable_tqdm=True,
            use_cpu=not GPU,
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss)
        timer = Timer()
        trainer.add_callback(timer)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return {
        "model": name,
        "batch": f"{batch} x {group}",
        "flags": "sentence-transformers, bf16",
        "texts": "padded",
        "rows/s": batch * steps / timer.seconds,
        "ms/step": 1000 * timer.seconds / steps,
        "TFLOP/s": None,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if GPU else None,
    }


def attempts(folder: Path, cases: list[tuple[str, str, int, int, int]]) -> Iterator[Row]:
    """trained() for (model, flags, batch, group, steps) each; a case that fails says why."""
    for name, flags, batch, group, steps in cases:
        if not GPU:
            flags, batch, steps = flags.replace("--bf16 True", ""), min(batch, 4), 2
        try:
            yield trained(folder, name, *flags.split(), batch=batch, group=group, steps=steps, warm_up=5 if GPU else 1)
        except (Exception, SystemExit) as error:  # the next case may do
            yield {"model": name, "batch": f"{batch} x {group}", "flags": flags, "failed": failure(error)}  # type: ignore[arg-type]
        if GPU:
            torch.cuda.empty_cache()


def train(folder: Path) -> Iterator[Row]:
    """Training steps: texts end to end without dropout; padded with the models' own of 0.1; the other trainer."""
    sizes = [("bge-base", 32, 2, 40), ("minilm", 32, 2, 60), ("bge-base", 128, 9, 10)]
    for name, batch, group, steps in sizes if GPU else sizes[1:2]:
        yield from attempts(
            folder, [(name, f"--bf16 True --dropout {dropout}", batch, group, steps) for dropout in (0, 0.1)]
        )
        if group > 2 and GPU:
            continue  # needs more than 140 GB there
        try:
            steps = steps if GPU else 2
            yield peer_trained(folder, name, batch=batch if GPU else 4, group=group, steps=steps)
        except Exception as error:  # its versions differ
            yield {
                "model": name,
                "batch": f"{batch} x {group}",
                "flags": "sentence-transformers",
                "failed": failure(error),
            }


def large(folder: Path) -> Iterator[Row]:
    """bge-large at a large batch, with and without recomputation; fp16."""
    cases = [
        ("bge-large", "--bf16 True --dropout 0 --recompute_sub_batches True", 128, 9, 6),
        ("bge-large", "--bf16 True --dropout 0.1 --recompute_sub_batches True", 128, 9, 6),
        ("bge-large", "--bf16 True --dropout 0.1", 128, 9, 2),
        ("minilm", "--fp16 True --dropout 0.1", 32, 2, 20),
    ]
    yield from attempts(folder, cases if GPU else cases[:1])


_FAILING = """
import os, sys
sys.path.insert(0, {repository!r})
import finetune
from embedding_finetune.command_line import UserError
from embedding_finetune.training.trainer import RetrievalTrainer
step = RetrievalTrainer.training_step
def failing(self, *args, **options):
    if self.state.global_step == 2 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        raise UserError("this process fails alone")
    return step(self, *args, **options)
RetrievalTrainer.training_step = failing
finetune.main(sys.argv[1:])
"""


def processes(folder: Path) -> Iterator[Row]:
    """torchrun: one process under NCCL with an evaluation; two on one card beside one; a process that fails alone."""
    name = "minilm"
    data, rows = training_file(folder, rows=256, negatives=1), 64
    common = f"--model_name_or_path {model_folder(folder, name)} --train_data {data} --max_steps 6 --train_group_size 2"
    common += " --query_max_len 64 --passage_max_len 256 --dropout 0 --learning_rate 1e-4 --logging_steps 1"
    common += " --overwrite_output_dir True --save_strategy no" + (" --bf16 True" if GPU else "")
    failing = folder / "failing.py"
    failing.write_text(_FAILING.format(repository=str(REPOSITORY)))
    script = str(REPOSITORY / "finetune.py")
    two = f"--ddp_backend gloo --negatives_cross_device True --per_device_train_batch_size {rows // 2}"
    cases = [
        ("one process", [], script, f"--per_device_train_batch_size {rows}"),
        (
            "torchrun, 1 process",
            ["--nproc-per-node", "1"],
            script,
            f"--per_device_train_batch_size {rows} --hold_out 32",
        ),
        ("torchrun, 2 processes, gloo", ["--nproc-per-node", "2"], script, two),
        ("torchrun, 2 processes, one fails", ["--nproc-per-node", "2"], str(failing), two),
    ]
    for what, launcher, program, flags in cases if GPU else cases[:1]:
        start = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", *launcher] if launcher else [])]
        output = folder / "tuned"
        command = [*start, program, *common.split(), *flags.split(), "--output_dir", str(output)]
        began = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            status, told = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            status, told = 124, str(error.stderr)
        print(told, flush=True)
        losses = [
            line.split("loss ")[1].split()[0]
            for line in told.splitlines()
            if line.startswith("step ") and "  loss " in line
        ]
        last = next((line for line in reversed(told.splitlines()) if "rror" in line), "")
        yield {
            "run": what, "status": status, "seconds": time.perf_counter() - began, "losses": ", ".join(losses),
            "error": last[-150:] if status else "",
        }  # fmt: skip


def profile(folder: Path) -> Iterator[Row]:
    """Where the time of a training step goes: how busy the GPU is, and what takes longest there and on the host."""
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]

    class Observer(TrainerCallback):
        began = seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            if state.global_step == 6:
                observed.start()
                self.began = time.perf_counter()
            if state.global_step == 8:
                self.seconds = time.perf_counter() - self.began
                observed.stop()

    cases = [("minilm", 32, 2), ("bge-base", 128, 9)] if GPU else [("minilm", 4, 2)]
    for name, batch, group in cases:
        observed = torch.profiler.profile(activities=activities)
        flags = ["--dropout", "0", *(["--bf16", "True"] if GPU else [])]
        with tempfile.TemporaryDirectory() as output:
            trainer = trainer_of(folder, name, *flags, batch=batch, group=group, steps=8, output=output)
            observer = Observer()
            trainer.add_callback(observer)
            trainer.train()
        events = observed.key_averages()
        there = sum(event.self_device_time_total for event in events)
        yield {
            "model": name,
            "batch": f"{batch} x {group}",
            "two steps, ms": 1000 * observer.seconds,
            "GPU ms": there / 1000,
        }
        for kind in ("self_device_time_total", "self_cpu_time_total"):
            longest = sorted(events, key=lambda event, kind=kind: -getattr(event, kind))[:12]
            yield {kind: "; ".join(f"{e.key[:50]} {getattr(e, kind) / 1000:.1f} ({e.count})" for e in longest)}
