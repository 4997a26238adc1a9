"""The JSON from which the browser makes the report's table of queries, and lets a person judge passages.

Shapes: Q queries.
"""

import json
from collections.abc import Mapping

import numpy as np

from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.retrieval.top_k import Ranking

_QUERY_CHARACTERS, _PASSAGE_CHARACTERS = 200, 300
_SHOWN_PASSAGES = 3
"""Per query, of the right passages and of those that ranked above them."""
_MOST_BYTES = 4_500_000
"""Of the table. The queries that matter most come first, and the page says when others are left out."""
_WHOLE_BYTES = 1_000_000
"""Of the table, whose texts are whole: only these can be judged, since a judgement is about whole texts."""


class _Texts:
    """The passages of the table, each once. `cut` has the places of those that are not whole."""

    def __init__(self, task: RetrievalTask) -> None:
        self._texts = task.corpus.texts
        self._places: dict[int, int] = {}
        self.passages: list[str] = []
        self.cut: list[int] = []

    def place(self, position: int, *, whole: bool) -> int:
        """Where the text at a position of the corpus stands in `passages`."""
        if position not in self._places:
            text = self._texts[position]
            self._places[position] = len(self.passages)
            if not whole and len(text) > _PASSAGE_CHARACTERS:
                self.cut.append(len(self.passages))
                text = _cut(text, _PASSAGE_CHARACTERS)
            self.passages.append(text)
        return self._places[position]

    def forget_from(self, place: int) -> None:
        """Leave out the passages from a place on."""
        del self.passages[place:]
        self.cut = [number for number in self.cut if number < place]


def query_table(
    task: RetrievalTask, rankings: Mapping[str, Ranking], ranks: Mapping[str, np.ndarray], depth: int, base: str
) -> Record:
    """What the script in report_template.html reads.

    ranks: by model, (Q,), of the best right passage, 0 where it is not among the first `depth`. `queries` holds
    [id, text, group, [rank per model], [right passage], [[passage, rank, score, judged] ranked above them], whole].
    Passages are places in `passages`; the ranks above are the last model's; `judged` is whether a passage is known to
    answer nothing, `whole` whether the query's text is all there.
    """
    texts = _Texts(task)
    queries: list[list[object]] = []
    used_bytes = 0
    for number in _most_telling_first(ranks, base):
        passages_before = len(texts.passages)
        query = _entry(task, list(rankings.values())[-1], ranks, number, depth, texts, whole=used_bytes < _WHOLE_BYTES)
        used_bytes += len(_json([query, texts.passages[passages_before:]]).encode())
        if used_bytes > _MOST_BYTES:
            texts.forget_from(passages_before)
            break
        queries.append(query)
    models = list(rankings)
    compared = {"models": models, "base": models.index(base), "depth": depth, "total": len(task.queries)}
    return {**compared, "passages": texts.passages, "cut": texts.cut, "queries": queries}


def _entry(
    task: RetrievalTask,
    last: Ranking,
    ranks: Mapping[str, np.ndarray],
    number: int,
    depth: int,
    texts: _Texts,
    *,
    whole: bool,
) -> list[object]:
    """One query as the table has it. last: the last model's ranking."""
    rank_by_model = [int(best[number]) or None for best in ranks.values()]
    rank, right, above = rank_by_model[-1], [], []
    if rank != 1:
        right = [texts.place(position, whole=whole) for position in task.findable(number)[:_SHOWN_PASSAGES]]
        known = task.not_relevant.get(number, ())
        shown = min(rank - 1 if rank else depth, _SHOWN_PASSAGES)
        ranked = zip(last.positions[number, :shown].tolist(), last.scores[number].tolist())
        above = [
            [texts.place(position, whole=whole), place, round(score, 4), int(position in known)]
            for place, (position, score) in enumerate(ranked, start=1)
            if position >= 0
        ]
    query = task.queries[number]
    text = query if whole else _cut(query, _QUERY_CHARACTERS)
    return [task.ids[number], text, task.groups[number], rank_by_model, right, above, int(text == query)]


def _most_telling_first(ranks: Mapping[str, np.ndarray], base: str) -> list[int]:
    """Query numbers: first those that lost most from the base to the last model, then those that fail."""
    first, last = beyond_all(ranks[base]), beyond_all(list(ranks.values())[-1])
    lost = np.maximum(1 / first - 1 / last, 0)  # in reciprocal rank: from 1 to 2 is worse than from 50 to 60
    return np.lexsort((-last, -lost)).tolist()


def beyond_all(ranks: np.ndarray) -> np.ndarray:
    """Ranks in which 0, for "not found", has become the largest."""
    return np.where(ranks == 0, np.iinfo(np.int64).max // 2, ranks)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def embedded(value: object) -> str:
    """JSON for a script element: no text in it can end the element."""
    return _json(value).replace("<", "\\u003c")
