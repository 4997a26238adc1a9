"""Search by torch finds what faiss finds, here on the CPU; those marked gpu run on a GPU, and skip without one."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.data import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.retrieval import device_search, results, top_k
from embedding_finetune.retrieval.device_search import DeviceSearch, as_results, scores_of, searches_on
from embedding_finetune.retrieval.shared_search import merge_rankings
from embedding_finetune.retrieval.top_k import NearDuplicates, Ranking, TopK

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def torch_searches(monkeypatch):
    """TopK and NearDuplicates search with torch on whatever device."""
    monkeypatch.setattr(top_k, "searches_on", lambda device: True)


def tied_vectors(rng, count, dimensions, *, real):
    """Vectors with many ties: small integers, or a few real ones that stand there again and again."""
    if real:
        distinct = rng.standard_normal((-(-count // 4), dimensions)).astype(np.float32)
        return distinct[rng.integers(0, len(distinct), count)]
    return rng.integers(-2, 3, (count, dimensions)).astype(np.float32)


def by_torch(queries, passages, k, ties, block, device=CPU):
    """Positions and scores (Q, k), block by block."""
    search = DeviceSearch(queries, k, ties=ties, device=device)
    for start in range(0, len(passages), block):
        search.add(start, passages[start : start + block])
    return unpacked(search.results(slice(None)), ties)


def by_faiss(queries, passages, k, ties, block):
    search = TopK(queries, k, ties=ties)
    for start in range(0, len(passages), block):
        search.add(start, passages[start : start + block])
    return search.ranking()


def by_definition(queries, passages, k, ties):
    """All pairs, scored by numpy and sorted."""
    rows, others = (axis.ravel() for axis in np.indices((len(queries), len(passages))))
    scores = results.exact_scores(queries, rows, passages, others)
    packed = results.as_results(scores, others, ties).reshape(len(queries), len(passages))
    return unpacked(results.best_of([packed], k), ties)


def unpacked(packed, ties):
    return Ranking(results.positions_of(packed, ties), results.scores_of(packed))


def assert_equal(one, other):
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])


@settings(max_examples=150)
@given(
    queries=st.integers(0, 30),
    passages=st.integers(1, 60),
    k=st.integers(1, 70),
    block=st.integers(1, 60),
    dimensions=st.sampled_from([1, 3, 7, 48]),
    ties=st.sampled_from(["first", "last"]),
    real=st.booleans(),
    scores_per_chunk=st.sampled_from([1, 100, 2**26]),
    values_per_chunk=st.sampled_from([1, 200, 2**24]),
    seed=st.integers(0, 10_000),
)
def test_torch_finds_the_positions_and_scores_that_faiss_finds(
    queries, passages, k, block, dimensions, ties, real, scores_per_chunk, values_per_chunk, seed
):
    rng = np.random.default_rng(seed)
    q = tied_vectors(rng, max(queries, 1), dimensions, real=real)[:queries]
    p = tied_vectors(rng, passages, dimensions, real=real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_search, "_SCORES_PER_CHUNK", scores_per_chunk)
        patch.setattr(device_search, "_VALUES_PER_CHUNK", values_per_chunk)
        assert_equal(by_torch(q, p, k, ties, block), by_faiss(q, p, k, ties, block))


@pytest.mark.parametrize("ties", ["first", "last"])
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("block", [700, 3000])
def test_thousands_of_passages_with_ties_at_every_place_are_ranked_by_the_definition(device, real, ties, block):
    rng = np.random.default_rng(3)
    q, p = tied_vectors(rng, 50, 64, real=real), tied_vectors(rng, 3000, 64, real=real)
    for k in (1, 10, 100):
        assert_equal(by_torch(q, p, k, ties, block, device), by_definition(q, p, k, ties))


@pytest.mark.parametrize("count", [1, 19, 200])
def test_equal_vectors_tie_exactly_and_all_of_them_are_looked_at(device, count):
    """More passages than k and its spare results have the best score: topk alone would choose among them."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((count, 48)).astype(np.float32)
    p = np.repeat(rng.standard_normal((5, 48)).astype(np.float32), 300, axis=0)
    for ties, step in (("first", 1), ("last", -1)):
        found = by_torch(q, p, 40, ties, 1000, device)
        assert_equal(found, by_definition(q, p, 40, ties))
        assert (np.diff(found.positions, axis=1) == step).all()
        assert (found.scores[:, 0] == found.scores[:, -1]).all()


def test_later_blocks_that_are_better_throughout_replace_everything(device):
    p = np.repeat(np.arange(1, 7, dtype=np.float32), 50)[:, None] * np.ones((1, 3), np.float32)
    found = by_torch(np.ones((2, 3), np.float32), p, 20, "first", 50, device)
    assert found.positions.tolist() == 2 * [list(range(250, 270))]
    assert (found.scores == 18).all()


def test_results_do_not_depend_on_blocks_and_chunks(device, monkeypatch):
    rng = np.random.default_rng(5)
    q, p = rng.standard_normal((2, 300, 100)).astype(np.float32)
    whole = by_torch(q, p, 20, "first", 300, device)
    monkeypatch.setattr(device_search, "_SCORES_PER_CHUNK", 1000)
    monkeypatch.setattr(device_search, "_VALUES_PER_CHUNK", 700)
    assert_equal(by_torch(q, p, 20, "first", 77, device), whole)


@settings(max_examples=60)
@given(
    given_ones=st.integers(0, 12),
    passages=st.integers(1, 40),
    step=st.integers(1, 40),
    threshold=st.sampled_from([0.5, 0.6, 0.9, 1.0, -1.0]),
    scores_per_chunk=st.sampled_from([1, 50, 2**26]),
    seed=st.integers(0, 10_000),
)
def test_torch_finds_the_near_duplicates_that_faiss_finds(
    given_ones, passages, step, threshold, scores_per_chunk, seed
):
    rng = np.random.default_rng(seed)
    p = rng.integers(1, 4, (passages, 3)).astype(np.float32)
    own = rng.integers(1, 4, (given_ones, 3)).astype(np.float32)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_search, "_SCORES_PER_CHUNK", scores_per_chunk)
        for by_torch in (False, True):
            patch.setattr(top_k, "searches_on", lambda device, by_torch=by_torch: by_torch)
            near = NearDuplicates(own, threshold)
            for start in range(0, passages, step):
                near.add(start, p[start : start + step])
            found.append(sorted(map(tuple, near.pairs.tolist())))
    assert found[0] == found[1]


def test_near_duplicates_are_found_on_the_device(device, torch_searches):
    rng = np.random.default_rng(4)
    p = rng.standard_normal((400, 96)).astype(np.float32)
    p[7], p[30] = 3 * p[2], p[2] + 0.01
    near = NearDuplicates(p[[2, 9, 2]], 0.99, device=device)
    for start in (0, 20):
        near.add(start, p[start : start + (20 if start == 0 else 380)])
    assert set(map(tuple, near.pairs.tolist())) == {
        (0, 2), (0, 7), (0, 30), (1, 9), (2, 2), (2, 7), (2, 30)
    }  # fmt: skip


@given(
    scored=st.lists(st.tuples(st.floats(allow_nan=False, width=32), st.integers(0, 2**32 - 2)), min_size=1),
    ties=st.sampled_from(["first", "last"]),
)
def test_results_are_the_integers_of_numpy(scored, ties):
    scores, positions = np.array([s for s, _ in scored], np.float32), np.array([p for _, p in scored], np.int64)
    packed = as_results(torch.from_numpy(scores), torch.from_numpy(positions), ties)
    assert packed.tolist() == results.as_results(scores, positions, ties).tolist()
    packed[::2] = results.NO_RESULT
    assert scores_of(packed).tolist() == results.scores_of(packed.numpy()).tolist()


def test_top_k_searches_on_the_device_and_merges_as_ever(device, torch_searches):
    rng = np.random.default_rng(6)
    q, p = rng.standard_normal((2, 90, 16)).astype(np.float32)
    top = TopK(q, 5, ties="last", device=device)
    top.add(0, p[:0])
    for start in (0, 50):
        top.add(start, p[start : start + 50])
    merge_rankings(top)
    expected = np.argsort(-(q.astype(np.float64) @ p.astype(np.float64).T), axis=1)[:, :5]
    assert np.array_equal(top.ranking().positions, expected)
    empty = TopK(q[:0], 5, device=device)
    empty.add(0, p)
    assert empty.ranking().positions.shape == (0, 5)


@pytest.mark.parametrize(("kind", "expected"), [("cuda", True), ("cpu", False), ("mps", False)])
def test_torch_searches_where_cuda_encodes(kind, expected):
    assert searches_on(torch.device(kind)) == expected


@pytest.mark.parametrize("set_by", ["allow_tf32", "fp32_precision"])
def test_products_are_float32_whatever_the_process_has_switched_on_and_it_stays_on(set_by, monkeypatch):
    matmul = torch.backends.cuda.matmul
    seen = []
    candidates = device_search._candidates
    monkeypatch.setattr(
        device_search,
        "_candidates",
        lambda scores, *rest: seen.append((matmul.fp32_precision, scores.dtype)) or candidates(scores, *rest),
    )
    before = matmul.fp32_precision
    try:
        setattr(matmul, set_by, True if set_by == "allow_tf32" else "tf32")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            search = DeviceSearch(np.ones((2, 8), np.float32), 1, ties="first", device=CPU)
            search.add(0, np.ones((3, 8), np.float32))
        assert seen == [("ieee", torch.float32)]
        assert matmul.fp32_precision == "tf32"
        assert set_by != "allow_tf32" or matmul.allow_tf32
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.parametrize("set_by", ["allow_tf32", "fp32_precision"])
def test_a_process_that_allows_tf32_finds_the_same_on_a_gpu(set_by):
    matmul = torch.backends.cuda.matmul
    rng = np.random.default_rng(7)
    q, p = rng.standard_normal((100, 256)).astype(np.float32), rng.standard_normal((4000, 256)).astype(np.float32)
    before = matmul.fp32_precision
    try:
        setattr(matmul, set_by, True if set_by == "allow_tf32" else "tf32")
        found = by_torch(q, p, 50, "first", 1000, torch.device("cuda"))
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before
    assert_equal(found, by_definition(q, p, 50, "first"))


def test_a_gpu_that_runs_out_of_memory_gets_fewer_queries_at_once(monkeypatch):
    candidates, sizes = device_search._candidates, []

    def little_memory(scores, *rest):
        sizes.append(len(scores))
        if scores.numel() > 500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return candidates(scores, *rest)

    rng = np.random.default_rng(8)
    q, p = rng.integers(-2, 3, (2, 90, 4)).astype(np.float32)
    monkeypatch.setattr(device_search, "_SCORES_PER_CHUNK", 3600)
    monkeypatch.setattr(device_search, "_candidates", little_memory)
    assert_equal(by_torch(q, p, 5, "first", 50), by_definition(q, p, 5, "first"))
    assert sizes[:4] == [72, 36, 18, 9]
    assert max(sizes[3:]) <= 11
    monkeypatch.setattr(device_search, "_candidates", lambda *_: little_memory(torch.empty(501)))
    with pytest.raises(torch.OutOfMemoryError):
        by_torch(q, p, 5, "first", 90)


PROGRAM = """
import sys
sys.modules["faiss"] = None
import numpy as np, torch
from embedding_finetune.evaluation import ranking
from embedding_finetune.mining import ranking
from embedding_finetune.retrieval import top_k
device = torch.device(sys.argv[1])
if device.type == "cpu":
    top_k.searches_on = lambda device: True
assert top_k.gpus_to_search_on(device, use_gpu_for_searching=False) == []
top = top_k.TopK(np.eye(3, dtype=np.float32), 1, device=device)
near = top_k.NearDuplicates(np.eye(3, dtype=np.float32), 0.9, device=device)
for listener in (top, near):
    listener.add(0, np.eye(3, dtype=np.float32))
print(top.ranking().positions.ravel().tolist(), near.pairs.tolist())
"""


def test_where_torch_searches_faiss_is_not_imported(device):
    command = [sys.executable, "-c", PROGRAM, device.type]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout == "[0, 1, 2] [[0, 0], [1, 1], [2, 2]]\n"
