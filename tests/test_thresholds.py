"""Precision and coverage as the score moves: worked numbers, and scikit-learn's area."""

import json

import numpy as np
import pytest
from helpers.data import TOPICS, read_jsonl, write_evaluation, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import evaluate
from embedding_finetune.evaluation import thresholds
from embedding_finetune.evaluation.thresholds import FirstPassages, moved, thresholds_of, wilson


def first_passages(scores, right, answerable=None):
    answerable = [True] * len(scores) if answerable is None else answerable
    return FirstPassages(np.array(scores, dtype=np.float32), np.array(right, bool), np.array(answerable, bool))


TEN = first_passages([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05], [1, 1, 1, 1, 0, 1, 1, 0, 0, 0])


def target_of(found, precision):
    return next(target for target in found["targets"] if target["precision"] == precision)


def test_the_lowest_threshold_is_where_precision_is_still_reached():
    # Precision from the top: 1, 1, 1, 1, 4/5, 5/6, 6/7, 6/8, 6/9, 6/10.
    found = thresholds_of(TEN, seed=0)
    at_80 = target_of(found, 0.8)
    assert (at_80["threshold"], at_80["answered"]) == (pytest.approx(0.3), pytest.approx(0.7))
    at_90 = target_of(found, 0.9)
    assert (at_90["threshold"], at_90["answered"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert target_of(found, 0.95)["threshold"] == pytest.approx(0.6)
    assert at_80["threshold_low"] <= 0.31
    assert at_80["threshold_high"] >= 0.29
    assert at_80["answered_low"] <= 0.7 <= at_80["answered_high"]
    nothing = [at_80[name] for name in ("refused", "refused_low", "refused_high")]
    assert nothing + [found[name] for name in ("area", "area_low", "area_high")] == [None] * 6
    assert [point["precision"] for point in found["curve"]][-3:] == pytest.approx([6 / 8, 6 / 9, 6 / 10])
    assert [point["answered"] for point in found["curve"]][-1] == 1


def test_the_curves_intervals_are_wilsons():
    low, high = wilson(np.array([3, 0, 8]), np.array([3, 4, 10]))
    assert low == pytest.approx([0.4385, 0.0, 0.4902], abs=1e-4)
    assert high == pytest.approx([1.0, 0.4899, 0.9433], abs=1e-4)
    found = thresholds_of(first_passages([0.9, 0.8, 0.7], [1, 1, 1]), seed=0)
    assert (found["curve"][-1]["low"], found["curve"][-1]["high"]) == pytest.approx((low[0], 1))


def test_questions_of_one_score_are_answered_together():
    found = thresholds_of(first_passages([0.5, 0.5, 0.5, 0.4], [1, 0, 1, 1]), seed=0)
    assert [point["precision"] for point in found["curve"]] == pytest.approx([2 / 3, 3 / 4])
    assert target_of(found, 0.8)["threshold"] is None
    assert target_of(found, 0.8)["answered"] == 0
    assert target_of(found, 0.8)["on_new_questions"] is None


def test_questions_without_an_answer_are_answered_wrongly_or_refused():
    first = first_passages([0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 1, 0, 1], [True, False, True, False, True])
    found = thresholds_of(first, seed=0)
    at_80 = target_of(found, 0.8)
    assert (at_80["threshold"], at_80["answered"]) == (pytest.approx(0.9), pytest.approx(1 / 3))
    assert at_80["refused"] == 1.0
    assert found["area"] == pytest.approx(3 / 6)  # of the pairs .9 > .8, .9 > .6, .7 > .6


def test_what_is_refused_and_the_area_have_the_intervals_of_the_same_rounds():
    """400 right answers at 0.9; of 200 questions without one, 50 have that score too, and 150 have 0.1.

    Precision at 0.9 is 400 / 450, at 0.1 400 / 600, each far enough from 0.8 that every round chooses 0.9.
    """
    first = first_passages([0.9] * 450 + [0.1] * 150, [1] * 400 + [0] * 200, [True] * 400 + [False] * 200)
    found = thresholds_of(first, seed=0)
    at_80 = target_of(found, 0.8)
    assert (at_80["threshold_low"], at_80["threshold_high"]) == pytest.approx((0.9, 0.9))
    half = 1.96 * (0.75 * 0.25 / 200) ** 0.5  # of a share of 200 questions
    assert at_80["refused"] == pytest.approx(0.75)
    assert (at_80["refused_low"], at_80["refused_high"]) == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)
    # Those refused score below all answers, the others score the same, which counts half.
    assert found["area"] == pytest.approx(0.875)
    for end in ("low", "high"):
        assert found[f"area_{end}"] == pytest.approx((1 + at_80[f"refused_{end}"]) / 2)


def test_a_round_without_a_question_that_has_no_answer_is_left_out():
    # One of 40 has none. A third of the rounds do not draw it. The others answer it: 80% are right all the same.
    first = first_passages([0.9] * 39 + [0.5], [1] * 39 + [0], [True] * 39 + [False])
    found = thresholds_of(first, seed=0)
    at_80 = target_of(found, 0.8)
    assert (at_80["refused"], at_80["refused_low"], at_80["refused_high"]) == (0, 0, 0)
    assert (found["area"], found["area_low"], found["area_high"]) == (1, 1, 1)


def test_where_no_question_has_an_answer_nothing_is_said_of_those_that_have():
    first = first_passages([0.9, 0.8], [0, 0], [False, False])
    found = thresholds_of(first, seed=0)
    assert (found["area"], target_of(found, 0.8)["threshold"], target_of(found, 0.8)["refused"]) == (None, None, 1.0)
    assert moved(thresholds_of(TEN, seed=0), found, first)[0]["answered"] == 0


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12
    )
)
def test_the_area_is_scikit_learns_however_often_a_question_was_drawn(rows):
    scores, answerable, drawn = map(np.array, zip(*rows))
    by_score = thresholds._Sorted(first_passages(scores, [False] * len(scores), answerable))
    area = by_score.area(drawn[np.argsort(-scores, kind="stable")])
    if len(set(answerable[drawn > 0])) == 2:
        assert area == pytest.approx(roc_auc_score(answerable, scores, sample_weight=drawn))
    else:
        assert area is None


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.sampled_from("rwu"), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    ).filter(lambda rows: any(drawn for *_, drawn in rows))
)
def test_a_round_agrees_with_counting_the_questions_that_it_drew(rows):
    """r: right, w: wrong, u: without an answer."""
    rows = sorted(rows, key=lambda row: -row[0])
    scores, kinds, drawn = zip(*rows)
    first = first_passages(scores, [kind == "r" for kind in kinds], [kind != "u" for kind in kinds])
    found = thresholds._round(thresholds._Sorted(first), np.array(drawn, dtype=np.float64))
    sample = [(score, kind) for score, kind, times in rows for _ in range(times)]
    for target, (_, answered, refused, *_) in zip(thresholds.TARGETS, found):
        right_from = {low: [kind == "r" for score, kind in sample if score >= low] for low, _ in sample}
        lowest = min((low for low, right in right_from.items() if np.mean(right) >= target), default=np.inf)
        with_answer = [score >= lowest for score, kind in sample if kind != "u"]
        without = [score < lowest for score, kind in sample if kind == "u"]
        assert answered == pytest.approx(np.mean(with_answer) if with_answer else 0)
        assert np.isnan(refused) if not without else refused == pytest.approx(np.mean(without))


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=1, max_size=15))
def test_thresholds_and_curve_agree_with_counting(rows):
    first = first_passages(*zip(*rows))
    found = thresholds_of(first, seed=1)

    def precision_at(threshold):
        return first.right[first.scores >= threshold].mean()

    for point in found["curve"]:
        assert point["precision"] == pytest.approx(precision_at(point["threshold"]))
        assert point["answered"] == pytest.approx((first.scores >= point["threshold"]).mean())
        assert point["low"] <= point["precision"] + 1e-9
        assert point["high"] >= point["precision"] - 1e-9
    for target in found["targets"]:
        good = [score for score in set(first.scores.tolist()) if precision_at(score) >= target["precision"]]
        assert target["threshold"] == (min(good) if good else None)


def test_what_is_expected_on_new_questions_is_what_they_give():
    """Right with probability equal to the score: precision above t is (1 + t) / 2."""
    for target, count in ((0.8, 100), (0.9, 100), (0.9, 400)):
        expected, true, promised = [], [], []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            scores = rng.random(count)
            found = target_of(thresholds_of(first_passages(scores, rng.random(count) < scores), seed=seed), target)
            if found["threshold"] is not None:
                expected.append(found["on_new_questions"])
                true.append((1 + found["threshold"]) / 2)
                promised.append(target)
        assert np.mean(expected) == pytest.approx(np.mean(true), abs=0.012)
        assert np.mean(true) < np.mean(promised) + 0.003  # what was chosen for being good is not as good


def test_thresholds_of_one_model_are_tried_with_the_scores_of_another():
    tuned = first_passages([0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    before, after = thresholds_of(TEN, seed=0), thresholds_of(tuned, seed=0)
    rows = moved(before, after, tuned)
    assert [row["precision"] for row in rows] == [0.8, 0.9, 0.95]
    given = {"now": 1.0, "answered": pytest.approx(0.5), "use": pytest.approx(0.05)}
    assert rows[0] == {"precision": 0.8, "threshold": pytest.approx(0.3), **given}
    assert rows[1]["now"] is None  # no score is so high any more
    assert rows[1]["use"] == pytest.approx(0.15)


def test_the_seed_decides_the_intervals():
    rng = np.random.default_rng(0)
    scores = rng.random(500)
    first = first_passages(scores, rng.random(500) < scores)
    assert thresholds_of(first, seed=3) == thresholds_of(first, seed=3)
    assert thresholds_of(first, seed=3) != thresholds_of(first, seed=4)


@pytest.fixture
def data(tmp_path):
    """Ten questions with an answer, and three without."""
    return write_evaluation(tmp_path, ("red light", "who is it", "my badge"))


def test_evaluate_tells_thresholds_of_the_models_that_embed_and_measures_answered_questions_alone(
    tiny_bert, other_bert, data, tmp_path, capsys, caplog
):
    caplog.set_level("INFO")
    one, other, output = str(tiny_bert), str(other_bert), tmp_path / "out"
    names = ["bm25", one, other]
    metrics = evaluate.main(["--model_name", *names, *data, "--thresholds", "--output_dir", str(output)])
    out = capsys.readouterr()
    assert "3 further questions have no answer: they are in no measure" in caplog.text
    assert f"{one}: first passage right" in out.out
    assert "bm25: first passage right" not in out.out
    document = json.loads((output / "metrics.json").read_text())
    records = read_jsonl(output / "per_query.jsonl")
    assert document["queries"] == len(TOPICS)
    assert [record.get("answerable") for record in records] == [None] * len(TOPICS) + [False] * 3
    assert [record["query"] for record in records[len(TOPICS) :]] == ["red light", "who is it", "my badge"]
    for record in records[len(TOPICS) :]:
        assert {name: found["ranks"] for name, found in record["models"].items()} == {name: [] for name in names}
        assert [len(record["models"][name]["top"]) for name in (one, other)] == [10, 10]
    assert list(document["thresholds"]["models"]) == [one, other]
    for name in (one, other):
        found = document["thresholds"]["models"][name]
        assert found["curve"][-1]["precision"] == pytest.approx(metrics[name]["Hit@1"] * 10 / 13)
        assert 0 <= found["area"] <= 1
    assert (document["thresholds"]["moved"]["from"], document["thresholds"]["moved"]["to"]) == (one, other)
    for line in document["thresholds"]["moved"]["targets"]:
        assert f"{one}'s threshold {line['threshold']:.4f} for {line['precision']:.0%}" in out.out
    without = write_jsonl(tmp_path / "answered.jsonl", [row for row in read_jsonl(tmp_path / "q.jsonl") if row["pos"]])
    assert evaluate.main(["--model_name", *names, *data[:3], str(without)]) == metrics


def test_without_the_flag_a_row_without_answers_is_the_error_it_was(tiny_bert, data, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", str(tiny_bert), *data])
    assert exit.value.code == 2
    assert 'q.jsonl:5: "pos" is empty, expected at least one string' in capsys.readouterr().err


def test_ids_are_those_of_the_places_in_the_file(tiny_bert, data, tmp_path):
    output = tmp_path / "out"
    evaluate.main(["--model_name", str(tiny_bert), *data, "--thresholds", "--output_dir", str(output)])
    ids = [row["id"] for row in read_jsonl(output / "per_query.jsonl")]
    assert ids == [f"{number:02d}" for number in (0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 4, 5, 6)]


def test_only_questions_without_an_answer_are_the_error_they_were(tiny_bert, data, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "none.jsonl", [{"query": "a", "pos": []}])
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", str(tiny_bert), *data[:3], str(rows), "--thresholds"])
    assert exit.value.code == 2
    assert 'none.jsonl:1: "pos" is empty, expected at least one string' in capsys.readouterr().err


def test_bm25_alone_has_no_thresholds(data, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", "bm25", *data, "--thresholds"])
    assert exit.value.code == 2
    assert "--thresholds: scores of bm25 and of fusions mean nothing by themselves" in capsys.readouterr().err
