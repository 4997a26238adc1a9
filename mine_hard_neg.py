"""Mine hard negatives: give every training row passages that look right to a model, but are not.

    python mine_hard_neg.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 \\
        --input_file example.jsonl \\
        --output_file augmented_example.jsonl \\
        --range_for_sampling 2-10 \\
        --negative_number 5

Every query is searched among the candidates, its positives are taken out, and negatives are sampled
from a range of ranks. Further back in the ranking they are easier: 60-300 is milder than 2-10.
"""

import argparse
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

from embedding_finetune import jsonl
from embedding_finetune.arguments import add_encoding_arguments, new_parser, positive_int, rank_range
from embedding_finetune.command_line import command, log_to_stderr
from embedding_finetune.corpus import Corpus
from embedding_finetune.jsonl import Record, canonical
from embedding_finetune.mining import Selection, row_rng, select_negatives

logger = logging.getLogger("embedding_finetune.mine_hard_neg")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Read rows, rank the candidates for each, choose negatives, write the rows, give the account."""
    began = time.monotonic()
    args = parse_arguments(argv)
    log_to_stderr()
    rows = list(jsonl.read_training_rows(args.input_file))
    corpus = Corpus(candidate_texts(rows, args.candidate_pool))
    logger.info("%d rows, %d distinct candidates", len(rows), len(corpus))

    # Heavy imports wait until flags and data are known to be good.
    from embedding_finetune.encoding import load_encoder
    from embedding_finetune.report import mining_account
    from embedding_finetune.retrieval import PairScores, TopK, require_gpu

    if args.use_gpu_for_searching:
        require_gpu()
    encoder = load_encoder(args.model_name_or_path, args, flag="--model_name_or_path")
    queries = encoder.encode_queries([row["query"] for row in rows])
    ranking = TopK(queries, args.range_for_sampling[1], use_gpu=args.use_gpu_for_searching)
    # Positives that the pool does not hold are scored for the account, but cannot be retrieved.
    outside = Corpus(text for row in rows for text in row["pos"] if corpus.position(text) is None)
    positives = PairScores(queries, *positive_pairs(rows, corpus, outside))
    for start, block in encoder.encode_passages(corpus.texts):
        ranking.add(start, block)
        positives.add(start, block)
    for start, block in encoder.encode_passages(outside.texts):
        positives.add(len(corpus) + start, block)

    selections = choose_negatives(rows, corpus, ranking.positions, args)
    jsonl.write(args.output_file, with_negatives(rows, corpus, selections))
    logger.info("%s", mining_account(selections, args.negative_number, ranking, positives.scores))
    logger.info("wrote %s in %.1f s", args.output_file, time.monotonic() - began)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data."""
    parser = new_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, metavar="NAME", help="model folder or hub name")
    parser.add_argument("--input_file", required=True, metavar="FILE", help='rows {"query": str, "pos": [str, ...]}')
    parser.add_argument(
        "--output_file", required=True, metavar="FILE", help='where to write the rows with "neg": [str, ...]'
    )
    parser.add_argument(
        "--candidate_pool",
        metavar="FILE",
        help='texts to mine from, {"text": str} or {"context": [str, ...]} a line '
        '(default: every "pos" and "neg" of the input file)',
    )
    parser.add_argument(
        "--range_for_sampling",
        type=rank_range,
        default="10-210",
        metavar="A-B",
        help="sample from the ranks [A, B) of each query's ranking, counted from 0",
    )
    parser.add_argument("--negative_number", type=positive_int, default=15, metavar="N", help="negatives per row")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the sampling")
    add_encoding_arguments(parser)
    args = parser.parse_args(argv)
    jsonl.require_file("--input_file", args.input_file)
    if args.candidate_pool is not None:
        jsonl.require_file("--candidate_pool", args.candidate_pool)
    jsonl.require_writable("--output_file", args.output_file)
    return args


def candidate_texts(rows: Sequence[Record], candidate_pool: str | None) -> Iterator[str]:
    """The texts that may become negatives, in first-seen order, repeats included."""
    if candidate_pool is not None:
        yield from jsonl.read_passages(candidate_pool)
    else:
        for row in rows:
            yield from row["pos"]
            yield from row.get("neg", ())


def positive_pairs(rows: Sequence[Record], corpus: Corpus, outside: Corpus) -> tuple[list[int], list[int]]:
    """Row number and position of every positive; those outside the corpus are numbered on from its end."""
    pairs: tuple[list[int], list[int]] = ([], [])
    for number, row in enumerate(rows):
        for text in row["pos"]:
            position = corpus.position(text)
            pairs[0].append(number)
            pairs[1].append(len(corpus) + outside.position(text) if position is None else position)
    return pairs


def choose_negatives(
    rows: Sequence[Record], corpus: Corpus, ranking: Sequence[Sequence[int]], args: argparse.Namespace
) -> list[Selection]:
    """Every row's negatives. A positive of any row with the same query is never one, nor the query itself."""
    answers: dict[str, dict[int, None]] = defaultdict(dict)
    own = [[corpus.position(text) for text in row["pos"]] for row in rows]
    for row, positions in zip(rows, own):
        answers[canonical(row["query"])].update(dict.fromkeys(positions))
    selections = []
    for number, row in enumerate(rows):
        excluded = {
            corpus.position(row["query"]): "the query itself",
            **dict.fromkeys(answers[canonical(row["query"])], "positive of the same query in another row"),
            **dict.fromkeys(own[number], "positive"),
        }
        excluded.pop(None, None)
        selections.append(
            select_negatives(
                ranking[number].tolist(),
                window=args.range_for_sampling,
                count=args.negative_number,
                excluded=excluded,
                corpus_size=len(corpus),
                rng=row_rng(args.seed, number),
            )
        )
    return selections


def with_negatives(rows: Sequence[Record], corpus: Corpus, selections: Sequence[Selection]) -> Iterator[Record]:
    """The rows with their new negatives; scores of the old ones, if there were any, are dropped with them."""
    for row, selection in zip(rows, selections):
        kept = {name: value for name, value in row.items() if name not in ("pos_scores", "neg_scores")}
        yield {**kept, "neg": [corpus.texts[position] for position in selection.negatives]}


if __name__ == "__main__":
    main()
