"""Doubts of mining, and the way back: what was judged decides which negatives are mined."""

import numpy as np
import pytest
from helpers.data import read_jsonl, write_jsonl
from helpers.mining import SENTENCES, mine, similarity, write_data

FLAGS = ("--range_for_sampling", "0-8", "--negative_number", "4", "--sampling_strategy", "top")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def judge(line, relevant):
    return {"query": line["query"], "passage": line["passage"], "relevant": relevant}


def test_doubts_are_the_unlabelled_candidates_above_the_best_positive_or_just_below(tiny_bert, data, tmp_path):
    doubts = tmp_path / "doubts.jsonl"
    rows, _ = mine(tiny_bert, data, tmp_path, *FLAGS, "--doubts_file", doubts)
    scores = similarity(tiny_bert, [row["query"] for row in rows], SENTENCES)
    expected = {}
    for row, own in zip(rows, scores):
        right = max(own[SENTENCES.index(text)] for text in row["pos"])
        for rank, place in enumerate(np.argsort(-own, kind="stable")[:8], start=1):
            if SENTENCES[place] not in row["pos"] and own[place] >= 0.95 * right:
                expected[row["query"], SENTENCES[place]] = rank
    found = {(line["query"], line["passage"]): line["models"][str(tiny_bert)] for line in read_jsonl(doubts)}
    assert {pair: standing["rank"] for pair, standing in found.items()} == expected
    for (query, passage), standing in found.items():
        number = [row["query"] for row in rows].index(query)
        assert standing["score"] == pytest.approx(scores[number][SENTENCES.index(passage)], abs=2e-6)
        right = max(scores[number][SENTENCES.index(text)] for text in rows[number]["pos"])
        assert standing["positive_score"] == pytest.approx(right, abs=2e-6)


def test_all_retrievers_and_the_reranker_bear_witness(tiny_bert, other_bert, tiny_reranker, data, tmp_path):
    doubts = tmp_path / "doubts.jsonl"
    flags = (*FLAGS, "--reranker_name_or_path", tiny_reranker, "--doubts_file", doubts)
    mine([tiny_bert, "bm25", other_bert], data, tmp_path, *flags)
    names = [str(tiny_bert), "bm25", str(other_bert), str(tiny_reranker)]
    lines = read_jsonl(doubts)
    assert all(list(line["models"]) == names for line in lines)
    assert all(line["models"][name]["positive_score"] is not None for line in lines for name in (names[0], names[3]))


def test_what_was_judged_comes_first_or_never_whatever_filters_say_and_is_asked_no_more(
    tiny_bert, data, tmp_path, caplog
):
    doubts = tmp_path / "doubts.jsonl"
    plain, _ = mine(tiny_bert, data, tmp_path, *FLAGS, "--doubts_file", doubts)
    of_first = [line for line in read_jsonl(doubts) if line["query"] == plain[0]["query"]]
    assert len(of_first) >= 3
    true, *false = of_first[:3]
    lines = [judge(true, True), *(judge(line, False) for line in false), judge({"query": "x", "passage": "y"}, True)]
    judgements = write_jsonl(tmp_path / "j.jsonl", lines)
    flags = (*FLAGS, "--judgements", judgements, "--max_score", "-0.5", "--near_duplicate_threshold", "0.5")
    with caplog.at_level("INFO"):
        mined, audit = mine(tiny_bert, data, tmp_path, *flags, "--doubts_file", doubts)
    refused = [line["passage"] for line in false]
    assert mined[0]["pos"] == [*plain[0]["pos"], true["passage"]]
    assert mined[0]["neg"] == refused  # the filters leave nothing else
    assert all(row["neg"] == [] for row in mined[1:])
    assert (audit["negatives_confirmed"], audit["negatives_kept"]) == (2, 0)
    assert audit["negatives_above_their_positive"] is None
    assert "3 of 4 judgements are about its queries, and add 1 positives" in caplog.text
    assert "of them judged" in caplog.text
    asked = {(line["query"], line["passage"]) for line in read_jsonl(doubts)}
    assert not asked & {(line["query"], line["passage"]) for line in of_first[:3]}


def test_confirmed_negatives_precede_those_of_the_input_and_need_no_place_in_the_pool(tiny_bert, data, tmp_path):
    rows = read_jsonl(data[0])
    outside = "Nobody has this passage in a pool."
    rows[0]["neg"] = [text for text in SENTENCES if text not in rows[0]["pos"]][:3]
    write_jsonl(data[0], rows)
    lines = [{"query": rows[0]["query"], "passage": text, "relevant": False} for text in (outside, rows[0]["neg"][2])]
    judgements = write_jsonl(tmp_path / "j.jsonl", lines)
    flags = (*FLAGS, "--judgements", judgements, "--save_scores")
    mined, audit = mine(tiny_bert, data, tmp_path, *flags, "--keep_existing_negatives")
    assert mined[0]["neg"] == [outside, rows[0]["neg"][2], *rows[0]["neg"][:2]]
    assert (audit["negatives_confirmed"], audit["negatives_kept"]) == (2, 2)
    scores = similarity(tiny_bert, [rows[0]["query"]], [outside])
    assert mined[0]["neg_scores"][0] == pytest.approx(scores[0, 0], abs=2e-6)
    without, _ = mine(tiny_bert, data, tmp_path, *flags)
    assert without[0]["neg"][:2] == [outside, rows[0]["neg"][2]]
    assert len(without[0]["neg"]) == 4
