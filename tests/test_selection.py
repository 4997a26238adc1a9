"""Choosing the negatives of all rows, on made-up scores; test_mine_hard_neg.py does it with models."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.mining.arguments import SelectionOptions
from embedding_finetune.mining.audit import audit_text, mining_audit
from embedding_finetune.mining.candidates import Candidates, Pairs
from embedding_finetune.mining.choice import lowest_scores
from embedding_finetune.mining.selection import choose_negatives, positive_pairs
from embedding_finetune.mining.stopwatch import Stopwatch

NOT_NEAR = np.empty((0, 2), dtype=np.int64)


class Pool:
    """Texts "0", "1", ... with made-up scores for every row; rows have the positives and old negatives given."""

    def __init__(self, scores, positives, old=None, near=NOT_NEAR):
        self.scores = np.asarray(scores, dtype=np.float32)  # (Q, N)
        self.near = near
        self.calls: list[int] = []
        old = old or [[] for _ in positives]
        self.rows = [
            {"query": f"query {row}", "pos": list(map(str, own)), "neg": list(map(str, negatives))}
            for row, (own, negatives) in enumerate(zip(positives, old))
        ]
        self.corpus = Corpus(map(str, range(self.scores.shape[1])))

    def score(self, pairs: Pairs) -> np.ndarray:
        self.calls.append(len(pairs.rows))
        return self.scores[pairs.rows, pairs.positions]

    def lowest_positive(self) -> np.ndarray:
        pairs = positive_pairs(self.rows, self.corpus)
        return lowest_scores(pairs.rows, self.scores[tuple(pairs)], len(self.rows))

    def mine(self, *, window, count, seed=0, keep=False, **filters):
        start, stop = window
        ranking = np.argsort(-self.scores, axis=1, kind="stable")[:, :stop]
        window_scores = np.take_along_axis(self.scores, ranking, axis=1)[:, start:]
        found = Candidates(ranking, window_scores, np.empty(0), self.near, self.score, {}, {})
        options = SelectionOptions(**filters, negative_number=count, seed=seed, keep_existing_negatives=keep)
        return choose_negatives(self.rows, self.corpus, found, self.lowest_positive(), options, Stopwatch())


def allowed(scores, positive, *, max_score=np.inf, min_score=-np.inf, absolute_margin=None, relative_margin=None):
    """The definition of the filters."""
    good = (scores <= max_score) & (scores >= min_score)
    if absolute_margin is not None:
        good &= scores <= positive - absolute_margin
    if relative_margin is not None:
        good &= scores <= positive - relative_margin * abs(positive)
    return good


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 15),
    count=st.integers(1, 20),
    start=st.integers(0, 4),
    width=st.integers(1, 6),
    filters=st.fixed_dictionaries(
        {},
        optional={
            "max_score": st.sampled_from([0.3, 0.6]),
            "min_score": st.sampled_from([0.2, 0.25]),
            "absolute_margin": st.sampled_from([0.0, 0.2]),
            "relative_margin": st.sampled_from([0.05, 0.5]),
        },
    ),
)
def test_every_negative_passes_every_filter_and_none_that_would_is_missing(seed, size, count, start, width, filters):
    """In pools of up to 15 the rounds try everything, so that how many there have to be is known."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-0.2, 1, (3, size)).astype(np.float32)
    positives = [rng.choice(size, rng.integers(1, 3), replace=False).tolist() for _ in range(3)]
    old = [rng.choice(size, rng.integers(0, size), replace=False).tolist() for _ in range(3)]
    pool = Pool(scores, positives, old)
    stop = min(start + width, size)
    selections = pool.mine(window=(min(start, stop), stop), count=count, seed=seed, keep=True, **filters)
    for row, selection in enumerate(selections):
        own, lowest = scores[row].astype(np.float64), scores[row, positives[row]].min().astype(np.float64)
        good = set(np.flatnonzero(allowed(own, lowest, **filters)).tolist()) - set(positives[row])
        ranking = np.argsort(-scores[row], kind="stable")
        kept = [position for position in old[row] if position in good]
        reachable = (set(ranking[start:stop].tolist()) | set(ranking[stop:].tolist())) & good
        assert selection.negatives.tolist()[: len(kept)] == kept
        assert len(set(selection.negatives)) == len(selection.negatives)
        assert set(selection.negatives) <= good
        assert len(selection.negatives) == max(len(kept), min(count, len(set(kept) | reachable)))
        if filters:
            assert selection.scores == pytest.approx(own[selection.negatives])
    assert len(pool.calls) <= (1 + 4 if filters else 0)  # rounds over all rows; nothing is scored without filters


def test_random_passages_that_break_the_margin_are_drawn_again():
    """What was met in use: half of a large pool is too close to the positive, and the window gives little."""
    rng = np.random.default_rng(0)
    scores = np.where(rng.random((200, 2000)) < 0.5, 0.97, 0.5).astype(np.float32)
    scores[:, 0] = 1.0  # the positive; relative_margin 0.05 allows 0.95
    pool = Pool(scores, [[0]] * 200)
    selections = pool.mine(window=(1, 5), count=8, relative_margin=0.05)
    assert all(scores[row, own.negatives].max() == 0.5 for row, own in enumerate(selections))
    assert all((len(own.negatives), own.random_fills) == (8, 8) for own in selections)
    drawn = [own.dropped["--relative_margin (drawn at random)"] for own in selections]
    assert 4 < np.mean(drawn) < 24  # 8 before 8 that pass, and what is drawn beyond these
    assert sum(own.dropped["--relative_margin"] for own in selections) == 200 * 4
    assert len(pool.calls) <= 4
    assert sum(pool.calls) < 200 * 8 * 4


def test_where_nearly_everything_is_refused_rows_stay_short_after_a_bounded_number_of_tries():
    scores = np.full((50, 3000), 0.99, dtype=np.float32)
    scores[:, :2] = 1.0, 0.1  # one negative in 3,000 would do
    selections = Pool(scores, [[0]] * 50).mine(window=(1, 3), count=4, max_score=0.5)
    assert all(set(own.negatives) <= {1} for own in selections)
    for own in selections:
        tried = own.dropped["--max_score (drawn at random)"] + own.random_fills
        assert 4 * (1 + 2 + 4) < tried <= 4 * (1 + 2 + 4 + 8)


def test_filters_that_refuse_nothing_change_nothing():
    scores = np.random.default_rng(1).random((20, 100))
    plain = Pool(scores, [[3]] * 20).mine(window=(0, 4), count=8)
    filtered = Pool(scores, [[3]] * 20).mine(window=(0, 4), count=8, max_score=2.0)
    assert [own.negatives for own in filtered] == [own.negatives for own in plain]


def test_near_duplicates_hold_for_fills_and_old_negatives_of_all_rows_that_share_a_query():
    scores = np.random.default_rng(2).random((3, 12))
    near = np.array([[0, 4], [1, 5], [2, 6]])
    pool = Pool(scores, [[0, 1], [2], [3]], [[5, 6, 7], [4], [4, 4]], near)
    pool.rows[1]["query"] = " query 0"  # the first row's query
    first, second, third = pool.mine(window=(0, 2), count=12, keep=True)
    assert (first.kept, second.kept, third.kept) == (1, 0, 1)
    assert (first.negatives[0], third.negatives[0]) == (7, 4)
    assert sorted(first.negatives) == sorted(second.negatives) == [3, 7, 8, 9, 10, 11]
    assert first.dropped["near-duplicate of a positive (of the input)"] == 2
    assert third.dropped["negatives of the input that are positives or repeats"] == 1


@pytest.mark.parametrize(
    ("window", "count", "filters", "warnings"),
    [
        ((0, 19), 4, {}, []),
        ((0, 10), 10, {}, []),  # 9 of the ranks and 1 at random: no more than a tenth
        ((0, 9), 10, {}, ["20% of the negatives were drawn at random", "widen --range_for_sampling"]),
        ((0, 20), 20, {}, ["fewer than 20 negatives: there are too few candidates"]),
        ((0, 2), 10, {"max_score": 0.2}, ["fewer than 10 negatives: filters refuse", "drawn at random"]),
        ((20, 20), 1, {}, ["--range_for_sampling starts at rank 20 of 20 candidates"]),
    ],
)
def test_the_account_warns_of_rows_that_are_short_and_of_many_random_negatives(window, count, filters, warnings):
    pool = Pool([np.linspace(1, 0, 20)] * 3, [[0]] * 3)
    selections = pool.mine(window=window, count=count, **filters)
    audit = mining_audit(selections, np.ones(3), pool.lowest_positive(), wanted=count)
    audit |= {"candidates": 20, "rows_dropped": 0, "seconds": {}, "settings": {"range_for_sampling": window}}
    told = [line for line in audit_text(audit, wanted=count).splitlines() if line.startswith("warning")]
    assert bool(told) == bool(warnings)
    assert all(part in " ".join(told) for part in warnings)
