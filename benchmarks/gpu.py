"""What a GPU makes of the suite: one command, no network, some minutes. Without a GPU it runs in reduced form.

    python benchmarks/gpu.py [--minutes 9] [--output_dir DIR] [--sections encode train]

Models have random weights in the shapes of all-MiniLM-L6-v2, bge-base and bge-large, texts are made of a made-up
WordPiece vocabulary and have the lengths of the Debian descriptions: queries of 12 tokens, passages of 98. So nothing
is downloaded, and only speed, memory and agreement mean anything.

Each section runs in a process of its own, in the order below, while there is time. After each, gpu.json and gpu.md in
--output_dir (default: $OUT, else the folder `gpu`) hold what is known.

It runs on torch 2.11 and transformers 5.17 too, outside of what the suite promises. Beside torch, transformers,
accelerate, numpy and tqdm it wants datasets (with dill and multiprocess) for training, 1 MB of wheels, and for the
tests faiss-cpu, 19 MB. Where one is missing, a section says so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import REPOSITORY

Row = dict[str, Any]

GPU = torch.cuda.is_available()
QUERY_TOKENS, PASSAGE_TOKENS = (2.43, 0.30), (4.46, 0.48)
"""Mean and deviation of the logarithm of the number of tokens, counted in 3,000 rows of make_debian.py."""
_TOKENS_PER_WORD = 1.25
_LONGEST = 510


@dataclass(frozen=True)
class Size:
    """The shape of a BERT."""

    hidden: int
    layers: int
    heads: int

    @property
    def parameters(self) -> int:
        """Those of the layers: what a token is multiplied with."""
        return 12 * self.hidden**2 * self.layers


SIZES = {
    "minilm": Size(384, 6, 12),
    "bge-base": Size(768, 12, 12),
    "bge-large": Size(1024, 24, 16),
}
TINY = Size(32, 2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output_dir", type=Path, default=Path(os.environ.get("OUT", "gpu")))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        allow_older_transformers()
        for row in SECTIONS[args.run](args.folder):
            print("row " + json.dumps(row), flush=True)
        return
    end = time.monotonic() + 60 * args.minutes
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for section in args.sections:
            began = time.monotonic()
            results[section] = run(section, Path(folder), args.output_dir, seconds=end - began)
            write(results, args.output_dir)
            print(f"-- {section}: {time.monotonic() - began:.0f} s\n{table(results[section])}", flush=True)


def run(section: str, folder: Path, output_dir: Path, *, seconds: float) -> list[Row]:
    """The rows of a section, run in a process of its own; the last one says so where it failed or had no time."""
    if seconds < 10:
        return [{"left out": "no time"}]
    command = [sys.executable, __file__, "--run", section, "--folder", str(folder)]
    environment = os.environ | {"TQDM_DISABLE": "1", "OUT": str(output_dir)}
    with (output_dir / f"{section}.log").open("w+") as log:
        try:
            status = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        log.seek(0)
        lines = log.read().splitlines()
    rows = [json.loads(line.removeprefix("row ")) for line in lines if line.startswith("row ")]
    if status:
        rows.append({"ended with status": status, "last line": lines[-1][:200] if lines else ""})
    return rows


def write(results: dict[str, list[Row]], output_dir: Path) -> None:
    """Write gpu.json and gpu.md."""
    (output_dir / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join(f"### {section}\n\n{table(rows)}" for section, rows in results.items())
    (output_dir / "gpu.md").write_text(text + "\n")


def table(rows: list[Row]) -> str:
    """Rows as Markdown; rows that follow each other with the same columns share a table."""
    lines: list[str] = []
    before: list[str] = []
    for row in rows:
        if list(row) != before:
            before = list(row)
            lines += ["", "| " + " | ".join(before) + " |", "|" + " --- |" * len(before)]
        lines.append("| " + " | ".join(shown(value) for value in row.values()) + " |")
    return "\n".join(lines).strip()


def shown(value: object) -> str:
    """A number with three digits or more."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


# Models and texts


def words() -> tuple[list[str], dict[str, int]]:
    """Made-up words, the frequent ones first, and a WordPiece vocabulary of 30,522 tokens that knows them."""
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    tokens += ["##" + syllable for syllable in syllables]
    made: dict[str, None] = {}
    while len(tokens) + len(made) < 30_522:
        made["".join(rng.choice(syllables, rng.integers(2, 5)))] = None
    whole = list(made)
    return whole, {token: number for number, token in enumerate([*tokens, *whole])}


def texts(count: int, tokens: tuple[float, float], *, seed: int) -> list[str]:
    """Texts whose numbers of tokens have this distribution; a fourth of the words is of two tokens."""
    rng = np.random.default_rng(seed)
    whole, _ = words()
    frequency = 1 / np.arange(1, len(whole) + 1)
    lengths = np.clip(rng.lognormal(*tokens, count), 3, _LONGEST)
    sizes = np.maximum((lengths / _TOKENS_PER_WORD).astype(int), 1)
    drawn = rng.choice(len(whole), sizes.sum(), p=frequency / frequency.sum())
    is_long = rng.random(sizes.sum()) < _TOKENS_PER_WORD - 1
    flat = [whole[number] + ("ka" if long else "") for number, long in zip(drawn.tolist(), is_long.tolist())]
    ends = sizes.cumsum()
    return [" ".join(flat[end - size : end]) for size, end in zip(sizes.tolist(), ends.tolist())]


def model_folder(folder: Path, name: str) -> Path:
    """The model of a size, with mean pooling, as a folder; made when it is first asked for."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = folder / name
    if path.exists():
        return path
    size, (_, vocabulary) = SIZES[name] if GPU else TINY, words()
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "pad", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        initializer_range=0.05,
    )
    with torch.device("cuda" if GPU else "cpu"):  # random numbers are drawn faster there
        model = BertModel(config)
    model.cpu().save_pretrained(path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512, "do_lower_case": False}))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": size.hidden, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def training_file(folder: Path, *, rows: int, negatives: int) -> Path:
    """Rows of a query, a positive and so many negatives."""
    path = folder / f"rows_{rows}_{negatives}.jsonl"
    if not path.exists():
        queries = texts(rows, QUERY_TOKENS, seed=1)
        passages = texts(rows * (1 + negatives), PASSAGE_TOKENS, seed=2)
        with path.open("w") as file:
            for number, query in enumerate(queries):
                own = passages[number * (1 + negatives) : (number + 1) * (1 + negatives)]
                file.write(json.dumps({"query": query, "pos": own[:1], "neg": own[1:]}) + "\n")
    return path


def allow_older_transformers() -> None:
    """Let the suite find what transformers 5.17 calls by other names."""
    from transformers import TrainingArguments

    for new, old in [("activation_checkpointing", "gradient_checkpointing")]:
        for ending in ("", "_kwargs"):
            if not hasattr(TrainingArguments, new + ending):
                setattr(TrainingArguments, new + ending, property(lambda self, name=old + ending: getattr(self, name)))


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if GPU:
        torch.cuda.synchronize()


def failure(error: Exception) -> str:
    """The last line of an error and where it came from."""
    traceback.print_exc()
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


@contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    """Let torch's attention consider cuDNN's kernels, or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# Sections


def libraries(_: Path) -> Iterator[Row]:
    """Versions, and the two ceilings of the card: a bf16 product and a copy."""
    import importlib.metadata as metadata

    names = ["transformers", "accelerate", "tokenizers", "datasets", "faiss-cpu", "sentence-transformers", "triton"]
    found = {"torch": torch.__version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    yield {"python": sys.version.split()[0], **found}
    if not GPU:
        return
    properties = torch.cuda.get_device_properties(0)
    yield {
        "card": properties.name,
        "GiB": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "attention, best first": str(torch._C._get_sdp_priority_order()),
    }
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    large = torch.randn(2**28, device="cuda")
    product, copy = milliseconds(lambda: a @ b), milliseconds(lambda: large.clone())
    yield {"bf16 TFLOP/s": 2 * 8192**3 / product / 1e9, "copy TB/s": 2 * 2**30 / copy / 1e9}


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """The median time of a piece of work on the device, after two warm-ups."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def tests(_: Path) -> Iterator[Row]:
    """The fast tests: on a machine with a GPU they use it by themselves."""
    if not GPU:
        return
    marks = "not slow and not demo_model and not full_size"
    log = Path(os.environ["OUT"]) / "tests.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "14", "-m", marks, "--dist", "worksteal", "--tb", "short"]
    command += ["-p", "no:cacheprovider"]
    with log.open("w") as file:
        try:
            subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, timeout=170)
        except subprocess.TimeoutExpired:
            yield {"ended": "after 170 s"}
    lines = log.read_text().splitlines()
    yield {"result": lines[-1] if lines else ""}
    for line in lines:
        if line.startswith(("FAILED", "ERROR ")):
            yield {"failed": line[:300]}


@contextmanager
def encoder_of(folder: Path, name: str, dtype: str, tokens_per_batch: int | None = None) -> Iterator[Any]:
    """The suite's Encoder of a model."""
    from embedding_finetune.retrieval.arguments import EncodingOptions
    from embedding_finetune.retrieval.encoder import load_encoder

    options = EncodingOptions(dtype=dtype, tokens_per_batch=tokens_per_batch)  # type: ignore[arg-type]
    yield load_encoder(str(model_folder(folder, name)), options, flag="--model")
    if GPU:
        torch.cuda.empty_cache()


def seconds_per_block(encoder: Any, passages: list[str]) -> list[float]:
    """How long each block of passages took."""
    took, began = [], time.perf_counter()
    for _ in encoder.encode_passages(passages):
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
    return took


def attention(folder: Path) -> Iterator[Row]:
    """Encoding three blocks with cuDNN's attention allowed, which plans anew for each shape, and without it."""
    passages = texts(3 * 8192 if GPU else 64, PASSAGE_TOKENS, seed=3)
    for allowed in (True, False):
        with encoder_of(folder, "bge-base", "bfloat16" if GPU else "float32") as encoder, cudnn_attention(allowed):
            took = seconds_per_block(encoder, passages)
        yield {"cuDNN allowed": allowed, "seconds per block": ", ".join(f"{t:.2f}" for t in took)}


def encode(folder: Path) -> Iterator[Row]:
    """Passages per second of all models, beside sentence-transformers at its best batch."""
    count = 3 * 8192 if GPU else 64
    passages = texts(count, PASSAGE_TOKENS, seed=4)
    for name in SIZES if GPU else ["minilm"]:
        many = passages if name != "bge-large" else passages[: count // 2]
        for tokens in (None, 16_384, 262_144) if GPU else (None,):
            with encoder_of(folder, name, "bfloat16" if GPU else "float32", tokens) as encoder:
                seconds_per_block(encoder, many[:2048])
                busy, seconds = busy_share(partial(seconds_per_block, encoder, many))
            yield {
                "model": name,
                "engine": f"ours, {tokens or 'default'}",
                "passages/s": len(many) / seconds,
                "busy": busy,
            }
        best, rate = 0, 0.0
        for batch in (128, 512) if GPU else (32,):
            now = peer_rate(model_folder(folder, name), many, batch)
            best, rate = max((rate, best), (now, batch))[::-1]
        yield {"model": name, "engine": f"sentence-transformers, {best}", "passages/s": rate, "busy": None}


def busy_share(work: Callable[[], object]) -> tuple[float | None, float]:
    """The share of a piece of work's time in which the GPU computes, and the seconds that it takes unobserved."""
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    work()
    synchronize()
    seconds = time.perf_counter() - began
    if not GPU:
        return None, seconds
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as observed:
        work()
        synchronize()
        whole = time.perf_counter() - began
    busy = sum(event.device_time_total for event in observed.key_averages() if "Memcpy" not in event.key)
    return busy / 1e6 / whole, seconds


def peer_rate(model: Path, passages: list[str], batch: int) -> float:
    """Passages per second of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    options = {"dtype": torch.bfloat16} if GPU else {}
    peer = SentenceTransformer(str(model), model_kwargs=options)
    peer.encode(passages[: 2 * batch], batch_size=batch)
    began = time.perf_counter()
    peer.encode(passages, batch_size=batch, show_progress_bar=False)
    return len(passages) / (time.perf_counter() - began)


def trained(folder: Path, name: str, *flags: str, batch: int, group: int, steps: int, warm_up: int = 5) -> Row:
    """Rows per second, and peak memory, of finetune.py's trainer; steps after the warm-up are timed."""
    from transformers import TrainerCallback

    from embedding_finetune.training.parser import parse_arguments
    from embedding_finetune.training.run_data import prepare, read_rows
    from embedding_finetune.training.setup import make_trainer

    class Timer(TrainerCallback):
        began = seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == warm_up:
                synchronize()
                self.began = time.perf_counter()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            self.seconds = time.perf_counter() - self.began

    data = training_file(folder, rows=batch * (steps + warm_up), negatives=group - 1)
    with tempfile.TemporaryDirectory() as output:
        given = f"--model_name_or_path {model_folder(folder, name)} --train_data {data} --output_dir {output}/tuned"
        given += f" --per_device_train_batch_size {batch} --train_group_size {group} --max_steps {steps + warm_up}"
        given += " --query_max_len 64 --passage_max_len 512 --save_strategy no --report_to none"
        arguments = parse_arguments([*given.split(), *flags], "")
        trainer = make_trainer(*arguments, prepare(read_rows(arguments[1], arguments[2]), *arguments))
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
        "rows/s": rate,
        "ms/step": 1000 * batch / rate,
        "TFLOP/s": 6 * SIZES[name].parameters * tokens * rate / 1e12 if GPU else None,
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
    """Training steps of bge-base: dropout, and tokens per sub-batch."""
    cases = [("bge-base", f"--bf16 True --dropout {dropout}", 128, 9, 12) for dropout in ("0", "0.1")]
    cases += [("bge-base", f"--bf16 True --dropout {dropout}", 32, 2, 60) for dropout in ("0", "0.1")]
    cases += [("minilm", f"--bf16 True --dropout {dropout}", 32, 2, 100) for dropout in ("0", "0.1")]
    cases += [
        ("bge-base", f"--bf16 True --dropout 0.1 --tokens_per_sub_batch {tokens}", 128, 9, 12)
        for tokens in (65_536, 8192)
    ]
    yield from attempts(folder, cases if GPU else cases[:2])


def large(folder: Path) -> Iterator[Row]:
    """bge-large at a large batch, with and without recomputation; fp16."""
    cases = [
        ("bge-large", "--bf16 True --dropout 0 --recompute_sub_batches True", 128, 9, 6),
        ("bge-large", "--bf16 True --dropout 0.1 --recompute_sub_batches True", 128, 9, 6),
        ("bge-large", "--bf16 True --dropout 0.1", 128, 9, 2),
        ("minilm", "--fp16 True --dropout 0.1", 32, 2, 20),
    ]
    yield from attempts(folder, cases if GPU else cases[:1])


def kernels(_: Path) -> Iterator[Row]:
    """Attention alone: texts laid end to end beside padded ones with a mask."""
    if not GPU:
        return
    from torch.nn.attention.varlen import varlen_attn

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(*PASSAGE_TOKENS, 166), 3, 512).astype(int)
    longest, total = int(lengths.max()), int(lengths.sum())
    ends = torch.tensor(np.append(0, lengths.cumsum()), dtype=torch.int32, device="cuda")
    flat = [torch.randn(total, 12, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    padded = [torch.randn(len(lengths), 12, longest, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None])[:, None, None].cuda()
    mask = mask.expand(-1, -1, longest, -1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    yield {
        "tokens": total,
        "padded": len(lengths) * longest,
        "varlen ms": milliseconds(lambda: varlen_attn(*flat, ends, ends, longest, longest)),
        "masked sdpa ms": milliseconds(lambda: sdpa(*padded, attn_mask=mask)),
        "full sdpa ms": milliseconds(lambda: sdpa(*padded)),
    }
    with cudnn_attention(True):
        first = milliseconds(lambda: sdpa(*padded, attn_mask=mask))
        times = []
        for cut in (8, 16, 24, 32):
            shorter = [tensor[:, :, : longest - cut].contiguous() for tensor in padded]
            shorter_mask = mask[:, :, : longest - cut, : longest - cut]
            synchronize()
            began = time.perf_counter()
            sdpa(*shorter, attn_mask=shorter_mask)
            synchronize()
            times.append(1000 * (time.perf_counter() - began))
    yield {
        "cuDNN allowed, known shape ms": first,
        "new shapes, the first call each, ms": str([round(t, 1) for t in times]),
    }


SECTIONS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "libraries": libraries,
    "tests": tests,
    "attention": attention,
    "train": train,
    "large": large,
    "encode": encode,
    "kernels": kernels,
}


if __name__ == "__main__":
    main()
