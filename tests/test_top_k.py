import numpy as np
import pytest
from helpers.running import search
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval import top_k as retrieval
from embedding_finetune.retrieval.top_k import (
    NearDuplicates,
    PairScores,
    TopK,
    as_results,
    fuse,
    gpus_to_search_on,
    positions_of,
    scores_of,
)


def reference_search(queries, passages, top_k, ties):
    """Every score in float64, sorted by numpy; -1 past the end."""
    scores = (queries.astype(np.float64) @ passages.astype(np.float64).T).astype(np.float32)
    places = np.arange(len(passages))
    order = np.stack([np.lexsort((places if ties == "first" else -places, -row)) for row in scores])
    best = np.full((len(queries), top_k), -1)
    best[:, : len(passages)] = order[:, :top_k]
    return best


def vectors(rng, count, dimensions):
    """Small integers: many exact ties, and products that are exact in float32."""
    return rng.integers(-2, 3, (count, dimensions)).astype(np.float32)


@settings(max_examples=60)
@given(
    queries=st.integers(0, 30),
    passages=st.integers(1, 60),
    top_k=st.integers(1, 70),
    block=st.integers(1, 60),
    ties=st.sampled_from(["first", "last"]),
    seed=st.integers(0, 10_000),
)
def test_search_in_blocks_equals_numpy_argsort(queries, passages, top_k, block, ties, seed):
    rng = np.random.default_rng(seed)
    q, p = vectors(rng, queries, 3), vectors(rng, passages, 3)
    top = TopK(q, top_k, ties=ties)
    for start in range(0, passages, block):
        top.add(start, p[start : start + block])
    if queries:
        assert np.array_equal(top.ranking().positions, reference_search(q, p, top_k, ties))
    else:
        assert top.ranking().positions.shape == (0, top_k)


def test_real_valued_search_equals_numpy_argsort():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((50, 64)).astype(np.float32)
    p = rng.standard_normal((3000, 64)).astype(np.float32)
    _, positions = search(q, p, 100)
    assert np.array_equal(positions, reference_search(q, p, 100, "first"))


@pytest.mark.parametrize("count", [1, 19, 20, 200])
def test_equal_vectors_tie_exactly_however_many_queries_there_are(count):
    rng = np.random.default_rng(1)
    q = rng.standard_normal((count, 48)).astype(np.float32)
    p = np.repeat(rng.standard_normal((5, 48)).astype(np.float32), 30, axis=0)
    scores, positions = search(q, p, 40)
    assert (np.diff(positions[:, :30], axis=1) == 1).all()
    assert (scores[:, 0] == scores[:, 29]).all()


def test_a_constant_scorer_gets_the_corpus_order_or_its_reverse_and_nothing_in_between():
    q, p = np.ones((3, 8), dtype=np.float32), np.ones((500, 8), dtype=np.float32)
    assert (search(q, p, 5)[1] == [0, 1, 2, 3, 4]).all()
    assert (search(q, p, 5, ties="last")[1] == [499, 498, 497, 496, 495]).all()


def test_a_corpus_of_one_and_k_beyond_it_are_padded_with_minus_one():
    scores, positions = search(np.ones((1, 4), dtype=np.float32), np.ones((1, 4), dtype=np.float32), 3)
    assert positions.tolist() == [[0, -1, -1]]
    assert scores.tolist() == [[4.0, -np.inf, -np.inf]]


def test_pair_scores_are_the_inner_products_whatever_the_blocks():
    rng = np.random.default_rng(2)
    q, p = vectors(rng, 6, 5), vectors(rng, 40, 5)
    rows, positions = rng.integers(0, 6, 30), rng.integers(0, 40, 30)
    pairs = PairScores(q, rows, positions)
    for start in (0, 7, 14, 21, 28, 35):
        pairs.add(start, p[start : start + 7])
    assert np.array_equal(pairs.scores, (q[rows] * p[positions]).sum(axis=1))


@pytest.mark.parametrize("step", [3, 40])
def test_near_duplicates_are_all_pairs_of_a_high_cosine_whatever_the_blocks_and_lengths(step):
    rng = np.random.default_rng(4)
    p = vectors(rng, 40, 5)
    p[7], p[30] = 3 * p[2], p[2] + 0.1
    given_ones = p[[2, 9, 2]] * np.array([[1], [5], [0.1]], np.float32)
    near = NearDuplicates(given_ones, 0.9)
    for start in range(0, 40, step):
        near.add(start, p[start : start + step])
    cosines = (given_ones / np.linalg.norm(given_ones, axis=1)[:, None]) @ (p / np.linalg.norm(p, axis=1)[:, None]).T
    expected = set(zip(*(axis.tolist() for axis in np.nonzero(cosines >= 0.9))))
    assert set(map(tuple, near.pairs.tolist())) == expected
    assert {(0, 2), (0, 7), (0, 30), (2, 7), (1, 9)} <= expected


def test_fusion_adds_reciprocal_ranks_and_breaks_ties_by_position():
    one, other = np.array([[5, 3, 8, 1], [2, -1, -1, -1]]), np.array([[8, 5, 0, 3], [-1, -1, -1, -1]])
    # 5: 1/61 + 1/62; 8: 1/63 + 1/61; 3: 1/62 + 1/64; 0: 1/63
    assert fuse([one, other]).tolist() == [[5, 8, 3, 0], [2, -1, -1, -1]]
    assert fuse([other, one]).tolist() == fuse([one, other]).tolist()
    assert fuse([np.array([[7, 4]]), np.array([[4, 7]])]).tolist() == [[4, 7]]
    assert fuse([one]).tolist() == one.tolist()


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


def test_a_list_too_long_for_faiss_gpu_is_searched_on_the_cpu_and_said_once(monkeypatch, caplog):
    import faiss

    asked = []

    class OnGpu:
        def __init__(self, index):
            self.index = index

        def add(self, block):
            self.index.add(block)

        def search(self, queries, width):
            asked.append(width)
            assert width <= 2048
            return self.index.search(queries, width)

    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", type("Options", (), {}), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", lambda index, options, gpus: OnGpu(index), raising=False)
    retrieval._warn_that_the_cpu_searches.cache_clear()
    rng = np.random.default_rng(0)
    q, p = vectors(rng, 3, 4), vectors(rng, 5000, 4)
    for top_k, searched in ((100, True), (2100, False), (2200, False)):
        asked.clear()
        on_gpu = TopK(q, top_k, gpus=[0])
        on_gpu.add(0, p)
        assert np.array_equal(on_gpu.ranking().positions, search(q, p, top_k)[1])
        assert bool(asked) == searched
    assert caplog.text.count("at most 2048 results") == 1


def test_gpu_search_without_gpu_support_says_what_to_do():
    import faiss

    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    with pytest.raises(UserError, match=r"--use_gpu_for_searching.*requirements_cuda\.txt"):
        gpus_to_search_on()


def test_rankings_that_no_memory_holds_are_one_line():
    with pytest.raises(UserError, match="the 1000000000000 best passages of 3 queries do not fit into memory"):
        TopK(np.ones((3, 2), np.float32), 10**12)
