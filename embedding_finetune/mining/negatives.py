"""Mining from rows to negatives: rank the candidates, choose, score what was kept or drawn at random, and the audit.

mine_hard_neg.py and finetune.py --mining_rounds both mine here. Under torchrun all processes call each function
together, and get the same result.

Shapes: P pairs of a row and one of its positives; Q rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embedding_finetune import __version__
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.mining.arguments import RankingOptions, SelectionOptions
from embedding_finetune.mining.audit import mining_audit
from embedding_finetune.mining.candidates import Score
from embedding_finetune.mining.choice import Selection, lowest_scores
from embedding_finetune.mining.ranking import rank_candidates
from embedding_finetune.mining.selection import choose_negatives, positive_pairs
from embedding_finetune.mining.stopwatch import Stopwatch
from embedding_finetune.process import give_back_free_memory
from embedding_finetune.retrieval.doubts import Witness


class Mined(NamedTuple):
    """Each row's negatives, and the scores beside them.

    selections: one a row. positive_scores: (P,), row after row. lowest_positive: (Q,), the score of each row's
    lowest-scoring positive. score: scores other pairs. weights_digests: by the models' names.
    witnesses: as in Candidates.
    """

    selections: list[Selection]
    positive_scores: np.ndarray
    lowest_positive: np.ndarray
    score: Score
    weights_digests: dict[str, str]
    witnesses: dict[str, Witness]

    def audit(self, corpus: Corpus, options: SelectionOptions, stopwatch: Stopwatch, *, dropped: int = 0) -> Record:
        """The audit of the run, as audit_text reads it. dropped: how many rows are not written.

        options: those to be told, all of mine_hard_neg.py's or the choice's alone.
        """
        return {
            **mining_audit(self.selections, self.positive_scores, self.lowest_positive, wanted=options.negative_number),
            "candidates": len(corpus),
            "rows_dropped": dropped,
            "seconds": {**stopwatch.seconds, "total": stopwatch.total},
            "version": __version__,
            "settings": vars(options),
            "weights_sha256": self.weights_digests,
        }


def mine_negatives(
    rows: Sequence[Record],
    corpus: Corpus,
    options: RankingOptions,
    stopwatch: Stopwatch,
    *,
    confirmed: Sequence[int] | None = None,
    scratch: str | None = None,
) -> Mined:
    """Rank the corpus for every row, and choose its negatives, as the flags say.

    rows: training rows. corpus: the candidates, and beyond them the other texts of the rows. confirmed: as in
    choose_negatives. scratch: as in rank_candidates.
    """
    pairs = positive_pairs(rows, corpus)
    candidates = rank_candidates(
        [row["query"] for row in rows],
        corpus,
        pairs,
        np.unique(pairs.positions),
        options,
        stopwatch,
        [row.get("instruction") for row in rows],
        scratch=scratch,
    )
    give_back_free_memory()  # that of encoding and searching: choosing makes many small objects
    lowest_positive = lowest_scores(pairs.rows, candidates.pair_scores, len(rows))
    selections = choose_negatives(rows, corpus, candidates, lowest_positive, options, stopwatch, confirmed)
    return Mined(
        selections,
        candidates.pair_scores,
        lowest_positive,
        candidates.score,
        candidates.weights_digests,
        candidates.witnesses,
    )
