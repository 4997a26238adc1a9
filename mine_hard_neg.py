"""Mine hard negatives: give every training row passages that look right to a model, but are not.

    python mine_hard_neg.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 \\
        --input_file example.jsonl \\
        --output_file augmented_example.jsonl \\
        --range_for_sampling 2-10 \\
        --negative_number 5

Every query is searched among the candidates, its positives are taken out, and negatives are chosen
from a range of ranks. Further back in the ranking they are easier: 60-300 is milder than 2-10. An audit
on stderr tells what was chosen, what was left out and why.
"""

import argparse
import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from embedding_finetune import jsonl
from embedding_finetune.arguments import (
    add_encoding_arguments,
    add_mining_output_arguments,
    add_selection_arguments,
    new_parser,
    repeated_model,
)
from embedding_finetune.command_line import UserError, command, log_to_stderr
from embedding_finetune.corpus import Corpus
from embedding_finetune.jsonl import Record, canonical
from embedding_finetune.mining import ScoreFilters, Selection, lowest_scores, row_rng, select_negatives

if TYPE_CHECKING:
    from embedding_finetune.candidates import Candidates, Pairs, Score

logger = logging.getLogger("embedding_finetune.mine_hard_neg")

_ROWS_AT_ONCE = 8192


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Read rows, rank the candidates for each, choose negatives, write the rows, give the audit."""
    began = time.monotonic()
    args = parse_arguments(argv)
    log_to_stderr()
    rows = list(jsonl.read_training_rows(args.input_file))
    corpus = Corpus(candidate_texts(rows, args.candidate_pool), beyond=own_texts(rows, args))
    logger.info("%d rows, %d distinct candidates", len(rows), len(corpus))

    # Heavy imports wait until flags and data are known to be good.
    from embedding_finetune.candidates import rank_candidates
    from embedding_finetune.distributed import rank, start
    from embedding_finetune.reranking import check_reranker

    start()
    if args.reranker_name_or_path is not None:
        check_reranker(args.reranker_name_or_path, args)
    pairs = positive_pairs(rows, corpus)
    found = rank_candidates([row["query"] for row in rows], corpus, pairs, np.unique(pairs.positions), args)
    lowest_positive = lowest_scores(pairs.rows, found.pair_scores, len(rows))
    selections = choose_negatives(rows, corpus, found, lowest_positive, args)
    if args.save_scores:
        selections = with_all_scores(selections, found.score)
    if rank() == 0:
        write_outcome(rows, corpus, found, lowest_positive, selections, args, began)


def write_outcome(
    rows: Sequence[Record],
    corpus: Corpus,
    found: "Candidates",
    lowest_positive: np.ndarray,
    selections: Sequence[Selection],
    args: argparse.Namespace,
    began: float,
) -> None:
    """Write the rows and the audit, and tell it; `began` is when the run did, by time.monotonic."""
    from embedding_finetune.mining_audit import audit_text, examples, mining_audit

    written = [n for n, own in enumerate(selections) if own.negatives or not args.drop_rows_without_negatives]
    if not written:
        raise UserError("no row has a negative: widen --range_for_sampling, or relax the filters")
    positive_scores = np.split(found.pair_scores, np.cumsum([len(row["pos"]) for row in rows])[:-1])
    mined = partial(mined_rows, rows, corpus, selections, positive_scores if args.save_scores else None)
    jsonl.write(args.output_file, mined(written))
    audit = {
        **mining_audit(selections, found.pair_scores, lowest_positive, wanted=args.negative_number),
        "candidates": len(corpus),
        "rows_dropped": len(rows) - len(written),
        "seconds": {**found.seconds, "total": time.monotonic() - began},
        "settings": vars(args),
        "weights_sha256": found.weights,
    }
    if args.report_file is not None:
        with jsonl.atomic_writer(args.report_file) as file:
            file.write(json.dumps(audit, indent=2, ensure_ascii=False).encode() + b"\n")
    if args.show_examples:
        shown = sorted(random.Random(args.seed).sample(written, min(args.show_examples, len(written))))
        logger.info("%s\n", examples(dict(zip(shown, mined(shown)))))
    logger.info("%s", audit_text(audit, wanted=args.negative_number))
    logger.info("wrote %s", args.output_file)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--model_name_or_path",
        required=True,
        nargs="+",
        metavar="NAME",
        help="model folder or hub name; with several, their rankings are fused, and the first one's scores count",
    )
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
        "--reranker_name_or_path", metavar="NAME", help="a cross-encoder whose scores replace the model's"
    )
    add_selection_arguments(parser)
    add_mining_output_arguments(parser)
    add_encoding_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2 and a line that names the flag where flags contradict each other or files are missing."""
    if args.max_score is not None and args.min_score is not None and args.max_score < args.min_score:
        parser.error(f"argument --max_score: {args.max_score} is below --min_score {args.min_score}")
    if (repeated := repeated_model(args.model_name_or_path)) is not None:
        parser.error(f"argument --model_name_or_path: the same model is named twice, as {repeated}")
    jsonl.require_file("--input_file", args.input_file)
    if args.candidate_pool is not None:
        jsonl.require_file("--candidate_pool", args.candidate_pool)
    jsonl.require_writable("--output_file", args.output_file)
    if args.report_file is not None:
        jsonl.require_writable("--report_file", args.report_file)
    if args.embeddings_dir is not None:
        jsonl.require_folder("--embeddings_dir", args.embeddings_dir)


def candidate_texts(rows: Sequence[Record], candidate_pool: str | None) -> Iterator[str]:
    """The texts that may become negatives, in first-seen order, repeats included."""
    if candidate_pool is not None:
        yield from jsonl.read_passages(candidate_pool)
    else:
        for row in rows:
            yield from row["pos"]
            yield from row.get("neg", ())


def own_texts(rows: Sequence[Record], args: argparse.Namespace) -> Iterator[str]:
    """The texts of the rows that have to be known, whether the pool holds them or not."""
    for row in rows:
        yield from row["pos"]
        if args.keep_existing_negatives:
            yield from row.get("neg", ())


def positive_pairs(rows: Sequence[Record], corpus: Corpus) -> "Pairs":
    """Row number and position of every positive (P,), row by row."""
    from embedding_finetune.candidates import Pairs

    positions = corpus.positions([text for row in rows for text in row["pos"]])
    return Pairs(np.repeat(np.arange(len(rows)), [len(row["pos"]) for row in rows]), positions)


def choose_negatives(
    rows: Sequence[Record],
    corpus: Corpus,
    found: "Candidates",
    lowest_positive: np.ndarray,
    args: argparse.Namespace,
) -> list[Selection]:
    """Every row's negatives."""
    filters = ScoreFilters(args.max_score, args.min_score, args.absolute_margin, args.relative_margin)
    known = known_texts(rows, corpus, found.near_duplicates)
    selections = []
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        scores = found.window_scores[part]
        refused_by = filters.refusals(scores, lowest_positive[part])
        lists = zip(rows[part], found.ranking[part].tolist(), scores.tolist(), refused_by.tolist())
        for number, (row, ranking, row_scores, refused) in enumerate(lists, start=first):
            excluded = next(known)
            existing = row.get("neg", ()) if args.keep_existing_negatives else ()
            kept = dict.fromkeys(p for p in corpus.positions(existing).tolist() if p not in excluded)
            selection = select_negatives(
                ranking,
                row_scores,
                refused,
                window=args.range_for_sampling,
                count=args.negative_number,
                excluded=excluded,
                corpus_size=len(corpus),
                rng=row_rng(args.seed, number),
                strategy=args.sampling_strategy,
                kept=list(kept),
            )
            if len(kept) < len(existing):
                selection.dropped["negatives of the input that are positives or repeats"] += len(existing) - len(kept)
            selections.append(selection)
    return selections


def known_texts(rows: Sequence[Record], corpus: Corpus, near_duplicates: np.ndarray) -> Iterator[Mapping[int, str]]:
    """Row by row, position -> reason for every text that must not become a negative.

    These are the query, its positives in any row, and what nearly equals one of those: near_duplicates (n, 2).
    """
    own = [corpus.positions(row["pos"]).tolist() for row in rows]
    queries = corpus.positions([row["query"] for row in rows]).tolist()
    answers: dict[str, dict[int, None]] = defaultdict(dict)
    for row, positions in zip(rows, own):
        answers[canonical(row["query"])].update(dict.fromkeys(positions))
    near: dict[int, list[int]] = defaultdict(list)
    for positive, passage in near_duplicates.tolist():
        near[positive].append(passage)
    for row, query, positions in zip(rows, queries, own):
        same_query = answers[canonical(row["query"])]
        excluded = {passage: "near-duplicate of a positive" for positive in same_query for passage in near[positive]}
        excluded[query] = "the query itself"
        excluded.update(dict.fromkeys(same_query, "positive of the same query in another row"))
        excluded.update(dict.fromkeys(positions, "positive"))
        excluded.pop(-1, None)  # not among the texts
        yield excluded


def with_all_scores(selections: Sequence[Selection], score: "Score") -> list[Selection]:
    """The selections with the scores filled in that retrieval did not give: of kept and random negatives."""
    from embedding_finetune.candidates import Pairs

    missing = [
        (row, place)
        for row, selection in enumerate(selections)
        for place, known in enumerate(np.isfinite(selection.scores).tolist())
        if not known
    ]
    pairs = np.array([(row, selections[row].negatives[place]) for row, place in missing], dtype=np.int64).reshape(-1, 2)
    scores = score(Pairs(pairs[:, 0], pairs[:, 1])).tolist()
    for (row, place), value in zip(missing, scores):
        selections[row].scores[place] = value
    return list(selections)


def mined_rows(
    rows: Sequence[Record],
    corpus: Corpus,
    selections: Sequence[Selection],
    positive_scores: Sequence[np.ndarray] | None,
    numbers: Sequence[int],
) -> Iterator[Record]:
    """The rows of these numbers with their new negatives.

    Scores of the old ones, if there were any, go with them; new ones are there where positive_scores are given.
    """
    for number in numbers:
        row, selection = rows[number], selections[number]
        kept = {name: value for name, value in row.items() if name not in ("pos_scores", "neg_scores")}
        mined = {**kept, "neg": [corpus.texts[position] for position in selection.negatives]}
        if positive_scores is not None:
            mined["pos_scores"] = [round(score, 6) for score in positive_scores[number].tolist()]
            mined["neg_scores"] = [round(score, 6) for score in selection.scores]
        yield mined


if __name__ == "__main__":
    main()
