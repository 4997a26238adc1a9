"""The sections of gpu.py about embeddings: their speed, their agreement with float32, kernels, search."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_models import (
    BLOCK,
    GPU,
    HALF,
    PASSAGE_TOKENS,
    SIZES,
    Row,
    cudnn_attention,
    encoder_of,
    milliseconds,
    model_folder,
    packed_if,
    synchronize,
    texts,
    trainer_of,
)


def attention(folder: Path) -> Iterator[Row]:
    """Encoding three blocks end to end; padded; and padded with cuDNN's attention, which plans anew for each shape."""
    passages = texts(3 * BLOCK // 2 if GPU else 64, PASSAGE_TOKENS, seed=3)
    for packing, cudnn in ((True, False), (False, False), (False, True)):
        with packed_if(packing), encoder_of(folder, "bge-base", HALF) as encoder, cudnn_attention(cudnn):
            took = seconds_per_block(encoder, passages)
        times = ", ".join(f"{seconds:.2f}" for seconds in took)
        yield {"texts": "end to end" if packing else "padded", "cuDNN allowed": cudnn, "seconds per block": times}


def seconds_per_block(encoder: Any, passages: list[str]) -> list[float]:
    """How long each block of passages took."""
    took, began = [], time.perf_counter()
    for _ in encoder.encode_passages(passages):
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
    return took


def agreement(folder: Path) -> Iterator[Row]:
    """Embeddings beside those of float32, and gradients of a step: what precision, packing and recomputation change."""
    passages = texts(1024 if GPU else 16, PASSAGE_TOKENS, seed=5)
    exact = None
    for dtype, packing in (("float32", False), (HALF, False), (HALF, True)):
        with packed_if(packing), encoder_of(folder, "bge-base", dtype) as encoder:
            found = np.concatenate([block for _, block in encoder.encode_passages(passages)])
        exact = found if exact is None else exact
        yield {
            "embeddings": f"{dtype}, {'end to end' if packing else 'padded'}",
            "1 - lowest cosine": 1 - lowest_cosine(exact, found),
        }
    bf16 = "--bf16 True" if GPU else "--bf16 False"
    cases = [("--bf16 False", False), (bf16, False), (bf16, True), (f"{bf16} --recompute_sub_batches True", True)]
    exact = None
    for flags, packing in cases:
        with packed_if(packing):
            found = gradient(folder, "bge-base", *flags.split(), "--dropout", "0")
        exact = found if exact is None else exact
        what = f"{flags.replace('--', '')}, {'end to end' if packing else 'padded'}"
        yield {
            "gradient": what,
            "1 - cosine": 1 - lowest_cosine(exact[None], found[None]),
            "length": float(np.linalg.norm(found)),
        }


def lowest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the rows of two matrices."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def gradient(folder: Path, name: str, *flags: str) -> np.ndarray:
    """The gradient of the first batch of 32 rows, without an optimizer step."""
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(folder, name, *flags, batch=32 if GPU else 4, group=2, steps=1, output=output)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        trainer.optimizer = trainer.create_optimizer()
        trainer.training_step(trainer.accelerator.prepare(trainer.model), batch)
    parts = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat(parts).float().cpu().numpy()


def encode(folder: Path) -> Iterator[Row]:
    """Passages per second of all models, beside sentence-transformers at its best batch."""
    passages = texts(2 * BLOCK if GPU else 64, PASSAGE_TOKENS, seed=4)
    for name in SIZES if GPU else ["minilm"]:
        many = passages[:BLOCK] if name == "bge-large" else passages
        with encoder_of(folder, name, HALF) as encoder:
            seconds_per_block(encoder, many[:2048])
            busy, seconds = busy_share(partial(seconds_per_block, encoder, many))
        yield {"model": name, "engine": "ours", "passages/s": len(many) / seconds, "busy": busy}
        few = many[: BLOCK // 4]
        rates = {batch: peer_rate(model_folder(folder, name), few, batch) for batch in (128, 512)}
        best = max(rates, key=lambda batch: rates[batch])
        yield {"model": name, "engine": f"sentence-transformers, {best}", "passages/s": rates[best], "busy": None}


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
    states = torch.randn(total, 768, device="cuda")
    yield {
        "pooling": f"{total} x 768 to {len(lengths)} x 768",
        "segment_reduce ms": milliseconds(
            lambda: torch.segment_reduce(states, "sum", offsets=ends.long(), axis=0, unsafe=True)
        ),
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


def search(_: Path) -> Iterator[Row]:
    """Exact search on the device that encodes, and the same by faiss on the CPU."""
    from embedding_finetune.retrieval.top_k import TopK

    rng = np.random.default_rng(0)
    queries, passages, top_k = (100_000, 4 * BLOCK, 210) if GPU else (50, 400, 5)
    vectors = rng.standard_normal((passages, 768), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = vectors[rng.integers(0, passages, queries)] + rng.standard_normal((queries, 768), dtype=np.float32) / 40
    device = torch.device("cuda" if GPU else "cpu")
    on_device, took = TopK(asked, top_k, device=device), []
    for start in range(0, passages, passages // 4):
        began = time.perf_counter()
        on_device.add(start, vectors[start : start + passages // 4])
        synchronize()
        took.append(time.perf_counter() - began)
    found = on_device.ranking()
    shape = f"{queries} x {passages // 4} x 768, k {top_k}"
    yield {"where": str(device), "shape": shape, "seconds per block": ", ".join(f"{t:.2f}" for t in took)}
    few = queries // 50
    try:
        by_faiss, began = TopK(asked[:few], top_k), time.perf_counter()
        by_faiss.add(0, vectors)
    except SystemExit as error:
        yield {"where": "faiss", "failed": str(error)}
        return
    seconds = time.perf_counter() - began
    same = all(np.array_equal(ours[:few], theirs) for ours, theirs in zip(found, by_faiss.ranking()))
    yield {
        "where": "faiss, CPU",
        "shape": f"{few} x {passages} x 768",
        "seconds": seconds,
        "same ranking and scores": same,
    }
