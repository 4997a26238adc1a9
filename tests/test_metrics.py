import itertools
import math
import tracemalloc

import numpy as np
import pytest
from helpers.running import search
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.evaluation.metrics import (
    MEASURES,
    Judged,
    compare,
    holm,
    judged_of,
    means,
    per_query,
    relevance_of,
)

# Four queries over a corpus of five passages; answers beyond them are not in the corpus.
POSITIONS = np.array([[3, 1, 0], [2, 4, 1], [0, 1, 2], [4, -1, -1]])
RELEVANT = [{3: 1}, {1: 1, 4: 1}, {5: 1}, {0: 1, 6: 1}]


def binary(counts):
    """Judgements of as many answers to each query, none better than another."""
    return Judged(np.array(counts), np.ones(sum(counts), dtype=int))


def measured(names, cutoffs):
    return means(per_query(relevance_of(POSITIONS, RELEVANT), judged_of(RELEVANT), names, cutoffs))


def test_mrr_and_hit_worked_by_hand():
    # First relevant rank: 1, 2 (of two relevant ones), none, none.
    assert measured(["MRR", "Hit"], [1, 2, 3]) == pytest.approx(
        {
            "MRR@1": 1 / 4,
            "Hit@1": 1 / 4,
            "MRR@2": (1 + 1 / 2) / 4,
            "Hit@2": 2 / 4,
            "MRR@3": (1 + 1 / 2) / 4,
            "Hit@3": 2 / 4,
        }
    )


def test_the_other_measures_worked_by_hand():
    # Query 1 has its answers at ranks 2 and 3: nDCG (1/log2 3 + 1/log2 4) / (1 + 1/log2 3).
    assert measured(["Recall", "Precision", "MAP", "nDCG"], [3]) == pytest.approx(
        {
            "Recall@3": (1 + 2 / 2) / 4,
            "Precision@3": (1 / 3 + 2 / 3) / 4,
            "MAP@3": (1 + (1 / 2 + 2 / 3) / 2) / 4,
            "nDCG@3": (1 + (1 / np.log2(3) + 1 / 2) / (1 + 1 / np.log2(3))) / 4,
        }
    )


def test_mrr_at_1_is_hit_at_1():
    rng = np.random.default_rng(0)
    values = per_query(rng.random((200, 10)) < 0.2, binary([1] * 200), ["MRR", "Hit"], [1])
    assert np.array_equal(values["MRR@1"], values["Hit@1"])


def test_places_past_the_end_of_a_small_corpus_are_never_relevant():
    assert not relevance_of(np.array([[-1, -1]]), [{0: 1, 1: 1}]).any()


def test_a_cutoff_beyond_the_ranking_counts_what_is_there():
    values = means(per_query(np.array([[False, True]]), binary([1]), list(MEASURES), [50]))
    assert values == pytest.approx(
        {"MRR@50": 0.5, "Hit@50": 1, "Recall@50": 1, "nDCG@50": 1 / np.log2(3), "MAP@50": 0.5, "Precision@50": 0.02}
    )


@settings(max_examples=50)
@given(
    queries=st.integers(1, 6),
    corpus=st.integers(1, 30),
    cutoff=st.sampled_from([1, 3, 5, 10, 100]),
    seed=st.integers(0, 10_000),
)
def test_every_measure_equals_pytrec_eval_with_ties_grades_and_missing_positives(queries, corpus, cutoff, seed):
    import pytrec_eval

    rng = np.random.default_rng(seed)
    # Small integers: scores tie often, and are exact.
    q, p = (rng.integers(-1, 2, (count, 2)).astype(np.float32) for count in (queries, corpus))
    scores, positions = search(q, p, cutoff, ties="last")
    judged = [dict(rng.integers([0, -1], [corpus + 3, 4], (rng.integers(1, 9), 2)).tolist()) for _ in range(queries)]
    for grades in judged:
        grades[int(rng.integers(0, corpus + 3))] = int(rng.integers(1, 4))  # trec_eval leaves out queries without
    relevant = [{position: grade for position, grade in grades.items() if grade > 0} for grades in judged]
    ours = per_query(relevance_of(positions, relevant), judged_of(relevant), list(MEASURES), [cutoff])

    docid = "{:09d}".format
    run = {str(n): {docid(d): float(s) for d, s in zip(positions[n], scores[n]) if d >= 0} for n in range(queries)}
    qrels = {str(n): {docid(d): grade for d, grade in judged[n].items()} for n in range(queries)}
    names = {
        "MRR": "recip_rank",
        "Hit": f"success_{cutoff}",
        "Recall": f"recall_{cutoff}",
        "nDCG": f"ndcg_cut_{cutoff}",
        "MAP": f"map_cut_{cutoff}",
        "Precision": f"P_{cutoff}",
    }
    asked = {f"{name.rsplit('_', 1)[0]}.{cutoff}" for name in names.values() if name[-1].isdigit()} | {"recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate(run)
    for (name, trec), n in itertools.product(names.items(), range(queries)):
        assert ours[f"{name}@{cutoff}"][n] == pytest.approx(theirs[str(n)][trec], abs=1e-9), (name, n)


def test_ndcg_worked_by_hand_with_grades():
    # Found: grades 1 and 3 at ranks 1 and 3. The ideal begins 3, 2, 1; the document of grade 2 is not in the corpus.
    relevant = [{0: 1, 2: 3, 9: 2}]
    relevance = relevance_of(np.array([[0, 1, 2]]), relevant)
    values = per_query(relevance, judged_of(relevant), ["nDCG", "Recall"], [1, 3])
    assert values["nDCG@1"] == pytest.approx([1 / 3])
    assert values["nDCG@3"] == pytest.approx([(1 + 3 / 2) / (3 + 2 / np.log2(3) + 1 / 2)])
    assert values["Recall@3"] == pytest.approx([2 / 3])


def exact_p_value(differences):
    """Every assignment of signs."""
    observed = abs(np.mean(differences))
    signs = itertools.product([-1, 1], repeat=len(differences))
    return np.mean([abs(np.mean(np.multiply(s, differences))) >= observed - 1e-12 for s in signs])


def test_the_p_value_is_the_share_of_sign_flips_as_extreme():
    base = np.array([0.5, 0.2, 1.0, 0.0, 0.3, 0.1, 0.5, 0.25])
    other = base + np.array([0.1, 0.2, -0.05, 0.3, 0.1, 0.2, -0.05, 0.0])
    result = compare(base, other, seed=0, rounds=40_000)
    assert result.p_value == pytest.approx(exact_p_value(other - base), abs=0.01)
    assert result.mean == pytest.approx(0.1)


def test_the_interval_is_that_of_resampled_queries():
    rng = np.random.default_rng(0)
    base, other = rng.random(200), rng.random(200) + 0.1
    result = compare(base, other, seed=1)
    draws = np.random.default_rng(2).choice(other - base, (10_000, 200)).mean(axis=1)
    assert (result.low, result.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.005)


def test_many_distinct_differences_give_what_the_normal_distribution_gives():
    """By the central limit theorem. So many are drawn query by query."""
    differences = np.random.default_rng(0).normal(0.02, 1, 20_000)
    result = compare(np.zeros(len(differences)), differences, seed=0)
    mean, deviation = differences.mean(), differences.std() / np.sqrt(len(differences))
    assert result.mean == pytest.approx(mean)
    assert (result.low, result.high) == pytest.approx(
        (mean - 1.96 * deviation, mean + 1.96 * deviation), abs=0.1 * deviation
    )
    by_chance = math.sqrt((differences**2).sum()) / len(differences)  # the deviation of the mean with random signs
    assert result.p_value == pytest.approx(math.erfc(mean / by_chance / math.sqrt(2)), abs=0.003)
    assert compare(np.zeros(len(differences)), differences, seed=0) == result
    assert compare(differences, np.zeros(len(differences)), seed=0).p_value == result.p_value


def test_rounds_that_are_drawn_in_blocks_are_those_of_one():
    differences = np.random.default_rng(0).integers(-300, 300, 1500) / 300
    result = compare(np.zeros(len(differences)), differences, seed=5)
    rng = np.random.default_rng(5)
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    flipped = (2 * rng.binomial(counts, 0.5, size=(10_000, len(counts))) - counts) @ sizes / len(differences)
    extreme = (np.abs(flipped) >= abs(differences.mean()) - 1e-12).sum()
    assert result.p_value == (extreme + 1) / 10_001
    values, counts = np.unique(differences, return_counts=True)
    means_of_drawn = rng.multinomial(len(differences), counts / len(differences), size=10_000) @ values
    expected = np.quantile(means_of_drawn / len(differences), [0.025, 0.975])
    assert (result.low, result.high) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("queries", [4_000, 20_000])
def test_comparing_takes_little_memory_however_many_differences_there_are(queries):
    differences = np.random.default_rng(0).normal(0, 1, queries)
    tracemalloc.start()
    compare(np.zeros(queries), differences, seed=0, rounds=2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e7  # all numbers of the first case at once are 64 MB, and there were several such arrays


def test_equal_models_are_not_different_and_the_seed_decides_the_rest():
    scores = np.random.default_rng(0).random(50)
    assert compare(scores, scores, seed=0) == (0, 0, 0, 1)
    other = scores[::-1].copy()
    assert compare(scores, other, seed=3) == compare(scores, other, seed=3)


def test_a_cutoff_far_beyond_any_rank_costs_nothing_and_changes_precision_alone():
    relevance, judged = relevance_of(POSITIONS, RELEVANT), binary([1, 2, 1, 3])
    near = per_query(relevance, judged, list(MEASURES), [3])
    far = per_query(relevance, judged, list(MEASURES), [10**12])
    for name in ("MRR", "Hit", "Recall", "nDCG", "MAP"):
        assert far[f"{name}@{10**12}"] == pytest.approx(near[f"{name}@3"])
    assert far[f"Precision@{10**12}"].tolist() == [1e-12, 2e-12, 0, 0]
    assert MEASURES["Precision"](relevance, judged, 10**400) == pytest.approx(0)
    # Answers that no ranking holds count in the ideal one: 4 relevant texts, 1 found at rank 1 of 1.
    ideal = 1 + 1 / np.log2(3) + 1 / 2 + 1 / np.log2(5)
    assert MEASURES["nDCG"](np.array([[1]]), binary([4]), 10**12) == pytest.approx([1 / ideal])


def test_corrected_p_values_are_holms():
    # 4 * 0.01, then 3 * 0.02 and 2 * 0.03, which is no less, then 0.04 itself, which may not be less than 0.06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_no_correction_lowers_a_p_value_or_changes_the_order(p_values):
    corrected = holm(p_values)
    assert all(value >= p or value == 1 for value, p in zip(corrected, p_values))
    assert max(corrected) <= 1
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()
    # Holm rejects what step by step is below the level that the remaining number leaves.
    for level in (0.05, 0.3):
        rejected = 0
        while rejected < len(p_values) and p_values[order[rejected]] * (len(p_values) - rejected) <= level:
            rejected += 1
        assert sum(value <= level for value in corrected) == rejected
