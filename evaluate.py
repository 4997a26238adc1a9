"""Evaluate retrieval: how high does a model rank the right passages, and did finetuning help?

    python evaluate.py \\
        --model_name BAAI/bge-base-en-v1.5 \\
        --index_file_jsonl_path candidate_context.jsonl \\
        --query_file_jsonl_path example.jsonl

With several models after --model_name, all are measured on the same data and each is compared with the first: the
difference, its 95% bootstrap interval, and the p-value of a paired randomisation test over queries, corrected for the
number of measures. bm25 among the models ranks by words, and a+b is the fusion of two. The last line on stdout is the
metrics as a Python dict. The exit status is 1 when the last model fails --fail_below or --fail_if_worse.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embedding_finetune.command_line import command
from embedding_finetune.data.columns import add_columns_argument
from embedding_finetune.data.corpus import read_corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.judgements import add_judgements_arguments, read_judgements
from embedding_finetune.data.task import RetrievalTask, load_task
from embedding_finetune.evaluation.arguments import DEFAULT_CUTOFFS, DEFAULT_MEASURES, EvaluationOptions
from embedding_finetune.evaluation.itself import leave_out_queries, warn_of_queries_among_passages
from embedding_finetune.evaluation.metrics import MEASURES, SIGNIFICANT
from embedding_finetune.parser import add_switch, new_parser, positive_int, seed
from embedding_finetune.process import importing
from embedding_finetune.retrieval.arguments import add_encoding_arguments

if TYPE_CHECKING:
    from embedding_finetune.evaluation.rankings import Rankings

logger = logging.getLogger("embedding_finetune.evaluate")

FAILED_CHECK = 1


@command
def main(argv: Sequence[str] | None = None) -> Record:
    """Rank the corpus for every query under each model, print and return the metrics.

    Returns `{"MRR@1": 0.83, ...}` for one model, `{model name: {"MRR@1": 0.83, ...}, ...}` for several.
    """
    options = parse_arguments(argv)
    task = read_task(options)

    # Heavy imports come after flags and data have been checked.
    with importing():
        from embedding_finetune.distributed import join_process_group, once_in_all, process_rank
        from embedding_finetune.evaluation.rankings import rank_all
        from embedding_finetune.model.pretrained import check_models_are_there
        from embedding_finetune.retrieval.store import tell_size

    join_process_group()
    first_is_loaded_first = options.rankings[0] in options.dense_models
    check_models_are_there(
        options.dense_models[first_is_loaded_first:], flag="--model_name", cache_dir=options.cache_dir
    )
    ranked = rank_all(task, options)
    tell_size(options.embeddings_dir)
    document = measure(ranked, task, options)
    once_in_all(lambda: tell(document, ranked, task, options))
    if process_rank() == 0:
        fail_if_asked(document, options)
    return result_of(document)


def read_task(options: EvaluationOptions) -> RetrievalTask:
    """The queries, the passages, and what answers what, by the data, by --judgements and by --ignore_query_itself."""
    corpus = read_corpus(options.index_file_jsonl_path, options.columns)
    task = load_task(
        options.query_file_jsonl_path,
        corpus,
        options.columns,
        may_lack_answers=options.thresholds,
        judgements=read_judgements(options.judgements),
    )
    if options.ignore_query_itself:
        return leave_out_queries(task)
    warn_of_queries_among_passages(task)
    return task


def measure(ranked: "Rankings", task: RetrievalTask, options: EvaluationOptions) -> Record:
    """All that the rankings say, as metrics.json has it."""
    from embedding_finetune.evaluation.ranking import judged_shares, values_per_query
    from embedding_finetune.evaluation.summary import summarize
    from embedding_finetune.evaluation.thresholds import all_thresholds
    from embedding_finetune.model.encoding_kernels import precision

    values = {
        name: values_per_query(ranking, task, options.measures, options.cutoffs)
        for name, ranking in ranked.by_name.items()
    }
    document = summarize(values, task, options, ranked.weights_digests, ranked.trained_queries)
    if options.judgements:
        document["judged"] = {
            name: judged_shares(ranking, task, options.cutoffs) for name, ranking in ranked.by_name.items()
        }
    if options.thresholds:
        document["thresholds"] = all_thresholds(ranked, task, options)
    document["precision"] = precision(options.dtype) if options.dense_models else None
    document["index_unchanged"] = index_unchanged(ranked.index_digests)
    return {**document, "sizes": ranked.sizes}


def index_unchanged(digests: Mapping[str, str]) -> Record:
    """Model -> the first model, of those that give passages the embeddings that it gives them; digests: of indices."""
    if not digests:  # BM25 alone
        return {}
    first = next(iter(digests))
    return {name: first for name, digest in digests.items() if name != first and digest == digests[first]}


def result_of(document: Record) -> Record:
    """The measures by model, or those of the only one."""
    metrics = document["metrics"]
    return metrics if len(metrics) > 1 else next(iter(metrics.values()))


def tell(document: Record, ranked: "Rankings", task: RetrievalTask, options: EvaluationOptions) -> None:
    """Print the measures, and write the files."""
    from embedding_finetune.evaluation.doubts import doubts_of
    from embedding_finetune.evaluation.files import write_evaluation
    from embedding_finetune.evaluation.summary import evaluation_tables
    from embedding_finetune.retrieval.doubts import write_doubts

    # Printed first: the user sees the metrics even where no file can be written.
    if options.json:
        print(json.dumps(document, ensure_ascii=False))
    else:
        if len(document["metrics"]) > 1 or tells_more(document):
            print(evaluation_tables(document))
        print(result_of(document))
    if options.output_dir is not None:
        write_evaluation(Path(options.output_dir), document, task, ranked.by_name, ranked.of_unanswered)
    if options.doubts_file is not None:
        doubts = doubts_of({name: ranked.by_name[name] for name in options.single_models}, task)
        write_doubts(options.doubts_file, doubts, task.queries, task.corpus.texts)
    if sys.stdout is not None:  # it may be closed
        sys.stdout.flush()


def tells_more(document: Record) -> bool:
    """Whether there is more to tell than one model's measures."""
    return any(document[name] for name in ("groups", "held_out_by", "judged", "thresholds", "sizes"))


def parse_arguments(argv: Sequence[str] | None) -> EvaluationOptions:
    """Parse the flags, and check what can be checked without data."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--model_name",
        required=True,
        nargs="+",
        metavar="NAME",
        help="model folders, hub names or NAME@REVISION, the first of these is the base; bm25 ranks by words, a+b "
        "fuses two",
    )
    parser.add_argument(
        "--index_file_jsonl_path",
        required=True,
        metavar="FILE",
        help='the passages to search, {"context": [str, ...]} or {"text": str} a line, or a BEIR folder',
    )
    parser.add_argument(
        "--query_file_jsonl_path",
        required=True,
        metavar="FILE",
        help='rows {"query": str, "pos": [str, ...]}, optionally with an "id" and a "group"; or a BEIR folder',
    )
    add_columns_argument(parser)
    add_judgements_arguments(parser)
    parser.add_argument(
        "--cutoffs", type=positive_int, nargs="+", default=list(DEFAULT_CUTOFFS), metavar="K", help="the k of @k"
    )
    parser.add_argument(
        "--measures",
        choices=MEASURES,
        nargs="+",
        default=list(DEFAULT_MEASURES),
        help=f"what to measure (default: {' '.join(DEFAULT_MEASURES)})",
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", help="write a report, metrics, per-query results and TREC files there"
    )
    add_switch(parser, "--json", "print one JSON document and nothing else on stdout")
    parser.add_argument(
        "--seed", type=seed, default=EvaluationOptions.seed, metavar="N", help="seed of the significance test"
    )
    parser.add_argument(
        "--fail_below",
        type=limit,
        nargs="+",
        default=[],
        metavar="MEASURE@K=X",
        help="exit with status 1 when the last model is below this, for example MRR@10=0.75",
    )
    add_switch(
        parser,
        "--fail_if_worse",
        "exit with status 1 when the last model is significantly worse than the first on any measure "
        f"(corrected p < {SIGNIFICANT})",
    )
    add_switch(
        parser,
        "--thresholds",
        "also say at which score to answer: the lowest at which the first passage is right for 80, 90 and 95%% of the "
        "questions that reach it, how many do, and what becomes of the first model's thresholds with the last model",
    )
    add_switch(
        parser,
        "--sizes",
        "also measure smaller indices: half the dimensions, a fourth and an eighth, or what --truncate_dim says, and "
        "8, 4 and 1 bit for each, with the bytes of a passage",
    )
    add_switch(
        parser,
        "--ignore_query_itself",
        "leave a passage out of the ranking of the query that has its text, unless it is labelled as an answer to it; "
        "in a BEIR folder also the document with the query's id",
    )
    add_encoding_arguments(parser, several_dimensions=True)
    flags = vars(parser.parse_args(argv))
    flags |= {"cutoffs": sorted(set(flags["cutoffs"])), "measures": list(dict.fromkeys(flags["measures"]))}
    # Embeddings are made once, with the most dimensions that are wanted; --sizes cuts these.
    most, *fewer = sorted(set(flags["truncate_dim"] or []), reverse=True) or [None]
    flags |= {"truncate_dim": most, "smaller_dimensions": fewer}
    options = EvaluationOptions(**flags)
    options.check_paths()
    return options


def limit(text: str) -> tuple[str, float]:
    """`MRR@10=0.75` -> ("MRR@10", 0.75)."""
    match = re.fullmatch(r"(\w+@[0-9]+)=([0-9]*\.?[0-9]+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not MEASURE@K=X, for example MRR@10=0.75")
    if float(match[2]) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: no measure is above 1, for example MRR@10=0.75")
    return match[1], float(match[2])


def fail_if_asked(document: Record, options: EvaluationOptions) -> None:
    """End with status 1, and say why, when the last model does not pass --fail_below or --fail_if_worse."""
    base, last = options.base, options.model_name[-1]
    metrics = document["metrics"][last]
    reasons = [
        f"{name} is {metrics[name]:.4f}, below {limit}" for name, limit in options.fail_below if metrics[name] < limit
    ]
    if options.fail_if_worse:
        reasons += [
            f"{name} is {-difference['mean']:.4f} below that of {base} (p = {difference['p_holm']:.4f})"
            for name, difference in document["differences"][last].items()
            if difference["mean"] < 0 and difference["p_holm"] < SIGNIFICANT
        ]
    for reason in reasons:
        print(f"evaluate.py: failed: {last}: {reason}", file=sys.stderr)
    if reasons:
        raise SystemExit(FAILED_CHECK)


if __name__ == "__main__":
    main()
