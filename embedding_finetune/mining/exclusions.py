"""Which texts must not become negatives of a row, and why. Rows that share a query share what its answers exclude."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.texts import canonical


class Exclusions(Mapping[int, str]):
    """Position -> why it must not become a negative of a row: what holds for all rows of its query, and the row's own.

    own: the row's positives, which of_query holds too, with the reason that other rows have. No row copies of_query: a
    query may have thousands of rows, and answers.
    """

    def __init__(self, of_query: Mapping[int, str], own: Collection[int]) -> None:
        self._of_query = of_query
        self._own = own

    def __getitem__(self, position: int) -> str:
        reason = self._of_query[position]
        return "positive" if position in self._own else reason

    def __contains__(self, position: object) -> bool:
        return position in self._of_query

    def __iter__(self) -> Iterator[int]:
        return iter(self._of_query)

    def __len__(self) -> int:
        return len(self._of_query)


class ExcludedTexts:
    """Texts that must not become a row's negatives: its query, the query's positives in any row, their near-duplicates.

    near_duplicates: (n, 2), positions of a positive and of a passage that is nearly equal to it.

    What is excluded for a row whose query no other row has is put together when it is asked for: most queries are such,
    and a dict for each of them would take a third of what the ranking takes.
    """

    def __init__(self, rows: Sequence[Record], corpus: Corpus, near_duplicates: np.ndarray) -> None:
        self._positives = corpus.positions([text for row in rows for text in row["pos"]])  # (P,), row after row
        self._ends = np.cumsum([0, *(len(row["pos"]) for row in rows)])
        numbers: dict[str, int] = {}
        self._query_numbers = np.array(
            [numbers.setdefault(canonical(row["query"]), len(numbers)) for row in rows], dtype=np.int64
        )
        self._queries = corpus.positions(list(numbers))
        self._near: dict[int, list[int]] = defaultdict(list)
        for positive, passage in near_duplicates.tolist():
            self._near[positive].append(passage)
        self._shared: dict[int, dict[int, str]] = {}  # by the number of a query that several rows have
        several = np.bincount(self._query_numbers)[self._query_numbers] > 1
        answers: dict[int, dict[int, None]] = defaultdict(dict)
        for row in np.flatnonzero(several).tolist():
            answers[int(self._query_numbers[row])].update(dict.fromkeys(self._own(row)))
        for number, positions in answers.items():
            self._shared[number] = self._of_query(number, positions, "positive of the same query in another row")

    def of(self, row: int) -> Mapping[int, str]:
        """The row's excluded texts: position -> reason."""
        number = int(self._query_numbers[row])
        if number in self._shared:
            return Exclusions(self._shared[number], self._own(row))
        return self._of_query(number, self._own(row), "positive")

    def _own(self, row: int) -> list[int]:
        """The positions of the row's positives."""
        return self._positives[self._ends[row] : self._ends[row + 1]].tolist()

    def _of_query(self, number: int, answers: Collection[int], reason: str) -> dict[int, str]:
        """Position -> why it must not become a negative of a query; the answers for this reason."""
        near_answers = (passage for answer in answers for passage in self._near.get(answer, ()))
        excluded = dict.fromkeys(near_answers, "near-duplicate of a positive")
        excluded[int(self._queries[number])] = "the query itself"
        excluded.update(dict.fromkeys(answers, reason))
        excluded.pop(-1, None)  # of texts that the corpus does not hold
        return excluded
