"""Rows whose positives are one another's mined negatives, put into one batch.

In a batch of such rows the negatives that come for nothing, the other rows' positives, are hard ones: what topic-aware
sampling (TAS-B, arXiv:2104.06967) does with clusters of queries, done with what mining found.
"""

import logging
from collections.abc import Iterable

import datasets
import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.jsonl import text_id

logger = logging.getLogger(__name__)


class Neighbours:
    """Row -> the rows whose positives are among its negatives, in the order of these.

    negative_ids, positive_ids: for each row the jsonl.text_id of its texts; a text is its first row's.
    most: how many neighbours may follow a row into its batch.
    """

    def __init__(self, negative_ids: Iterable[Iterable[int]], positive_ids: Iterable[Iterable[int]], *, most: int):
        self.most = most
        row_of: dict[int, int] = {}
        for row, ids in enumerate(positive_ids):
            for text in ids:
                row_of.setdefault(text, row)
        self.rows: list[int] = []  # of all rows, one after the other
        self.starts = [0]  # (rows + 1,): where each row's part begins
        for ids in negative_ids:
            self.rows += dict.fromkeys(row_of[text] for text in ids if text in row_of)
            self.starts.append(len(self.rows))

    def of(self, row: int) -> list[int]:
        return self.rows[self.starts[row] : self.starts[row + 1]]

    def count(self) -> int:
        """How many rows have neighbours."""
        return int(np.count_nonzero(np.diff(self.starts)))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All rows once, in groups of a row and up to `most` of its neighbours, the groups shuffled: (rows,) int64.

        Rows are drawn at random, each takes the first of its neighbours that no row has taken yet. Groups that are
        drawn late find few left, so that the groups are shuffled again in the end.
        """
        taken = np.zeros(len(self.starts) - 1, dtype=bool)
        groups = []
        for row in rng.permutation(len(taken)).tolist():
            if taken[row]:
                continue
            taken[row] = True
            near = [other for other in self.of(row) if not taken[other]][: self.most]
            taken[near] = True
            groups.append([row, *near])
        return np.array([row for place in rng.permutation(len(groups)) for row in groups[place]], dtype=np.int64)


def find_neighbours(rows: datasets.Dataset, *, most: int) -> Neighbours:
    """The neighbours in the rows that data.load_rows gave. Raises UserError when there are none."""
    negative_ids = ([text_id(text) for text in texts] for texts in rows["neg"])
    neighbours = Neighbours(negative_ids, rows["pos_ids"], most=most)
    count = neighbours.count()
    if not count:
        raise UserError(
            "--neighbours_in_batch: no row's negatives are positives of other rows; mine them with mine_hard_neg.py "
            "among the rows' own passages, or leave the flag out"
        )
    logger.info("%d of %d rows have negatives that are positives of other rows", count, len(rows))
    return neighbours
