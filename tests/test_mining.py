from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.mining import row_rng, select_negatives


def select(ranking, *, window=(0, 10), count=3, excluded=(), corpus_size=100, seed=0):
    return select_negatives(
        ranking,
        window=window,
        count=count,
        excluded=dict.fromkeys(excluded, "positive"),
        corpus_size=corpus_size,
        rng=row_rng(seed, 0),
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
    assert selection.negatives == [0]


def test_a_row_where_everything_is_excluded_gives_none():
    assert select([0], window=(0, 5), excluded={0}, corpus_size=1).negatives == []


def test_the_same_seed_and_row_give_the_same_choice_and_others_differ():
    def choose(seed, row):
        rng = row_rng(seed, row)
        selection = select_negatives(range(50), window=(0, 50), count=5, excluded={}, corpus_size=50, rng=rng)
        return selection.negatives

    assert choose(1, 2) == choose(1, 2)
    assert len({tuple(choose(seed, row)) for seed in range(4) for row in range(4)}) == 16


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
