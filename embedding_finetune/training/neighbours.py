"""Rows whose positives are one another's mined negatives, put into one batch.

In such a batch the other rows' positives, which are encoded anyway, are hard negatives. Topic-aware sampling (TAS-B,
arXiv:2104.06967) gets them from clusters of queries; here they come from mining.

Shapes: R rows, P positives of all rows, N neighbours of all rows.
"""

import logging

import datasets
import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.data.texts import text_id
from embedding_finetune.training.row_columns import flatten_column

logger = logging.getLogger(__name__)


class Neighbours:
    """Row -> the rows whose positives are among its negatives, in the order of these; a positive is its first row's.

    rows: as rows.load_rows gives them. most: how many neighbours may follow a row into its batch. files: (R,), the
    number of each row's file, where only rows of one file may be neighbours. Raises UserError when no row has any.
    """

    def __init__(self, rows: datasets.Dataset, *, most: int, files: np.ndarray | None = None) -> None:
        self.most = most
        row_numbers, positive_ids = flatten_column(rows, "pos_ids")
        positives, first = np.unique(positive_ids, return_index=True)  # (P,) each
        owners = row_numbers[first]  # (P,), the first row that has it
        files = np.zeros(len(rows), dtype=np.int32) if files is None else files
        neighbours, counts, begin = [], [], 0
        for table in rows.select_columns(["neg"]).with_format("arrow").iter(batch_size=10_000):
            negatives = table["neg"].combine_chunks()
            ids = np.fromiter(map(text_id, negatives.flatten().to_pylist()), np.int64)
            row = np.repeat(np.arange(len(negatives)), negatives.value_lengths().to_numpy())
            places = np.searchsorted(positives, ids).clip(max=len(positives) - 1)
            known = (positives[places] == ids) & (files[owners[places]] == files[begin + row])
            begin += len(negatives)
            neighbours.append(owners[places[known]])
            counts.append(np.bincount(row[known], minlength=len(negatives)))
        self.rows = np.concatenate(neighbours)  # (N,), those of the first row, then those of the second, ...
        self.starts = np.concatenate([[0], np.concatenate(counts).cumsum()])  # (R + 1,), where each row's begin
        having = np.count_nonzero(np.diff(self.starts))
        if not having:
            raise UserError(
                "--neighbours_in_batch: no row's negatives are positives of other rows; mine them with "
                "mine_hard_neg.py among the rows' own passages, or leave the flag out"
            )
        logger.info("%d of %d rows have negatives that are positives of other rows", having, len(rows))

    def of(self, row: int) -> list[int]:
        """The neighbours of a row, each once."""
        return list(dict.fromkeys(self.rows[self.starts[row] : self.starts[row + 1]].tolist()))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All rows once, in groups of a row and up to `most` of its neighbours: (R,) int64.

        Rows are drawn at random. Each takes the first of its neighbours that no row has taken yet. Rows drawn late find
        few left, so the groups are shuffled again in the end.
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
