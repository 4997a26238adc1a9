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

import numpy as np

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
    from embedding_finetune.distributed import own_gpu, rank, start
    from embedding_finetune.encoding import load_encoder
    from embedding_finetune.report import mining_account
    from embedding_finetune.retrieval import PairScores, TopK, gpus_to_search_on
    from embedding_finetune.search import encode_own_passages, encode_queries, merge_rankings, merge_scores

    start()
    gpus = gpus_to_search_on(own_gpu()) if args.use_gpu_for_searching else ()
    encoder = load_encoder(args.model_name_or_path, args, flag="--model_name_or_path")
    queries = encode_queries(encoder, [row["query"] for row in rows])
    ranking = TopK(queries, args.range_for_sampling[1], gpus=gpus)
    # Positives that the pool does not hold are scored for the account, but cannot be retrieved.
    outside = Corpus(missing_positives(rows, corpus))
    positives = PairScores(queries, *positive_pairs(rows, corpus, outside))
    for first, block in encode_own_passages(encoder, corpus.texts):
        ranking.add(first, block)
        positives.add(first, block)
    for first, block in encode_own_passages(encoder, outside.texts):
        positives.add(len(corpus) + first, block)
    merge_rankings(ranking)
    merge_scores(positives)
    if rank() > 0:
        return

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
    if args.embeddings_dir is not None:
        jsonl.require_folder("--embeddings_dir", args.embeddings_dir)
    return args


def candidate_texts(rows: Sequence[Record], candidate_pool: str | None) -> Iterator[str]:
    """The texts that may become negatives, in first-seen order, repeats included."""
    if candidate_pool is not None:
        yield from jsonl.read_passages(candidate_pool)
    else:
        for row in rows:
            yield from row["pos"]
            yield from row.get("neg", ())


def missing_positives(rows: Sequence[Record], corpus: Corpus) -> Iterator[str]:
    """The positives that the corpus does not hold."""
    for row in rows:
        positions = corpus.positions(row["pos"])
        yield from (text for text, position in zip(row["pos"], positions) if position < 0)


def positive_pairs(rows: Sequence[Record], corpus: Corpus, outside: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Row number and position of every positive (P,); those outside the corpus are numbered on from its end."""
    texts = [text for row in rows for text in row["pos"]]
    positions = corpus.positions(texts)
    absent = np.flatnonzero(positions < 0)
    positions[absent] = len(corpus) + outside.positions([texts[pair] for pair in absent])
    return np.repeat(np.arange(len(rows)), [len(row["pos"]) for row in rows]), positions


def choose_negatives(
    rows: Sequence[Record], corpus: Corpus, ranking: Sequence[Sequence[int]], args: argparse.Namespace
) -> list[Selection]:
    """Every row's negatives. A positive of any row with the same query is never one, nor the query itself."""
    own = [corpus.positions(row["pos"]).tolist() for row in rows]
    queries = corpus.positions([row["query"] for row in rows]).tolist()
    answers: dict[str, dict[int, None]] = defaultdict(dict)
    for row, positions in zip(rows, own):
        answers[canonical(row["query"])].update(dict.fromkeys(positions))
    selections = []
    for number, row in enumerate(rows):
        excluded = {
            queries[number]: "the query itself",
            **dict.fromkeys(answers[canonical(row["query"])], "positive of the same query in another row"),
            **dict.fromkeys(own[number], "positive"),
        }
        excluded.pop(-1, None)  # not in the corpus
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
