"""Mine hard negatives: give every training row passages that look right to a model, but are not.

    python mine_hard_neg.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 \\
        --input_file example.jsonl \\
        --output_file augmented_example.jsonl \\
        --range_for_sampling 2-10 \\
        --negative_number 5

Candidates are ranked for each query, its positives are taken out, and negatives are chosen from a range
of ranks. Ranks further down give easier negatives: 60-300 is milder than 2-10. An audit on stderr counts
what was chosen, and what was left out and why.
"""

import json
import logging
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from embedding_finetune import files
from embedding_finetune.command_line import UserError, command
from embedding_finetune.data.columns import add_columns_argument
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.formats import schema_to_write, write
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.judgements import add_judgements_arguments, read_judgements, settle_rows
from embedding_finetune.data.records import SCORE_FIELDS, read_passages, read_training_rows
from embedding_finetune.mining.arguments import MiningOptions, add_mining_output_arguments, add_selection_arguments
from embedding_finetune.mining.choice import Selection
from embedding_finetune.mining.stopwatch import Stopwatch
from embedding_finetune.parser import new_parser
from embedding_finetune.process import importing
from embedding_finetune.retrieval.arguments import add_encoding_arguments

if TYPE_CHECKING:
    import pyarrow as pa

    from embedding_finetune.mining.negatives import Mined

logger = logging.getLogger("embedding_finetune.mine_hard_neg")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Read rows, rank the candidates for each, choose negatives, write the rows, log the audit."""
    stopwatch = Stopwatch()
    options = parse_arguments(argv)
    rows, confirmed = read_rows(options)
    columns_to_write(rows, options)  # tells in time where a column cannot hold what the rows have
    corpus = Corpus(candidate_texts(rows, options), beyond=required_texts(rows, confirmed, options))
    logger.info("%d rows, %d distinct candidates", len(rows), len(corpus))
    stopwatch.lap("read")

    # Heavy imports come after flags and data have been checked.
    with importing():
        from embedding_finetune.distributed import join_process_group, once_in_all
        from embedding_finetune.mining.negatives import mine_negatives
        from embedding_finetune.mining.selection import fill_in_scores
        from embedding_finetune.model.pretrained import check_models_are_there
        from embedding_finetune.retrieval.reranker import check_reranker
        from embedding_finetune.retrieval.store import tell_size

    join_process_group()
    check_models_are_there(options.dense_models[1:], flag="--model_name_or_path", cache_dir=options.cache_dir)
    if options.reranker_name_or_path is not None:
        check_reranker(options.reranker_name_or_path, options)
    mined = mine_negatives(rows, corpus, options, stopwatch, confirmed=confirmed)
    if options.save_scores:
        fill_in_scores(mined.selections, mined.score)
    tell_size(options.embeddings_dir)
    once_in_all(lambda: write_outcome(rows, corpus, mined, options, stopwatch))
    if options.doubts_file is not None:
        once_in_all(lambda: write_doubts_of(rows, confirmed, corpus, mined, options))


def write_outcome(
    rows: Sequence[Record], corpus: Corpus, mined: "Mined", options: MiningOptions, stopwatch: Stopwatch
) -> None:
    """Write the rows and the audit, and log the audit."""
    from embedding_finetune.mining.audit import audit_text, examples
    from embedding_finetune.model.encoding_kernels import precision

    keep_all = not options.drop_rows_without_negatives
    written = [number for number, selection in enumerate(mined.selections) if selection.negatives or keep_all]
    if not written:
        raise UserError("no row has a negative: widen --range_for_sampling, or relax the filters")
    positive_scores = None
    if options.save_scores:
        positive_scores = np.split(mined.positive_scores, np.cumsum([len(row["pos"]) for row in rows])[:-1])
    to_write = partial(mined_rows, rows, corpus, mined.selections, positive_scores)
    write(options.output_file, to_write(written), columns_to_write(rows, options))
    stopwatch.lap("write")
    audit = mined.audit(corpus, options, stopwatch, dropped=len(rows) - len(written))
    audit["precision"] = precision(options.dtype) if options.dense_models else None
    if options.report_file is not None:
        with files.atomic_writer(options.report_file) as file:
            file.write(json.dumps(audit, indent=2, ensure_ascii=False).encode() + b"\n")
    if options.show_examples:
        drawn = sorted(random.Random(options.seed).sample(written, min(options.show_examples, len(written))))
        logger.info("%s\n", examples(dict(zip(drawn, to_write(drawn)))))
    logger.info("%s", audit_text(audit, wanted=options.negative_number))
    logger.info("wrote %s", options.output_file)


def write_doubts_of(
    rows: Sequence[Record], confirmed: Sequence[int], corpus: Corpus, mined: "Mined", options: MiningOptions
) -> None:
    """Write --doubts_file."""
    from embedding_finetune.mining.doubts import doubts_of
    from embedding_finetune.retrieval.doubts import write_doubts

    doubts = doubts_of(rows, confirmed, corpus, mined)
    write_doubts(str(options.doubts_file), doubts, [row["query"] for row in rows], corpus.texts)


def parse_arguments(argv: Sequence[str] | None) -> MiningOptions:
    """Parse the flags, and check what can be checked without data."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--model_name_or_path",
        required=True,
        nargs="+",
        metavar="NAME",
        help="model folder, hub name or NAME@REVISION; with several, their rankings are fused, and the first one's "
        "scores count",
    )
    parser.add_argument(
        "--input_file", required=True, metavar="FILE", help='rows {"query": str, "pos": [str, ...]}, or a BEIR folder'
    )
    parser.add_argument(
        "--output_file", required=True, metavar="FILE", help='where to write the rows with "neg": [str, ...]'
    )
    parser.add_argument(
        "--candidate_pool",
        metavar="FILE",
        help='texts to mine from, {"text": str} or {"context": [str, ...]} a line, or a BEIR folder '
        '(default: every "pos" and "neg" of the input file)',
    )
    add_columns_argument(parser)
    parser.add_argument(
        "--reranker_name_or_path", metavar="NAME", help="a cross-encoder whose scores replace the model's"
    )
    add_judgements_arguments(parser)
    add_selection_arguments(parser)
    add_mining_output_arguments(parser)
    add_encoding_arguments(parser)
    options = MiningOptions(**vars(parser.parse_args(argv)))
    options.check_paths()
    return options


def read_rows(options: MiningOptions) -> tuple[list[Record], list[int]]:
    """The rows of --input_file as judged, and how many of the first "neg" of each are confirmed by --judgements.

    Log lines say which fields mining does not use, and whether scores are dropped.
    """
    rows = list(read_training_rows(options.input_file, options.columns, known=SCORE_FIELDS, others_are_kept=True))
    scored = sum(any(row.get(field) is not None for field in SCORE_FIELDS) for row in rows)
    if scored and not options.save_scores:
        logger.info(
            "%s: scores in %d rows are left out: they belong to the old negatives; --save_scores writes new ones",
            options.input_file,
            scored,
        )
    settled = list(settle_rows(rows, read_judgements(options.judgements), options.input_file))
    return [row for row, _ in settled], [confirmed for _, confirmed in settled]


def columns_to_write(rows: Sequence[Record], options: MiningOptions) -> "pa.Schema | None":
    """The columns of an --output_file that is parquet, in the order of the rows' fields; None for JSON Lines."""
    kept = dict.fromkeys(name for row in rows for name in row if name not in SCORE_FIELDS)
    names = dict.fromkeys([*kept, "neg", *(SCORE_FIELDS if options.save_scores else ())])
    return schema_to_write(options.output_file, rows, names, source=options.input_file)


def candidate_texts(rows: Sequence[Record], options: MiningOptions) -> Iterator[str]:
    """The texts that may become negatives, in first-seen order, repeats included."""
    if options.candidate_pool is not None:
        yield from read_passages(options.candidate_pool, options.columns)
    else:
        for row in rows:
            yield from row["pos"]
            yield from row.get("neg", ())


def required_texts(rows: Sequence[Record], confirmed: Sequence[int], options: MiningOptions) -> Iterator[str]:
    """The texts of the rows that the corpus must hold, also where the pool does not."""
    for row, count in zip(rows, confirmed):
        yield from row["pos"]
        yield from row.get("neg", ()) if options.keep_existing_negatives else row.get("neg", [])[:count]


def mined_rows(
    rows: Sequence[Record],
    corpus: Corpus,
    selections: Sequence[Selection],
    positive_scores: Sequence[np.ndarray] | None,
    numbers: Sequence[int],
) -> Iterator[Record]:
    """The rows with these numbers, with their new negatives.

    Old scores are dropped; new ones are added when positive_scores is given.
    """
    for number in numbers:
        row, selection = rows[number], selections[number]
        fields = {name: value for name, value in row.items() if name not in SCORE_FIELDS}
        mined = {**fields, "neg": [corpus.texts[position] for position in selection.negatives]}
        if positive_scores is not None:
            mined["pos_scores"] = [round(score, 6) for score in positive_scores[number].tolist()]
            mined["neg_scores"] = [round(score, 6) for score in selection.scores]
        yield mined


if __name__ == "__main__":
    main()
