"""Ranking a corpus and measuring the ranking, on embeddings that can be worked by hand."""

import numpy as np
import pytest
from helpers.vectors import encoder_of

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.metrics import means
from embedding_finetune.evaluation.ranking import measure, rank_corpus, values_per_query

ENCODER = encoder_of({"q": [1, 0], "r": [0, 1], "a": [3, 0], "b": [1, 1], "c": [1, 2], "d": [0, 1]})
TASK = RetrievalTask(
    queries=["q", "r"],
    corpus=Corpus(["a", "b", "c", "d"]),
    relevant=[{1: 1}, {3: 1, 4: 1}],
    ids=["0", "1"],
    groups=[None, None],
)


def test_the_best_come_first_and_of_equals_the_last_of_the_corpus():
    positions, scores = rank_corpus(ENCODER, TASK, 3)
    assert positions.tolist() == [[0, 2, 1], [2, 3, 1]]  # q: 3 1 1 0; r: 0 1 2 1
    assert scores.tolist() == [[3, 1, 1], [2, 1, 1]]


def test_a_ranking_is_no_longer_than_the_corpus():
    positions, _ = rank_corpus(ENCODER, TASK, 1000)
    assert positions.tolist() == [[0, 2, 1, 3], [2, 3, 1, 0]]


def test_measures_are_of_each_query_and_their_means_are_over_all():
    # The answers stand at rank 3 and at rank 2; the second query has another one, which the corpus lacks.
    found = measure(ENCODER, TASK, measures=["MRR", "Hit", "Recall"], cutoffs=[1, 2, 3])
    assert all(values.shape == (2,) for values in found.values())
    assert means(found) == pytest.approx(
        {
            "MRR@1": 0,
            "Hit@1": 0,
            "Recall@1": 0,
            "MRR@2": 1 / 4,
            "Hit@2": 1 / 2,
            "Recall@2": 1 / 4,
            "MRR@3": (1 / 3 + 1 / 2) / 2,
            "Hit@3": 1,
            "Recall@3": 3 / 4,
        }
    )


def test_values_are_those_of_each_query():
    values = values_per_query(rank_corpus(ENCODER, TASK, 3), TASK, ["MRR"], [2, 3])
    assert values["MRR@2"].tolist() == [0, 0.5]
    assert np.allclose(values["MRR@3"], [1 / 3, 1 / 2])
