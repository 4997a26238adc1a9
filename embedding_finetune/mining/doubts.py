"""Which candidates may be answers that nobody labelled, by what mining knows of them.

Shapes: Q rows, P pairs of a row and one of its positives.
"""

from collections import ChainMap
from collections.abc import Sequence

import numpy as np

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.mining.exclusions import ExcludedTexts
from embedding_finetune.mining.negatives import Mined
from embedding_finetune.mining.selection import positive_pairs
from embedding_finetune.retrieval.doubts import Doubt, find_doubts


def doubts_of(rows: Sequence[Record], confirmed: Sequence[int], corpus: Corpus, mined: Mined) -> list[Doubt]:
    """The doubts of all rows.

    Of several positives that which scores highest stands beside a doubt. confirmed: as in choose_negatives.
    """
    pairs = positive_pairs(rows, corpus)
    order = np.lexsort((-mined.positive_scores, pairs.rows))
    best = order[np.searchsorted(pairs.rows, np.arange(len(rows)))]  # (Q,), the pair of each row; rows ascend
    witnesses = {
        name: witness._replace(positive_scores=witness.positive_scores[best])
        for name, witness in mined.witnesses.items()
    }
    excluded = ExcludedTexts(rows, corpus, np.empty((0, 2), dtype=np.int64))

    def settled(row: int) -> ChainMap[int, str]:
        judged = rows[row].get("neg", [])[: confirmed[row]]
        known = dict.fromkeys(corpus.positions(judged).tolist(), "judged")
        return ChainMap(known, excluded.of(row))  # type: ignore[arg-type]  # nothing is written to it

    return find_doubts(witnesses, pairs.positions[best].tolist(), settled)
