"""Which texts must not become negatives of a row, and why. Rows that share a query share what its answers exclude."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

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
    """

    def __init__(self, rows: Sequence[Record], corpus: Corpus, near_duplicates: np.ndarray) -> None:
        self._positives = [corpus.positions(row["pos"]).tolist() for row in rows]
        numbers: dict[str, int] = {}
        self._query_numbers = [numbers.setdefault(canonical(row["query"]), len(numbers)) for row in rows]
        answers: list[dict[int, None]] = [{} for _ in numbers]
        for number, positions in zip(self._query_numbers, self._positives):
            answers[number].update(dict.fromkeys(positions))
        near: dict[int, list[int]] = defaultdict(list)
        for positive, passage in near_duplicates.tolist():
            near[positive].append(passage)
        self._of_queries = [
            self._of_query(position, positions, near)
            for position, positions in zip(corpus.positions(list(numbers)).tolist(), answers)
        ]

    def of(self, row: int) -> Exclusions:
        """The row's excluded texts: position -> reason."""
        return Exclusions(self._of_queries[self._query_numbers[row]], self._positives[row])

    @staticmethod
    def _of_query(query: int, answers: Iterable[int], near: Mapping[int, Sequence[int]]) -> dict[int, str]:
        near_answers = (passage for answer in answers for passage in near.get(answer, ()))
        excluded = dict.fromkeys(near_answers, "near-duplicate of a positive")
        excluded[query] = "the query itself"
        excluded.update(dict.fromkeys(answers, "positive of the same query in another row"))
        excluded.pop(-1, None)  # of texts that the corpus does not hold
        return excluded
