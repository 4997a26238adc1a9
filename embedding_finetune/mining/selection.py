"""The negatives of all rows: which texts are excluded, which a row keeps, chooses from its ranking or draws at random.

The score filters hold for all of them. Under torchrun all processes call each function here together, and make the same
choices.

Shapes: Q rows, P pairs of a row and a text.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.mining.arguments import SelectionOptions
from embedding_finetune.mining.candidates import Candidates, Pairs, Score
from embedding_finetune.mining.choice import (
    DRAWN_AT_RANDOM,
    FROM_INPUT,
    Selection,
    draw_outside,
    row_rng,
    select_negatives,
)
from embedding_finetune.mining.exclusions import ExcludedTexts
from embedding_finetune.mining.filters import FILTERS, ScoreFilters
from embedding_finetune.mining.stopwatch import Stopwatch

_ROWS_AT_ONCE = 256
"""As Python objects: the numbers of 210 ranks of a row take 20 kB."""
_ROUNDS = 4
"""How often a row draws at random before it stays short: 15 candidates in all for each missing negative."""


def positive_pairs(rows: Sequence[Record], corpus: Corpus) -> Pairs:
    """Every row paired with each of its positives, in order: (P,)."""
    positions = corpus.positions([text for row in rows for text in row["pos"]])
    return Pairs(np.repeat(np.arange(len(rows)), [len(row["pos"]) for row in rows]), positions)


class FilteredScores:
    """Scores pairs of a row and a text, and says which filter refuses them. Without filters it scores nothing.

    lowest_positive: (Q,), the score of each row's lowest-scoring positive.
    """

    def __init__(self, filters: ScoreFilters, score: Score, lowest_positive: np.ndarray, stopwatch: Stopwatch) -> None:
        self.filters = filters
        self._score = score
        self._lowest_positive = lowest_positive
        self._stopwatch = stopwatch

    def __call__(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Scores (P,), NaN without filters, and which filter refuses (P,), by number as in ScoreFilters.refusals."""
        if not self.filters.given or not len(pairs.rows):
            return np.full(len(pairs.rows), np.nan, dtype=np.float32), np.zeros(len(pairs.rows), dtype=np.uint8)
        self._stopwatch.lap("select")
        scores = self._score(pairs)
        return scores, self.filters.refusals(scores[:, None], self._lowest_positive[pairs.rows])[:, 0]


def choose_negatives(
    rows: Sequence[Record],
    corpus: Corpus,
    candidates: Candidates,
    lowest_positive: np.ndarray,
    options: SelectionOptions,
    stopwatch: Stopwatch,
    confirmed: Sequence[int] | None = None,
) -> list[Selection]:
    """Every row's negatives, as mine_hard_neg.py's flags say. The stopwatch's lap is "select"; scoring has its own.

    confirmed: (Q,), how many of the first texts in each row's "neg" were judged not to answer its query; None for none.
    """
    filters = options.score_filters
    filtered_scores = FilteredScores(filters, candidates.score, lowest_positive, stopwatch)
    excluded = ExcludedTexts(rows, corpus, candidates.near_duplicates)
    confirmed = confirmed or [0] * len(rows)
    existing = [
        row.get("neg", ()) if options.keep_existing_negatives else row.get("neg", ())[:judged]
        for row, judged in zip(rows, confirmed, strict=True)
    ]
    stays = _negatives_that_stay(existing, confirmed, corpus, excluded, filtered_scores)
    selections = []
    for row, (ranking, scores, refused_by) in enumerate(_ranked_rows(candidates, filters, lowest_positive)):
        selection = select_negatives(
            ranking,
            scores,
            refused_by,
            window=candidates.window,
            count=options.negative_number,
            excluded=excluded.of(row),
            corpus_size=len(corpus),
            rng=row_rng(options.seed, row),
            strategy=options.sampling_strategy,
            kept=stays.scores.get(row),
            confirmed=stays.confirmed.get(row, 0),
        )
        selection.dropped.update(stays.dropped.get(row, ()))
        selections.append(selection)
    if filters.given:
        _replace_refused_fills(
            selections,
            candidates.ranking,
            excluded,
            filtered_scores,
            len(corpus),
            count=options.negative_number,
            seed=options.seed,
        )
    stopwatch.lap("select")
    return selections


def _ranked_rows(
    candidates: Candidates, filters: ScoreFilters, lowest_positive: np.ndarray
) -> Iterator[tuple[list[int], list[float], list[int]]]:
    """Row by row: the ranking, and of its window the scores and the numbers of the filters that refuse."""
    for first in range(0, len(candidates.ranking), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        scores = candidates.window_scores[part]
        refused_by = filters.refusals(scores, lowest_positive[part])
        yield from zip(candidates.ranking[part].tolist(), scores.tolist(), refused_by.tolist())


class _Staying(NamedTuple):
    """What rows have already. By row: positions and their scores, the judged ones first; how many were judged; why
    others were dropped."""

    scores: dict[int, dict[int, float]]
    confirmed: dict[int, int]
    dropped: dict[int, Counter[str]]


def _negatives_that_stay(
    existing: Sequence[Sequence[str]],
    confirmed: Sequence[int],
    corpus: Corpus,
    excluded: ExcludedTexts,
    filtered_scores: FilteredScores,
) -> _Staying:
    """Those of the rows' existing negatives that stay. Neither filters nor likeness to a positive refuse judged ones.

    existing: for each row, of which the first `confirmed` were judged.
    """
    staying = _Staying({}, defaultdict(int), defaultdict(Counter))
    pairs: list[tuple[int, int]] = []
    judged: list[bool] = []
    for number, texts in enumerate(existing):
        reasons = excluded.of(number) if texts else {}
        distinct: dict[int, bool] = {}
        for place, position in enumerate(corpus.positions(texts).tolist()):
            is_judged, is_near = place < confirmed[number], reasons.get(position, "").startswith("near-duplicate")
            if is_near and not is_judged:
                staying.dropped[number][f"{reasons[position]} {FROM_INPUT}"] += 1
            elif position in distinct or (position in reasons and not is_near):
                staying.dropped[number]["negatives of the input that are positives or repeats"] += 1
            else:
                distinct[position] = is_judged
        pairs += ((number, position) for position in distinct)
        judged += distinct.values()
    scores, refused_by = filtered_scores(_as_pairs(pairs))
    for (number, position), is_judged, score, refused in zip(pairs, judged, scores.tolist(), refused_by.tolist()):
        if refused and not is_judged:
            staying.dropped[number][f"{FILTERS[refused]} {FROM_INPUT}"] += 1
        else:
            staying.scores.setdefault(number, {})[position] = score
            staying.confirmed[number] += is_judged
    return staying


def _replace_refused_fills(
    selections: Sequence[Selection],
    ranking: np.ndarray,
    excluded: ExcludedTexts,
    filtered_scores: FilteredScores,
    corpus_size: int,
    *,
    count: int,
    seed: int,
) -> None:
    """Score the negatives drawn at random, take out those that the filters refuse, and draw again for rows left short.

    All rows draw in the same few rounds, so that each round scores once. In each round a row draws twice as many
    candidates per missing negative as in the round before. A row stays short when rounds or corpus are used up.
    """
    drawn: dict[int, np.ndarray] = {}
    for row, selection in enumerate(selections):
        if selection.random_fills:
            first_fill = len(selection.negatives) - selection.random_fills
            drawn[row] = np.array(selection.negatives[first_fill:])
            del selection.negatives[first_fill:], selection.scores[first_fill:]
            selection.random_fills = 0
    tried = {row: [positions] for row, positions in drawn.items()}
    for attempt in range(1, _ROUNDS + 1):
        _add_allowed_fills(selections, drawn, filtered_scores, count)
        short = [row for row, positions in drawn.items() if len(positions) and len(selections[row].negatives) < count]
        if attempt == _ROUNDS or not short:
            break
        drawn = {}
        for row in short:
            negatives, rng = selections[row].negatives, row_rng(seed, row, attempt)
            others = itertools.chain(
                negatives, ranking[row].tolist(), *(positions.tolist() for positions in tried[row])
            )
            to_draw = (count - len(negatives)) * 2**attempt
            drawn[row] = np.array(draw_outside(excluded.of(row), others, to_draw, corpus_size, rng), dtype=np.int64)
            tried[row].append(drawn[row])


def _add_allowed_fills(
    selections: Sequence[Selection], drawn: Mapping[int, np.ndarray], filtered_scores: FilteredScores, count: int
) -> None:
    """Add the positions drawn for each row that no filter refuses, until it has `count`; record the refused ones."""
    if not drawn:
        return
    lengths = [len(positions) for positions in drawn.values()]
    pairs = Pairs(np.repeat(list(drawn), lengths), np.concatenate(list(drawn.values())))
    scores, refused_by = filtered_scores(pairs)
    ends = np.cumsum(lengths).tolist()
    for (row, positions), end in zip(drawn.items(), ends):
        part, selection = slice(end - len(positions), end), selections[row]
        row_scores, row_refused_by = scores[part], refused_by[part]
        allowed = np.flatnonzero(row_refused_by == 0)[: count - len(selection.negatives)]
        selection.negatives.extend(positions[allowed].tolist())
        selection.scores.extend(row_scores[allowed].tolist())
        selection.random_fills += len(allowed)
        for number in row_refused_by[row_refused_by > 0].tolist():
            selection.dropped[f"{FILTERS[number]} {DRAWN_AT_RANDOM}"] += 1


def fill_in_scores(selections: Sequence[Selection], score: Score) -> None:
    """Fill in the scores that are not known yet, in place: those of kept and random negatives."""
    missing = [
        (row, place)
        for row, selection in enumerate(selections)
        for place, known in enumerate(np.isfinite(selection.scores).tolist())
        if not known
    ]
    pairs = _as_pairs([(row, selections[row].negatives[place]) for row, place in missing])
    for (row, place), value in zip(missing, score(pairs).tolist()):
        selections[row].scores[place] = value


def _as_pairs(pairs: Sequence[tuple[int, int]]) -> Pairs:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Pairs(table[:, 0], table[:, 1])
