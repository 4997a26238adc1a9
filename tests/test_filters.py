"""Which candidates the score filters refuse."""

import numpy as np
import pytest

from embedding_finetune.mining.filters import FILTERS, ScoreFilters


@pytest.mark.parametrize(
    ("filters", "positive", "allowed"),
    [
        ({}, 0.6, [0.9, 0.6, 0.58, 0.5, 0.1, -0.4]),
        ({"max_score": 0.58}, 0.6, [0.58, 0.5, 0.1, -0.4]),
        ({"min_score": 0.1}, 0.6, [0.9, 0.6, 0.58, 0.5, 0.1]),
        ({"absolute_margin": 0.02}, 0.6, [0.58, 0.5, 0.1, -0.4]),
        ({"absolute_margin": 0.0}, 0.6, [0.6, 0.58, 0.5, 0.1, -0.4]),
        ({"relative_margin": 0.05}, 0.6, [0.5, 0.1, -0.4]),  # at most 0.57
        ({"relative_margin": 0.5}, -0.3, []),  # at most -0.45: tighter, not looser, than the positive
        ({"relative_margin": 0.2}, -0.3, [-0.4]),  # at most -0.36
        ({"max_score": 0.55, "min_score": 0.0}, 0.6, [0.5, 0.1]),
    ],
)
def test_each_filter_allows_what_it_says(filters, positive, allowed):
    scores = np.array([[0.9, 0.6, 0.58, 0.5, 0.1, -0.4]])
    refused = ScoreFilters(**filters).refusals(scores, np.array([positive]))
    assert scores[refused == 0].tolist() == allowed
    assert {FILTERS[number] for number in refused[refused > 0]} <= {f"--{name}" for name in filters}


def test_a_candidate_that_several_filters_refuse_counts_for_the_first():
    filters = ScoreFilters(max_score=0.8, absolute_margin=0.1)
    refused = filters.refusals(np.array([[0.9, 0.7, 0.5], [0.9, 0.7, 0.5]]), np.array([0.6, 1.5]))
    assert [[FILTERS[number] for number in row] for row in refused] == [
        ["--max_score", "--absolute_margin", ""],
        ["--max_score", "", ""],
    ]
