import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.retrieval import results as module
from embedding_finetune.retrieval.results import (
    NO_RESULT,
    as_results,
    best_of,
    exact_scores,
    longest,
    positions_of,
    rounding_error,
    scores_of,
)


@given(
    results=st.lists(
        st.tuples(st.floats(allow_nan=False, width=32), st.integers(0, 2**32 - 2)), min_size=1, unique_by=lambda r: r[1]
    ),
    ties=st.sampled_from(["first", "last"]),
)
def test_results_as_integers_sort_by_score_and_then_by_position(results, ties):
    scores, positions = np.array([r[0] for r in results], np.float32), np.array([r[1] for r in results], np.int64)
    packed = np.sort(as_results(scores, positions, ties))
    order = np.lexsort((positions if ties == "first" else -positions, -scores))
    assert positions_of(packed, ties).tolist() == positions[order].tolist()
    assert (scores_of(packed) == scores[order]).all()


def test_lists_of_results_are_merged_and_what_is_missing_comes_last():
    one = as_results(np.array([[3.0, 1.0]], np.float32), np.array([[5, 6]]), "first")
    other = as_results(np.array([[2.0]], np.float32), np.array([[7]]), "first")
    best = best_of([one, other, np.full((1, 1), NO_RESULT)], 4)
    assert positions_of(best, "first").tolist() == [[5, 7, 6, -1]]
    assert scores_of(best).tolist() == [[3, 2, 1, -np.inf]]
    assert best_of([one, other], 2).tolist() == best[:, :2].tolist()


def test_exact_scores_are_the_float64_sums_and_do_not_depend_on_the_chunk(monkeypatch):
    rng = np.random.default_rng(0)
    q, p = rng.standard_normal((9, 48)).astype(np.float32), rng.standard_normal((40, 48)).astype(np.float32)
    rows, others = rng.integers(0, 9, 500), rng.integers(0, 40, 500)
    scores = exact_scores(q, rows, p, others)
    assert np.array_equal(scores, (q[rows].astype(np.float64) * p[others]).sum(axis=1).astype(np.float32))
    for values in (1, 48 * 7, 2**23):
        monkeypatch.setattr(module, "_VALUES_PER_CHUNK", values)
        assert np.array_equal(exact_scores(q, rows, p, others), scores)


def test_float32_products_lie_within_the_rounding_error():
    rng = np.random.default_rng(1)
    for dimensions in (1, 3, 384):
        q, p = rng.standard_normal((2, 200, dimensions)).astype(np.float32)
        error = np.abs(q @ p.T - q.astype(np.float64) @ p.astype(np.float64).T)
        assert error.max() < rounding_error(dimensions) * longest(q) * longest(p)
    assert longest(np.empty((0, 3), np.float32)) == 0
