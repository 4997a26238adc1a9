"""The account of a mining run, on selections that can be counted by hand."""

from collections import Counter

import numpy as np
import pytest

from embedding_finetune.mining.audit import audit_text, examples, mining_audit, quantiles
from embedding_finetune.mining.choice import Selection

NAN = float("nan")
SELECTIONS = [
    Selection([1, 2, 3], [0.9, 0.5, NAN], kept=1, random_fills=1, dropped=Counter({"a positive": 2, "--max_score": 1})),
    Selection([4], [0.25], kept=0, random_fills=0, dropped=Counter({"--max_score": 3})),
    Selection([], [], kept=0, random_fills=0, dropped=Counter()),
]


def account(**changes):
    found = mining_audit(SELECTIONS, np.array([0.75, 1.0, 0.5]), np.array([0.75, 0.5, 0.5]), wanted=2)
    settings = {"range_for_sampling": [0, 4], "sampling_strategy": "random"}
    rest = {"candidates": 9, "rows_dropped": 1, "seconds": {"encode": 1.25}, "settings": settings}
    return {**found, **rest, **changes}


def test_negatives_are_counted_and_scores_are_those_that_are_known():
    audit = account()
    counts = {
        "rows": 3,
        "negatives": 4,
        "negatives_kept": 1,
        "negatives_drawn_at_random": 1,
        "rows_short_of_negatives": 2,
        "rows_without_negatives": 1,
        "left_out": {"--max_score": 4, "a positive": 2},
    }
    assert {name: audit[name] for name in counts} == counts
    # Known scores: 0.9 and 0.5 beside a positive of 0.75, 0.25 beside one of 0.5.
    assert audit["scores"]["negatives"]["p50"] == pytest.approx(0.5)
    assert audit["scores"]["positives"]["p50"] == pytest.approx(0.75)
    assert audit["scores"]["positive - negative"]["p50"] == pytest.approx(0.25)
    assert audit["negatives_above_their_positive"] == pytest.approx(1 / 3)


def test_without_a_known_score_the_share_above_is_unknown():
    blind = [Selection([1], [NAN], kept=0, random_fills=1, dropped=Counter())]
    audit = mining_audit(blind, np.empty(0), np.array([0.5]), wanted=1)
    assert audit["negatives_above_their_positive"] is None
    assert audit["scores"] == {"positives": {}, "negatives": {}, "positive - negative": {}}
    audit |= {"candidates": 9, "rows_dropped": 0, "seconds": {}}
    assert "negatives above their positive  unknown" in audit_text(audit, wanted=1)


def test_quantiles_are_interpolated():
    assert quantiles(np.arange(11)) == {"p05": 0.5, "p25": 2.5, "p50": 5, "p75": 7.5, "p95": 9.5}
    assert quantiles(np.empty(0)) == {}


def test_the_text_has_every_number_under_its_name_and_warnings_last():
    lines = audit_text(account(), wanted=2).splitlines()
    told = dict(line.split("  ", 1) for line in lines[:-3])
    assert {name: value.strip() for name, value in told.items()} == {
        "rows": "3",
        "candidates": "9",
        "negatives": "4",
        "of them kept from the input": "1",
        "of them drawn at random": "1",
        "rows with fewer than 2": "2",
        "rows dropped": "1",
        "left out: --max_score": "4",
        "left out: a positive": "2",
        "scores: positives": "p05 0.525  p25 0.625  p50 0.750  p75 0.875  p95 0.975",
        "scores: negatives": "p05 0.275  p25 0.375  p50 0.500  p75 0.700  p95 0.860",
        "scores: positive - negative": "p05 -0.110  p25 0.050  p50 0.250  p75 0.250  p95 0.250",
        "negatives above their positive": "33.3%",
        "seconds": "encode 1.2",
    }
    short, at_random, above = lines[-3:]
    assert short.startswith("warning: 2 rows have fewer than 2 negatives: filters refuse many")
    assert at_random.startswith("warning: 25% of the negatives were drawn at random")
    assert above.startswith("warning: 33% of the negatives score above their positive")


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, "2 rows have fewer than 2 negatives: filters refuse many"),
        ({"left_out": {"a positive": 2}}, "2 rows have fewer than 2 negatives: there are too few candidates"),
        (
            {"left_out": {}, "settings": {"range_for_sampling": [2, 4], "sampling_strategy": "top"}},
            "2 rows have fewer than 2 negatives: too few candidates are outside",
        ),
        (
            {"settings": {"range_for_sampling": [9, 12], "sampling_strategy": "top"}},
            "--range_for_sampling starts at rank 9 of 9 candidates",
        ),
        ({"negatives": 0, "negatives_drawn_at_random": 0}, "2 rows have fewer than 2 negatives, and none has any: "),
        ({"rows_short_of_negatives": 0, "negatives_above_their_positive": 0.1, "negatives": 10}, None),
        ({"rows_short_of_negatives": 0, "negatives_above_their_positive": 0.11, "negatives": 10}, "11% of the"),
        ({"rows_short_of_negatives": 0, "negatives_above_their_positive": 0.0, "negatives": 9}, "11% of the"),
    ],
)
def test_the_first_warning_names_the_cause_and_there_is_none_up_to_a_tenth(changes, warning):
    told = [line for line in audit_text(account(**changes), wanted=2).splitlines() if line.startswith("warning")]
    assert told[:1] == [] if warning is None else warning in told[0]


@pytest.mark.parametrize(
    ("start", "strategy", "warned"), [(0, "top", False), (1, "top", True), (0, "random", True), (10, "random", True)]
)
def test_negatives_above_their_positive_are_a_warning_unless_the_very_top_was_asked_for(start, strategy, warned):
    settings = {"range_for_sampling": [start, start + 4], "sampling_strategy": strategy}
    told = audit_text(account(settings=settings), wanted=2).splitlines()[-1]
    assert "33% of the negatives score above their positive" in told
    assert told.startswith("warning: ") == warned
    assert ("right for --neighbours_in_batch" in told) != warned


def test_examples_show_rows_with_signs_and_scores_and_cut_long_texts():
    rows = {
        0: {
            "query": "how\n to",
            "pos": ["yes"],
            "neg": ["no", "x" * 161],
            "pos_scores": [0.5],
            "neg_scores": [0.25, -1],
        },
        6: {"query": "q", "pos": ["p"], "neg": []},
    }
    assert examples(rows).splitlines() == [
        "row 1  how to",
        "  + 0.500  yes",
        "  - 0.250  no",
        f"  - -1.000  {'x' * 159}…",
        "",
        "row 7  q",
        "  + p",
    ]
