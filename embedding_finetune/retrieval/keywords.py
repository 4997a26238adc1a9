"""BM25: ranking by the words that a query and a passage have in common, with the package bm25s.

A word is a run of letters and digits, in one case and one Unicode form. Scripts that are written without spaces give
pairs of neighbouring characters instead. Nothing is stemmed, and no word is left out.

Shapes: Q queries, N passages, k ranks.
"""

import functools
import logging
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from embedding_finetune.progress import Progress
from embedding_finetune.retrieval.results import NO_RESULT, Ties, as_results

_K1, _B = 1.5, 0.75
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, kana and Han."""
_RUN = re.compile(rf"[{_UNSPACED}]+|[^{_UNSPACED}]+")
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")


@functools.cache
def _word() -> re.Pattern[str]:
    """A run of letters and digits, with their vowel signs and accents, which Python's \\w leaves out."""
    marks = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    return re.compile(rf"(?:[^\W_]|[{re.escape(marks)}])+")


def words_of(text: str) -> list[str]:
    """The words of a text, in order: `words_of("Reset 泵阀门") == ["reset", "泵阀", "阀门"]`."""
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    words = _word().findall(text)
    if text.isascii() or not _HAS_UNSPACED.search(text):
        return words
    return [part for word in words for run in _RUN.findall(word) for part in _parts(run)]


def _parts(run: str) -> list[str]:
    """A run of one kind of script: whole, or its pairs of neighbouring characters."""
    if len(run) < 2 or not _HAS_UNSPACED.match(run):
        return [run]
    return [run[place : place + 2] for place in range(len(run) - 1)]


class KeywordIndex:
    """An index of passages by their words, which ranks all of them for a query.

    Scores are Lucene's BM25 with k1 = 1.5 and b = 0.75 (Kamphuis et al., ECIR 2020), summed in float32. A word that
    stands several times in a query counts as often.
    """

    def __init__(self, passages: Iterable[str], count: int) -> None:  # N of them
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._count = count
        self._numbers: dict[str, int] = {}
        words, ends = array("i"), array("q", [0])
        with Progress(count, "Indexing words", "text") as progress:
            for passage in passages:
                words.extend([self._numbers.setdefault(word, len(self._numbers)) for word in words_of(passage)])
                ends.append(len(words))
                progress.update(1)
        self._index: Any = None
        if self._numbers:
            self._index = bm25s.BM25(method="lucene", k1=_K1, b=_B)
            corpus = bm25s.tokenization.Tokenized(ids=_Documents(words, ends), vocab=self._numbers)
            self._index.index(corpus, create_empty_token=False, show_progress=False)

    def results(self, queries: Sequence[str], top_k: int, *, ties: Ties, among: int) -> np.ndarray:
        """The top_k best of the first `among` passages for each query, as results of results.py: (Q, top_k), ascending.

        Passages that share no word with a query are not among them.
        """
        best = np.full((len(queries), top_k), NO_RESULT, dtype=np.int64)
        with Progress(len(queries), "Ranking by words", "query") as progress:
            for row, query in enumerate(queries):
                scores = self._scores(query)[:among]
                positions = np.flatnonzero(scores > 0)
                if len(positions) > top_k:
                    least = np.partition(scores[positions], -top_k)[-top_k]
                    positions = positions[scores[positions] >= least]  # with all that tie with the last
                found = np.sort(as_results(scores[positions], positions, ties))[:top_k]
                best[row, : len(found)] = found
                progress.update(1)
        return best

    def pair_scores(self, queries: Sequence[str], rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The scores of pairs, queries[rows[i]] with the passage at positions[i]: (P,) float32."""
        scores = np.empty(len(rows), dtype=np.float32)
        order = np.argsort(rows, kind="stable")
        distinct, starts = np.unique(rows[order], return_index=True)
        for row, pairs in zip(distinct.tolist(), np.split(order, starts[1:])):
            scores[pairs] = self._scores(queries[row])[positions[pairs]]
        return scores

    def _scores(self, query: str) -> np.ndarray:
        """Of all passages: (N,) float32."""
        words = [self._numbers[word] for word in words_of(query) if word in self._numbers]
        if not words:
            return np.zeros(self._count, dtype=np.float32)
        scores: np.ndarray = self._index.get_scores_from_ids(words)
        return scores


class _Documents(Sequence[list[int]]):
    """The numbers of each passage's words, each list made when it is read."""

    def __init__(self, words: "array[int]", ends: "array[int]") -> None:
        self._words, self._ends = words, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: Any) -> Any:
        return self._words[self._ends[row] : self._ends[row + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[row] for row in range(len(self)))
