"""Which rows to keep out of training: groups of rows that belong together, drawn whole.

A split by rows leaks: the same passage, or the same question in other words, then stands on both sides. Here rows that
have a key in common are one group. Whether a group is held out depends on a hash of the seed and of the group alone:
rows that are appended move no group but those that they join.

Shapes: R rows, N keys of all rows, G groups.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = {
    "passage": "questions about passages that no training row answers with",
    "question": "new questions about passages that training may know",
}
"""What rows may be held out by, beside a field of theirs -> what a measure on them is about."""


def what_is_new(by: str) -> str:
    """What a measure on rows that were held out by a kind, or by a field, is about."""
    return KINDS.get(by, f"questions of rows with a {by!r} that no training row has")


class Keys(NamedTuple):
    """What ties rows: two rows with the same number are tied.

    rows: (N,) int64, which row has the key. numbers: (N,) int64, the key.
    """

    rows: np.ndarray
    numbers: np.ndarray


def tie(count: int, ties: Sequence[Keys]) -> np.ndarray:
    """The group, numbered from 0, of each of `count` rows: (R,) int64.

    Rows are in one group if they have a key of one of `ties` in common, or are joined by a chain of rows that have.
    """
    edges = [_neighbours(keys) for keys in ties]
    first, second = (np.concatenate([edge[side] for edge in edges]) for side in (0, 1))
    group = np.arange(count)  # known by its smallest row
    while len(first):
        # Each group joins the smallest that it is tied to, then all members learn the name of what they joined: the
        # number of groups that go on falls at least by half in two rounds, also along a chain.
        smaller, larger = np.minimum(group[first], group[second]), np.maximum(group[first], group[second])
        np.minimum.at(group, larger, smaller)
        while not np.array_equal(farther := group[group], group):
            group = farther
        apart = group[first] != group[second]
        first, second = first[apart], second[apart]
    return np.unique(group, return_inverse=True)[1]


def _neighbours(keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows with the same key, enough to join all rows that have it."""
    order = np.argsort(keys.numbers, kind="stable")
    rows, numbers = keys.rows[order], keys.numbers[order]
    same = numbers[1:] == numbers[:-1]
    return rows[:-1][same], rows[1:][same]


def places(groups: np.ndarray, members: Keys, *, seed: int | str) -> np.ndarray:
    """Where each group that has members stands in the order in which they are drawn: (G,) float64 in [0, 1).

    It is a hash of the seed and of the group's smallest member. groups: (R,), as tie gives them. members: what groups
    are known by.
    """
    owners = groups[members.rows]
    order = np.lexsort((members.numbers, owners))
    _, first = np.unique(owners[order], return_index=True)
    return np.array([_share(f"{seed}:{member}") for member in members.numbers[order][first].tolist()])


def _share(name: str) -> float:
    """A number in [0, 1) that stands for a name."""
    return (int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 11) / 2**53


def how_many(asked: float, queries: int) -> int:
    """How many of the queries are asked for: by a share below 1, or by a number from 1 on."""
    # 0.29 * 100 is 28.999999999999996 in floating point.
    return math.floor(asked * queries + 1e-9) if asked < 1 else int(asked)


def halve(sizes: np.ndarray, groups: np.ndarray, members: Keys, *, seed: int) -> np.ndarray:
    """Which groups make up the first of two halves, of about as many queries: (G,) bool.

    sizes: (G,) int64, queries of each group that is to be halved, else 0. groups, members: as for `places`. The hash is
    not that by which groups are held out: those that are have small ones.
    """
    there = sizes > 0
    within = there[groups[members.rows]]
    order = places(groups, Keys(members.rows[within], members.numbers[within]), seed=f"{seed}:half")
    half = np.zeros(len(sizes), dtype=bool)
    half[there] = draw(sizes[there], order, 0.5)
    return half


def draw(sizes: np.ndarray, order: np.ndarray, asked: float) -> np.ndarray:
    """Which groups are held out: (G,) bool; none where all are too large.

    sizes: (G,) int64, queries of each group. order: (G,), what `places` gives. asked: see how_many.

    Groups with more queries than are asked for stay. A share takes the groups whose place is below it: then no group
    depends on the others, and the number of queries is near the share, since places are spread evenly. Where it is off
    by more than half, and where a number is asked for, groups are taken in their order while they fit.
    """
    queries = int(sizes.sum())
    count = how_many(asked, queries)
    if asked < 1:
        below = (order < asked) & (sizes <= count)
        if abs(int(sizes[below].sum()) - count) <= min(count, queries - count) / 2:
            return below
    taken = np.zeros(len(sizes), dtype=bool)
    left = count
    for group in np.argsort(order, kind="stable").tolist():
        if sizes[group] <= left:
            taken[group] = True
            left -= int(sizes[group])
    return taken
