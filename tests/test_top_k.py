import sys

import numpy as np
import pytest
import torch
from helpers.running import search
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval import top_k
from embedding_finetune.retrieval.results import MOST_PASSAGES, NO_RESULT, as_results
from embedding_finetune.retrieval.top_k import NearDuplicates, PairScores, TopK, fuse, gpus_to_search_on, split


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


@pytest.mark.parametrize("ties", ["first", "last"])
@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_results_are_split_into_positions_and_scores_in_the_memory_that_they_have(ties, at_once, monkeypatch):
    monkeypatch.setattr(top_k, "_RESULTS_PER_SPLIT", at_once)
    scores = np.array([[3.5, -1.0], [0.0, 2.0], [-0.0, 1.0]], np.float32)
    results = as_results(scores, np.array([[MOST_PASSAGES - 1, 0], [7, 8], [9, 5]]), ties)
    results[1, 1] = NO_RESULT
    ranking = split(results, ties)
    assert ranking.positions.tolist() == [[MOST_PASSAGES - 1, 0], [7, -1], [9, 5]]
    assert ranking.scores.tolist() == [[3.5, -1], [0, -np.inf], [0, 1]]
    assert (ranking.positions.dtype, ranking.scores.dtype) == (np.int32, np.float32)
    assert np.shares_memory(ranking.positions, results)
    assert np.shares_memory(ranking.scores, results)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_results_are_split_into_none(shape):
    ranking = split(np.empty(shape, np.int64), "first")
    assert ranking.positions.shape == ranking.scores.shape == shape


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
    assert fuse([one, other], 4).positions.tolist() == [[5, 8, 3, 0], [2, -1, -1, -1]]
    assert fuse([one, other], 4).scores[0] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62 + 1 / 64, 1 / 63])
    assert fuse([other, one], 4).positions.tolist() == fuse([one, other], 4).positions.tolist()
    assert fuse([np.array([[7, 4]]), np.array([[4, 7]])], 2).positions.tolist() == [[4, 7]]
    assert fuse([np.array([[7, 4]]), np.array([[4, 7]])], 2, ties="last").positions.tolist() == [[7, 4]]
    assert fuse([one], 4).positions.tolist() == one.tolist()
    assert fuse([one, other[:, :2]], 9).positions.tolist() == [[5, 8, 3, 1] + [-1] * 5, [2] + [-1] * 8]


def test_gpu_search_without_gpu_support_says_what_to_do():
    import faiss

    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    with pytest.raises(UserError, match=r"--use_gpu_for_searching.*requirements_cuda\.txt"):
        gpus_to_search_on(torch.device("cpu"), use_gpu_for_searching=True)


@pytest.mark.parametrize(("own_gpu", "expected"), [(None, [0, 1, 2]), (1, [1]), (4, [1])])
def test_faiss_searches_on_all_gpus_or_on_the_own_one_of_the_process(own_gpu, expected, monkeypatch):
    monkeypatch.setattr(top_k.faiss_search, "all_gpus", lambda: [0, 1, 2])
    device = torch.device("cuda")
    assert gpus_to_search_on(device, use_gpu_for_searching=True, own_gpu=own_gpu) == expected
    assert gpus_to_search_on(device, use_gpu_for_searching=False, own_gpu=own_gpu) == []


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_faiss_that_is_needed_and_missing_is_told_before_anything_is_encoded(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"needs faiss.*: pip install faiss-cpu$"):
        gpus_to_search_on(torch.device(device), use_gpu_for_searching=False)
    assert gpus_to_search_on(torch.device("cuda"), use_gpu_for_searching=False) == []


def test_rankings_that_no_memory_holds_are_one_line():
    with pytest.raises(UserError, match="the 1000000000000 best passages of 3 queries do not fit into memory"):
        TopK(np.ones((3, 2), np.float32), 10**12)


def test_where_queries_do_not_fit_into_the_gpu_faiss_searches(monkeypatch, caplog):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(top_k, "DeviceSearch", full)
    rng = np.random.default_rng(0)
    q, p = rng.standard_normal((3, 8)).astype(np.float32), rng.standard_normal((20, 8)).astype(np.float32)
    on_gpu, on_cpu = TopK(q, 4, device=torch.device("cuda")), TopK(q, 4)
    for one in (on_gpu, on_cpu):
        one.add(0, p)
    assert np.array_equal(on_gpu.ranking().positions, on_cpu.ranking().positions)
    assert "do not fit into the GPU: faiss searches on the CPU" in caplog.text


def test_a_corpus_of_more_passages_than_a_position_counts_is_one_line():
    top = TopK(np.ones((1, 2), np.float32), 1)
    top.add(2**31 - 2, np.ones((1, 2), np.float32))
    with pytest.raises(UserError, match="a corpus may hold 2147483647 passages"):
        top.add(2**31 - 1, np.ones((1, 2), np.float32))
    assert top.ranking().positions.tolist() == [[2**31 - 2]]
