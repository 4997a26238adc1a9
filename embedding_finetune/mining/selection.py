"""The negatives of all rows: what must not become one, what a row keeps, what its ranking gives and what chance adds.

What the score filters promise holds for all of them. Under torchrun every process takes part in each function here that
scores, and all make the same choices.

Shapes: Q rows, P pairs of a row and a text.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.texts import canonical
from embedding_finetune.mining.arguments import SelectionOptions
from embedding_finetune.mining.choice import (
    DRAWN,
    FILTERS,
    KEPT,
    ScoreFilters,
    Selection,
    draw_outside,
    row_rng,
    select_negatives,
)
from embedding_finetune.mining.ranking import Candidates, Pairs, Score
from embedding_finetune.mining.stopwatch import Stopwatch

_ROWS_AT_ONCE = 8192
_ROUNDS = 4
"""How often a row draws at random before it stays short: 15 candidates in all for each negative that is missing."""


def positive_pairs(rows: Sequence[Record], corpus: Corpus) -> Pairs:
    """Row number and position of every positive (P,), row by row."""
    positions = corpus.positions([text for row in rows for text in row["pos"]])
    return Pairs(np.repeat(np.arange(len(rows)), [len(row["pos"]) for row in rows]), positions)


class ExcludedTexts:
    """What must not become a row's negative: its query, the query's positives in any row, what nearly equals those.

    near_duplicates: (n, 2), a positive's position and that of a passage as good as equal to it.
    """

    def __init__(self, rows: Sequence[Record], corpus: Corpus, near_duplicates: np.ndarray) -> None:
        self._queries = corpus.positions([row["query"] for row in rows]).tolist()
        self._positives = [corpus.positions(row["pos"]).tolist() for row in rows]
        numbers: dict[str, int] = {}
        self._query_numbers = [numbers.setdefault(canonical(row["query"]), len(numbers)) for row in rows]
        self._answers: dict[int, dict[int, None]] = defaultdict(dict)
        for number, positions in zip(self._query_numbers, self._positives):
            self._answers[number].update(dict.fromkeys(positions))
        self._near: dict[int, list[int]] = defaultdict(list)
        for positive, passage in near_duplicates.tolist():
            self._near[positive].append(passage)

    def of(self, row: int) -> dict[int, str]:
        """Position -> reason."""
        answers = self._answers[self._query_numbers[row]]
        excluded = {passage: "near-duplicate of a positive" for own in answers for passage in self._near.get(own, ())}
        excluded[self._queries[row]] = "the query itself"
        excluded.update(dict.fromkeys(answers, "positive of the same query in another row"))
        excluded.update(dict.fromkeys(self._positives[row], "positive"))
        excluded.pop(-1, None)  # not among the texts
        return excluded


class FilteredScores:
    """Scores pairs of a row and a text, and says which filter refuses them; without filters it does neither.

    lowest_positive: (Q,), the score of each row's lowest-scoring positive.
    """

    def __init__(self, filters: ScoreFilters, score: Score, lowest_positive: np.ndarray, stopwatch: Stopwatch) -> None:
        self.filters = filters
        self._score = score
        self._lowest_positive = lowest_positive
        self._stopwatch = stopwatch

    def __call__(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Scores (P,), NaN where there are no filters, and refusals (P,) as ScoreFilters.refusals counts them."""
        if not self.filters.given or not len(pairs.rows):
            return np.full(len(pairs.rows), np.nan, dtype=np.float32), np.zeros(len(pairs.rows), dtype=np.uint8)
        self._stopwatch.lap("select")
        scores = self._score(pairs)
        return scores, self.filters.refusals(scores[:, None], self._lowest_positive[pairs.rows])[:, 0]


def choose_negatives(
    rows: Sequence[Record],
    corpus: Corpus,
    found: Candidates,
    lowest_positive: np.ndarray,
    options: SelectionOptions,
    stopwatch: Stopwatch,
) -> list[Selection]:
    """Every row's negatives, as mine_hard_neg.py's flags say; laps of the stopwatch are "select", scoring apart."""
    filters = ScoreFilters(options.max_score, options.min_score, options.absolute_margin, options.relative_margin)
    filtered_scores = FilteredScores(filters, found.score, lowest_positive, stopwatch)
    excluded = ExcludedTexts(rows, corpus, found.near_duplicates)
    kept, not_kept = _existing_negatives(
        rows if options.keep_existing_negatives else [], corpus, excluded, filtered_scores
    )
    selections = []
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        scores = found.window_scores[part]
        refused_by = filters.refusals(scores, lowest_positive[part])
        lists = zip(found.ranking[part].tolist(), scores.tolist(), refused_by.tolist())
        for row, (ranking, row_scores, refused) in enumerate(lists, start=first):
            selection = select_negatives(
                ranking,
                row_scores,
                refused,
                window=found.window,
                count=options.negative_number,
                excluded=excluded.of(row),
                corpus_size=len(corpus),
                rng=row_rng(options.seed, row),
                strategy=options.sampling_strategy,
                kept=kept.get(row),
            )
            selection.dropped.update(not_kept.get(row, ()))
            selections.append(selection)
    if filters.given:
        _hold_fills_to_filters(
            selections,
            found.ranking,
            excluded,
            filtered_scores,
            len(corpus),
            count=options.negative_number,
            seed=options.seed,
        )
    stopwatch.lap("select")
    return selections


def _existing_negatives(
    rows: Sequence[Record], corpus: Corpus, excluded: ExcludedTexts, filtered_scores: FilteredScores
) -> tuple[dict[int, dict[int, float]], dict[int, Counter[str]]]:
    """Row -> the negatives of the input that may stay, with their scores; and row -> reasons why others may not."""
    kept: dict[int, dict[int, float]] = {}
    dropped: dict[int, Counter[str]] = defaultdict(Counter)
    pairs: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        own = excluded.of(number) if row.get("neg") else {}
        distinct: dict[int, None] = {}
        for position in corpus.positions(row.get("neg", ())).tolist():
            if own.get(position, "").startswith("near-duplicate"):
                dropped[number][f"{own[position]} {KEPT}"] += 1
            elif position in own or position in distinct:
                dropped[number]["negatives of the input that are positives or repeats"] += 1
            else:
                distinct[position] = None
        pairs += ((number, position) for position in distinct)
    scores, refused_by = filtered_scores(_as_pairs(pairs))
    for (number, position), score, refused in zip(pairs, scores.tolist(), refused_by.tolist()):
        if refused:
            dropped[number][f"{FILTERS[refused - 1]} {KEPT}"] += 1
        else:
            kept.setdefault(number, {})[position] = score
    return kept, dropped


def _hold_fills_to_filters(
    selections: list[Selection],
    ranking: np.ndarray,
    excluded: ExcludedTexts,
    filtered_scores: FilteredScores,
    corpus_size: int,
    *,
    count: int,
    seed: int,
) -> None:
    """Score what was drawn at random, take out what the filters refuse, and draw again for the rows that are short.

    All rows draw in the same few rounds, so that each round scores once; in each, a row draws twice as many for each
    missing negative as in the one before. It stays short where the rounds or the corpus are used up.
    """
    drawn: dict[int, np.ndarray] = {}
    for row, selection in enumerate(selections):
        if selection.random_fills:
            bare = len(selection.negatives) - selection.random_fills
            drawn[row] = np.array(selection.negatives[bare:])
            del selection.negatives[bare:], selection.scores[bare:]
            selections[row] = selection._replace(random_fills=0)
    tried = {row: [positions] for row, positions in drawn.items()}
    for attempt in range(1, _ROUNDS + 1):
        _take_what_passes(selections, drawn, filtered_scores, count)
        short = [row for row, positions in drawn.items() if len(positions) and len(selections[row].negatives) < count]
        if attempt == _ROUNDS or not short:
            break
        drawn = {}
        for row in short:
            refused = excluded.of(row).keys() | set(selections[row].negatives)
            refused.update(ranking[row].tolist(), *(positions.tolist() for positions in tried[row]))
            wanted = (count - len(selections[row].negatives)) * 2**attempt
            drawn[row] = np.array(draw_outside(refused, wanted, corpus_size, row_rng(seed, row, attempt)), np.int64)
            tried[row].append(drawn[row])


def _take_what_passes(
    selections: list[Selection], drawn: Mapping[int, np.ndarray], filtered_scores: FilteredScores, count: int
) -> None:
    """Add to each row of `drawn` those of its positions that no filter refuses, up to `count`; count the refused."""
    if not drawn:
        return
    lengths = [len(positions) for positions in drawn.values()]
    pairs = Pairs(np.repeat(list(drawn), lengths), np.concatenate(list(drawn.values())))
    scores, refused_by = filtered_scores(pairs)
    ends = np.cumsum(lengths).tolist()
    for (row, positions), end in zip(drawn.items(), ends):
        own, selection = slice(end - len(positions), end), selections[row]
        passed = np.flatnonzero(refused_by[own] == 0)[: count - len(selection.negatives)]
        selection.negatives.extend(positions[passed].tolist())
        selection.scores.extend(scores[own][passed].tolist())
        for number in refused_by[own][refused_by[own] > 0].tolist():
            selection.dropped[f"{FILTERS[number - 1]} {DRAWN}"] += 1
        selections[row] = selection._replace(random_fills=selection.random_fills + len(passed))


def with_all_scores(selections: Sequence[Selection], score: Score) -> list[Selection]:
    """The selections with the scores filled in that are not known yet: of kept and random negatives."""
    missing = [
        (row, place)
        for row, selection in enumerate(selections)
        for place, known in enumerate(np.isfinite(selection.scores).tolist())
        if not known
    ]
    pairs = _as_pairs([(row, selections[row].negatives[place]) for row, place in missing])
    for (row, place), value in zip(missing, score(pairs).tolist()):
        selections[row].scores[place] = value
    return list(selections)


def _as_pairs(pairs: Sequence[tuple[int, int]]) -> Pairs:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Pairs(table[:, 0], table[:, 1])
