"""Which passages are in doubt, in which order, and what a line says of one."""

import math

import numpy as np
from helpers.data import read_jsonl
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.retrieval import doubts as doubts_module
from embedding_finetune.retrieval.doubts import Standing, Witness, find_doubts, write_doubts
from embedding_finetune.retrieval.top_k import Ranking

NAN = math.nan


def witness(*rankings, known=None):
    """rankings: for each query, position -> score, best first."""
    width = max(map(len, rankings))
    positions = [[*ranking, *[-1] * (width - len(ranking))] for ranking in rankings]
    scores = [[*ranking.values(), *[-math.inf] * (width - len(ranking))] for ranking in rankings]
    return Witness(
        Ranking(np.array(positions), np.array(scores, dtype=np.float32)),
        np.full(len(rankings), NAN) if known is None else np.array(known),
    )


def passages(found):
    return [(doubt.query, doubt.passage) for doubt in found]


def test_a_passage_above_the_right_one_or_within_5_percent_below_is_in_doubt():
    ranked = {5: 0.9, 7: 0.81, 1: 0.8, 2: 0.761, 3: 0.759, 4: 0.1}  # 1 is right, and 0.8 * 0.95 is 0.76
    assert passages(find_doubts({"m": witness(ranked)}, [1], lambda _: ())) == [(0, 5), (0, 7), (0, 2)]
    assert passages(find_doubts({"m": witness(ranked)}, [1], lambda _: {7})) == [(0, 5), (0, 2)]
    assert find_doubts({"m": witness(ranked)}, [-1], lambda _: ()) == []


def test_where_the_right_score_is_negative_close_is_still_below():
    ranked = {1: -0.8, 2: -0.83, 3: -0.85}
    assert passages(find_doubts({"m": witness(ranked)}, [1], lambda _: ())) == [(0, 2)]


def test_doubts_of_more_models_come_first_then_those_that_stand_higher_then_the_closer():
    one = witness({2: 0.9, 1: 0.8}, {4: 0.9, 1: 0.5}, {5: 0.9, 6: 0.8, 1: 0.7}, {7: 0.9, 1: 0.8})
    two = witness({1: 0.9, 2: 0.1}, {4: 0.9, 1: 0.5}, {5: 0.9, 6: 0.8, 1: 0.7}, {1: 0.9, 7: 0.89})
    found = find_doubts({"one": one, "two": two}, [1] * 4, lambda _: ())
    assert passages(found) == [(1, 4), (2, 5), (2, 6), (3, 7), (0, 2)]


def test_a_model_that_has_not_found_the_right_passage_among_ten_does_not_count():
    lost = {position: 1 - position / 100 for position in range(20, 31)} | {1: 0.1}
    near = {2: 0.9, 1: 0.8}
    found = find_doubts({"m": witness(lost, near)}, [1, 1], lambda _: ())
    assert found[0][:2] == (1, 2)
    assert len(found) == 1 + 10  # of eleven passages above it those that are among the first ten


def test_a_right_passage_beyond_the_ranking_is_known_by_its_score_where_there_is_one():
    ranked = {2: 0.9, 3: 0.8, 4: 0.7}
    assert passages(find_doubts({"m": witness(ranked)}, [1], lambda _: ())) == [(0, 2), (0, 3), (0, 4)]
    found = find_doubts({"m": witness(ranked, known=[0.85])}, [1], lambda _: ())
    assert passages(found) == [(0, 2)]  # 0.85 * 0.95 is above 0.8
    assert found[0].standings == {"m": Standing(1, np.float32(0.9), None, 0.85)}


@given(
    st.lists(st.permutations(range(6)), min_size=1, max_size=4),
    st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6, unique=True),
)
def test_doubts_are_what_a_loop_over_all_passages_finds(orders, scores):
    scores = sorted(scores, reverse=True)
    witnesses = {str(n): witness(dict(zip(order, scores))) for n, order in enumerate(orders)}
    expected = set()
    for order in orders:
        right = order.index(0)
        for rank, passage in enumerate(order):
            close = scores[rank] - scores[right] >= -0.05 * max(abs(scores[right]), 1e-9)
            if passage not in (0, 3) and (rank < right or close):
                expected.add((0, passage))
    assert set(passages(find_doubts(witnesses, [0], lambda _: {3}))) == expected


def test_lines_have_both_texts_once_and_no_more_than_fit(tmp_path, monkeypatch, caplog):
    ranked = {2: 0.9, 3: 0.85, 1: 0.8}
    found = find_doubts({"m": witness(ranked, ranked, ranked)}, [1] * 3, lambda _: ())
    texts = ["", "right", "doubt", "another"]
    path = tmp_path / "d.jsonl"
    monkeypatch.setattr(doubts_module, "MOST_DOUBTS", 3)
    with caplog.at_level("INFO"):
        write_doubts(str(path), found, ["q", "other", " q "], texts)
    assert [(line["query"], line["passage"]) for line in read_jsonl(path)] == [
        ("q", "doubt"),
        ("other", "doubt"),
        ("q", "another"),
    ]
    assert read_jsonl(path)[0] == {
        "query": "q",
        "passage": "doubt",
        "relevant": None,
        "positive": "right",
        "models": {"m": {"rank": 1, "score": 0.9, "positive_rank": 3, "positive_score": 0.8}},
    }
    assert "6 passages may be answers that nobody labelled; the 3 most damaging are there" in caplog.text
