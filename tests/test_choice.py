import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.mining.choice import draw_outside, lowest_scores, row_rng, sample_one_by_one, select_negatives


def select(
    ranking, *, window=(0, 10), count=3, excluded=(), refused_by=None, corpus_size=100, seed=0, row=0, **options
):
    width = window[1] - window[0]
    return select_negatives(
        ranking,
        [1 - place / 100 for place in range(width)],
        refused_by or [0] * width,
        window=window,
        count=count,
        excluded=dict.fromkeys(excluded, "positive"),
        corpus_size=corpus_size,
        rng=row_rng(seed, row),
        **options,
    )


def test_negatives_come_from_the_slice_counted_from_zero():
    ranking = [40, 41, 42, 43, 44, 45]
    assert sorted(select(ranking, window=(2, 5), count=3).negatives) == [42, 43, 44]


def test_excluded_texts_leave_the_window_and_are_not_replaced_from_further_back():
    selection = select([40, 41, 42, 43], window=(0, 3), count=2, excluded={41}, corpus_size=44)
    assert sorted(selection.negatives) == [40, 42]
    assert selection.dropped == Counter(positive=1)
    assert selection.random_fills == 0


def test_a_window_too_small_is_filled_from_outside_the_retrieved_list():
    for seed in range(50):
        selection = select([0, 1, 2, 3], window=(2, 4), count=4, excluded={2, 7}, corpus_size=9, seed=seed)
        assert selection.negatives[0] == 3
        assert selection.random_fills == 3
        assert set(selection.negatives[1:]) <= {4, 5, 6, 8}


def test_a_pool_too_small_gives_fewer():
    selection = select([1, 0, -1, -1], window=(0, 4), count=5, excluded={1}, corpus_size=2)
    assert selection.negatives.tolist() == [0]


def test_a_row_where_everything_is_excluded_gives_none():
    assert select([0], window=(0, 5), excluded={0}, corpus_size=1).negatives.tolist() == []


def test_the_same_seed_and_row_give_the_same_choice_and_others_differ():
    def choose(seed, row):
        return select(range(50), window=(0, 50), count=5, corpus_size=50, seed=seed, row=row).negatives

    assert choose(1, 2) == choose(1, 2)
    assert len({tuple(choose(seed, row)) for seed in range(4) for row in range(4)}) == 16


def test_top_takes_the_window_in_order_and_scores_stay_beside_their_negatives():
    selection = select([40, 41, 42, 43, 44], window=(1, 5), count=3, excluded={42}, strategy="top")
    assert selection.negatives.tolist() == [41, 43, 44]
    assert selection.scores.tolist() == [1.0, 0.98, 0.97]
    sampled = select(range(40, 60), window=(5, 20), count=6)
    assert sampled.scores.tolist() == [1 - (position - 45) / 100 for position in sampled.negatives]


def test_what_a_filter_refused_is_counted_and_never_comes_back_at_random():
    refused_by = [0, 4, 4, 1]
    for seed in range(20):
        selection = select([0, 1, 2, 3], window=(0, 4), refused_by=refused_by, count=3, corpus_size=6, seed=seed)
        assert (selection.negatives[0], set(selection.negatives[1:])) == (0, {4, 5})
        assert np.isnan(selection.scores[1:]).all()
        assert selection.dropped == Counter({"--relative_margin": 2, "--max_score": 1})


def test_kept_negatives_come_first_all_of_them_and_are_not_chosen_again():
    selection = select([0, 1, 2, 3], window=(0, 4), count=3, kept={2: 0.5, 99: 0.25}, strategy="top")
    assert (selection.negatives.tolist(), selection.kept) == ([2, 99, 0], 2)
    assert selection.scores.tolist() == [0.5, 0.25, 1.0]
    assert select([0, 1, 2, 3], window=(0, 4), count=1, kept={2: 0.5, 99: 0.25}).negatives.tolist() == [2, 99]


def test_the_lowest_scoring_positive_of_a_row_counts():
    lowest = lowest_scores(np.array([0, 0, 2]), np.array([0.9, 0.4, -1.0], np.float32), 3)
    assert lowest == pytest.approx([0.4, np.inf, -1.0])


@given(data=st.data())
def test_negatives_are_never_excluded_never_repeated_and_as_many_as_there_can_be(data):
    size = data.draw(st.integers(1, 25))
    ranking = data.draw(st.permutations(range(size)))[: data.draw(st.integers(0, size))]
    excluded = data.draw(st.sets(st.integers(0, size - 1)))
    start = data.draw(st.integers(0, 10))
    stop = data.draw(st.integers(start + 1, 30))
    count = data.draw(st.integers(1, 30))
    seed = data.draw(st.integers(0, 100))
    selection = select(ranking, window=(start, stop), count=count, excluded=excluded, corpus_size=size, seed=seed)
    chosen = selection.negatives
    retrieved, window = ranking[:stop], ranking[start:stop]
    eligible = set(window) - excluded
    outside = set(range(size)) - set(retrieved) - excluded
    assert len(set(chosen)) == len(chosen) == min(count, len(eligible) + len(outside))
    taken, fills = chosen[: len(chosen) - selection.random_fills], chosen[len(chosen) - selection.random_fills :]
    assert set(taken) <= eligible
    assert set(fills) <= outside
    assert len(taken) == min(count, len(eligible))
    assert sum(selection.dropped.values()) == len(set(window) & excluded)


@given(
    st.integers(0, 3000),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.sampled_from([1, 20, 21, 22, 37, 85, 86, 277, 1045]),
)
def test_numbers_drawn_one_by_one_are_those_of_random_sample(size, share, seed, edge):
    for among in (size, edge):
        count = round(share * among)
        expected = random.Random(seed).sample(range(among), count)
        assert list(sample_one_by_one(among, count, random.Random(seed))) == expected
        few = list(islice(sample_one_by_one(among, count, random.Random(seed)), 3))
        assert few == expected[:3]


@given(st.data())
def test_draws_outside_are_a_sample_of_all_without_what_is_excluded(data):
    size, count = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 20))
    excluded = data.draw(st.sets(st.integers(0, size + 3)))
    others, seed = data.draw(st.lists(st.integers(-1, size - 1))), data.draw(st.integers(0, 99))
    refused = excluded | set(others)
    sample = random.Random(seed).sample(range(size), min(size, count + len(refused)))
    expected = [position for position in sample if position not in refused][:count]
    reasons = dict.fromkeys(excluded, "positive")
    assert draw_outside(reasons, others, count, size, random.Random(seed)) == expected
