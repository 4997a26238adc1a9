"""Groups of rows that share keys, and which of them are held out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.data.hold_out import Keys, draw, halve, how_many, places, tie, what_is_new

KEYS = st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=15)
"""Of each row."""


def keys_of(lists):
    rows = [row for row, keys in enumerate(lists) for _ in keys]
    return Keys(np.array(rows, np.int64), np.array([key for keys in lists for key in keys], np.int64))


def reachable(first, *columns):
    """Rows that are joined to the first by common keys of a column: breadth first, by the definition."""
    seen, front = {first}, [first]
    while front:
        row = front.pop()
        for column in columns:
            near = {other for other, keys in enumerate(column) if set(keys) & set(column[row])} - seen
            seen |= near
            front += near
    return seen


@given(columns=st.lists(KEYS, min_size=2, max_size=2).filter(lambda two: len(two[0]) == len(two[1])))
def test_groups_are_the_rows_that_chains_of_common_keys_join(columns):
    group = tie(len(columns[0]), [keys_of(column) for column in columns])
    for row in range(len(group)):
        assert set(np.flatnonzero(group == group[row]).tolist()) == reachable(row, *columns)
    assert set(group.tolist()) == set(range(group.max() + 1))


def test_a_key_ties_within_its_own_column_only():
    assert tie(2, [keys_of([[7], []]), keys_of([[], [7]])]).tolist() == [0, 1]


@pytest.mark.parametrize("order", ["ascending", "alternating", "random"])
def test_a_chain_of_many_rows_is_one_group(order):
    count = 100_000
    link = np.arange(count)
    if order == "alternating":
        link = np.ravel(np.column_stack([link[: count // 2], link[count // 2 :][::-1]]))
    if order == "random":
        link = np.random.default_rng(0).permutation(count)
    rows, numbers = np.concatenate([link[:-1], link[1:]]), np.tile(np.arange(count - 1), 2)
    assert tie(count, [Keys(rows, numbers)]).max() == 0


@given(lists=KEYS.map(lambda lists: [[*keys, 100 + row] for row, keys in enumerate(lists)]), data=st.data())
def test_the_place_of_a_group_does_not_depend_on_the_order_of_rows_nor_on_other_groups(lists, data):
    def places_of_rows(lists):
        keys = keys_of(lists)
        groups = tie(len(lists), [keys])
        return dict(zip(map(tuple, lists), places(groups, keys, seed=3)[groups].tolist()))

    found = places_of_rows(lists)
    assert places_of_rows(data.draw(st.permutations(lists))) == found
    apart = [[1000], [1001, 1002]]
    assert found.items() <= places_of_rows([*apart, *lists]).items()


def test_the_seed_and_the_smallest_member_alone_decide_the_place():
    def place(members, seed):
        return places(np.zeros(len(members), np.int64), Keys(np.arange(len(members)), np.array(members)), seed=seed)[0]

    assert place([5, 9], 1) == place([9, 5, 7], 1)
    assert len({place([5], 1), place([5], 2), place([4, 5], 1)}) == 3


def test_places_are_spread_evenly():
    count = 10_000
    found = places(np.arange(count), Keys(np.arange(count), np.arange(count)), seed=0)
    assert 0 <= found.min() <= found.max() < 1
    assert np.histogram(found, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 1000), abs=120)


@pytest.mark.parametrize(
    ("asked", "queries", "count"), [(0.1, 593, 59), (0.29, 100, 29), (0.3, 10, 3), (0.1, 9, 0), (20.0, 593, 20)]
)
def test_a_share_is_rounded_down_and_a_number_is_itself(asked, queries, count):
    assert how_many(asked, queries) == count


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1, exclude_max=True)), min_size=2, max_size=40),
    number=st.integers(1, 30),
)
def test_a_number_takes_groups_in_their_order_while_they_fit(groups, number):
    sizes, order = (np.array(column) for column in zip(*groups))
    taken = draw(sizes, order, number)
    left = number
    for group in sorted(range(len(groups)), key=lambda group: order[group]):
        assert taken[group] == (sizes[group] <= left)
        left -= sizes[group] * taken[group]


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=200),
    share=st.floats(0.01, 0.99),
)
def test_a_share_holds_out_about_as_many_and_no_group_that_is_larger(groups, share):
    sizes, order = (np.array(column) for column in zip(*groups))
    taken, asked = draw(sizes, order, share), how_many(share, sizes.sum())
    assert all(sizes[taken] <= asked)
    assert sizes[taken].sum() <= 1.5 * asked
    assert sizes[taken].sum() < sizes.sum()
    if sizes[taken].sum() < asked / 2:  # then nothing more would fit
        assert all(sizes[~taken] + sizes[taken].sum() > asked)


def test_a_share_depends_on_each_group_alone_where_it_is_near_what_is_asked():
    order = np.random.default_rng(1).random(1000)
    assert np.array_equal(draw(np.ones(1000, np.int64), order, 0.2), order < 0.2)


def test_what_is_new_is_said_of_each_kind():
    assert what_is_new("passage") == "questions about passages that no training row answers with"
    assert what_is_new("question") == "new questions about passages that training may know"
    assert what_is_new("customer") == "questions of rows with a 'customer' that no training row has"


def halved(there, *, seed=1):
    """The half of those of 1,000 groups of one query that are there."""
    groups = np.arange(1000)
    return halve(np.isin(groups, there).astype(np.int64), groups, Keys(groups, groups), seed=seed)


def test_the_half_of_a_group_depends_on_no_other_group_and_on_the_seed():
    few, many = np.arange(0, 1000, 5), np.arange(1000)
    half = halved(few)
    assert half.sum() == pytest.approx(100, abs=30)  # four standard deviations of 200 coins
    assert not half[np.setdiff1d(many, few)].any()
    assert (halved(many)[few] == half[few]).all()
    assert (halved(few, seed=2) != half).any()


def test_groups_with_the_smallest_places_are_halved_as_evenly_as_others():
    groups = np.arange(1000)
    held_out = np.flatnonzero(places(groups, Keys(groups, groups), seed=1) < 0.1)
    assert halved(held_out).sum() == pytest.approx(len(held_out) / 2, abs=20)


def test_a_group_of_more_than_half_of_the_queries_is_in_the_second_half():
    sizes, groups = np.array([7, 1, 0, 1, 1]), np.arange(5)
    for seed in range(9):
        assert halve(sizes, groups, Keys(groups, groups), seed=seed).tolist()[0] is False
