"""Evaluate retrieval: how high does a model rank the right passages? MRR and Hit, before and after.

    python evaluate.py \\
        --model_name BAAI/bge-base-en-v1.5 \\
        --index_file_jsonl_path candidate_context.jsonl \\
        --query_file_jsonl_path example.jsonl

With several models after --model_name, all are measured on the same data and compared with the first.
The last line on stdout is the metrics as a Python dict.
"""

import argparse
from collections.abc import Sequence

from embedding_finetune import jsonl
from embedding_finetune.arguments import (
    add_encoding_arguments,
    new_parser,
    positive_int,
)
from embedding_finetune.command_line import command, log_to_stderr
from embedding_finetune.corpus import Corpus, load_task

MEASURES = ("MRR", "Hit")


@command
def main(argv: Sequence[str] | None = None) -> dict:
    """Rank the corpus for every query under each model, print and return the metrics.

    Returns `{"MRR@1": 0.83, ...}` for one model, `{model name: {"MRR@1": 0.83, ...}, ...}` for several.
    """
    args = parse_arguments(argv)
    log_to_stderr()
    task = load_task(args.query_file_jsonl_path, Corpus(jsonl.read_passages(args.index_file_jsonl_path)))

    # Heavy imports wait until flags and data are known to be good.
    from embedding_finetune.encoding import load_encoder
    from embedding_finetune.evaluation import measure
    from embedding_finetune.report import comparison_table
    from embedding_finetune.retrieval import require_gpu

    if args.use_gpu_for_searching:
        require_gpu()
    metrics = {}
    for name in args.model_name:
        encoder = load_encoder(name, args, flag="--model_name")
        metrics[name] = measure(
            encoder, task, measures=args.measures, cutoffs=args.cutoffs, use_gpu=args.use_gpu_for_searching
        )
    if len(metrics) > 1:
        print(comparison_table(metrics))
    result = metrics if len(metrics) > 1 else metrics[args.model_name[0]]
    print(result)
    return result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--model_name",
        required=True,
        nargs="+",
        metavar="NAME",
        help="model folders or hub names, the first is the base",
    )
    parser.add_argument(
        "--index_file_jsonl_path",
        required=True,
        metavar="FILE",
        help='the passages to search, {"context": [str, ...]} or {"text": str} a line',
    )
    parser.add_argument(
        "--query_file_jsonl_path",
        required=True,
        metavar="FILE",
        help='rows {"query": str, "pos": [str, ...]}',
    )
    parser.add_argument(
        "--cutoffs",
        type=positive_int,
        nargs="+",
        default=[1, 5, 10],
        metavar="K",
        help="the k of @k",
    )
    parser.add_argument(
        "--measures",
        choices=MEASURES,
        nargs="+",
        default=list(MEASURES),
        help="what to measure",
    )
    add_encoding_arguments(parser)
    args = parser.parse_args(argv)
    if len(set(args.model_name)) < len(args.model_name):
        parser.error("argument --model_name: the same model is named twice")
    jsonl.require_file("--index_file_jsonl_path", args.index_file_jsonl_path)
    jsonl.require_file("--query_file_jsonl_path", args.query_file_jsonl_path)
    return args


if __name__ == "__main__":
    main()
