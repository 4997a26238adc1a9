"""What --dtype costs in quality: MRR@10, mined negatives and cosines, each beside float32.

    python benchmarks/precision_worth.py
    python benchmarks/precision_worth.py --models .demo/model .demo/finetuned --sample --dtypes float32 bfloat16 int8

The test queries of make_debian.py among all passages, or with --sample the queries of example_heldout.jsonl among those
of example.jsonl and its own. The interval is that of evaluate.py's comparisons. The overlap is the share of the
passages at ranks 2-10, positives aside, that float32 has there too.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from common import MODEL, REPOSITORY, new_parser, records

from embedding_finetune.command_line import command
from embedding_finetune.evaluation.metrics import compare, judged_of, mrr, relevance_of
from embedding_finetune.retrieval.arguments import EncodingOptions
from embedding_finetune.retrieval.encoder import load_encoder
from embedding_finetune.retrieval.top_k import TopK

RANKS = 20
WINDOW = slice(2, 10)


class Measured(NamedTuple):
    """Embeddings of all passages (n, H), the best of each query (Q, RANKS), and MRR@10 per query (Q,)."""

    passages: np.ndarray
    ranking: np.ndarray
    mrr: np.ndarray


@command
def main() -> None:
    parser = new_parser(__doc__, data=True)
    parser.add_argument("--models", nargs="+", default=[str(MODEL)])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--sample", action="store_true", help="on the repository's sample data")
    args = parser.parse_args()
    rows, passages = sample() if args.sample else debian(args)
    print(f"{len(rows)} queries, {len(passages)} passages")
    answers = positives(rows, passages)
    for model in args.models:
        exact = None
        for dtype in args.dtypes:
            began = time.perf_counter()
            found = measure(model, dtype, rows, passages, answers)
            seconds = time.perf_counter() - began
            exact = exact or found
            difference = compare(exact.mrr, found.mrr, seed=42)
            cosine = (exact.passages * found.passages).sum(axis=1)
            shared = overlap(exact.ranking, found.ranking, answers)
            print(
                f"{model} {dtype}: MRR@10 {found.mrr.mean():.4f}, {difference.mean:+.4f} "
                f"(95% {difference.low:+.4f} .. {difference.high:+.4f}), overlap {shared:.3f}, "
                f"cosine at least {cosine.min():.5f}, 1% {np.quantile(cosine, 0.01):.5f}, mean {cosine.mean():.5f}, "
                f"{seconds:.0f} s",
                flush=True,
            )


def debian(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    return list(records(args.data, "test")), [record["text"] for record in records(args.data, "pool")]


def sample() -> tuple[list[dict], list[str]]:
    lines = {
        name: [json.loads(line) for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines()]
        for name in ("example.jsonl", "example_heldout.jsonl")
    }
    texts = (text for rows in lines.values() for row in rows for text in (*row["pos"], *row.get("neg", ())))
    return lines["example_heldout.jsonl"], list(dict.fromkeys(texts))


def measure(
    model: str, dtype: str, rows: Sequence[dict], passages: Sequence[str], answers: Sequence[set[int]]
) -> Measured:
    encoder = load_encoder(model, EncodingOptions(dtype=dtype), flag="--models")  # type: ignore[arg-type]
    top = TopK(encoder.encode_queries([row["query"] for row in rows]), RANKS)
    blocks = []
    for first, block in encoder.encode_passages(passages):
        top.add(first, block)
        blocks.append(block)
    ranking = top.ranking().positions
    relevant = [dict.fromkeys(positions, 1) for positions in answers]
    return Measured(np.concatenate(blocks), ranking, mrr(relevance_of(ranking, relevant), judged_of(relevant), 10))


def positives(rows: Iterable[dict], passages: Sequence[str]) -> list[set[int]]:
    places = {text: place for place, text in enumerate(passages)}
    return [{places[text] for text in row["pos"]} for row in rows]


def overlap(exact: np.ndarray, other: np.ndarray, relevant: Sequence[set[int]]) -> float:
    """The mean share of the passages in the window of `other` (Q, RANKS), positives aside, that `exact` has there."""
    shares = []
    for positions, ranked, others in zip(relevant, exact[:, WINDOW].tolist(), other[:, WINDOW].tolist(), strict=True):
        mined = set(others) - positions
        shares.append(len(mined & set(ranked)) / len(mined))
    return float(np.mean(shares))


if __name__ == "__main__":
    main()
