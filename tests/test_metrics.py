import numpy as np
import pytest

from embedding_finetune.metrics import means, per_query, relevance_of

# Four queries over a corpus of five passages:
POSITIONS = np.array([[3, 1, 0], [2, 4, 1], [0, 1, 2], [4, -1, -1]])
RELEVANT = [{3}, {1, 4}, set(), {0}]


def test_mrr_and_hit_worked_by_hand():
    # First relevant rank: 1, 2 (of two relevant ones), none, none.
    metrics = means(per_query(relevance_of(POSITIONS, RELEVANT), ["MRR", "Hit"], [1, 2, 3]))
    assert metrics == pytest.approx(
        {
            "MRR@1": 1 / 4,
            "Hit@1": 1 / 4,
            "MRR@2": (1 + 1 / 2) / 4,
            "Hit@2": 2 / 4,
            "MRR@3": (1 + 1 / 2) / 4,
            "Hit@3": 2 / 4,
        }
    )


def test_mrr_at_1_is_hit_at_1():
    rng = np.random.default_rng(0)
    relevance = rng.random((200, 10)) < 0.2
    values = per_query(relevance, ["MRR", "Hit"], [1])
    assert np.array_equal(values["MRR@1"], values["Hit@1"])


def test_a_query_without_a_findable_positive_counts_in_the_mean():
    relevance = relevance_of(np.array([[0], [1]]), [{0}, set()])
    assert means(per_query(relevance, ["MRR"], [1])) == {"MRR@1": 0.5}


def test_places_past_the_end_of_a_small_corpus_are_never_relevant():
    assert not relevance_of(np.array([[-1, -1]]), [{0, 1}]).any()


def test_a_cutoff_beyond_the_ranking_counts_what_is_there():
    assert means(per_query(np.array([[False, True]]), ["MRR", "Hit"], [50])) == {"MRR@50": 0.5, "Hit@50": 1.0}
