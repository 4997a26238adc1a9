import sys

import numpy as np
import pytest
from helpers.running import search
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval import faiss_search
from embedding_finetune.retrieval.faiss_search import FaissSearch, import_faiss, near_pairs
from embedding_finetune.retrieval.results import exact_scores
from embedding_finetune.retrieval.top_k import TopK


def vectors(rng, count, dimensions):
    """Small integers: many exact ties, and products that are exact in float32."""
    return rng.integers(-2, 3, (count, dimensions)).astype(np.float32)


@pytest.fixture
def faiss_gpu(monkeypatch):
    """A stand-in for faiss-gpu: it gives the widths that were searched, and the resources that were made."""
    import faiss

    asked, made = [], []

    class OnGpu:
        def __init__(self, index):
            self.index = index

        def add(self, block):
            self.index.add(block)

        def search(self, queries, width):
            asked.append(width)
            assert width <= 2048
            return self.index.search(queries, width)

    def to_gpus(resources, index, options, gpus):
        assert options.shard
        assert len(resources) == len(gpus)
        assert set(map(id, resources)) <= set(map(id, made))
        return OnGpu(index)

    def resources():
        made.append(object())
        return made[-1]

    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", type("Options", (), {}), raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", resources, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu_multiple_py", to_gpus, raising=False)
    faiss_search._warn_that_the_cpu_searches.cache_clear()
    faiss_search._gpu_resources.cache_clear()
    yield asked, made
    faiss_search._gpu_resources.cache_clear()


def test_a_list_too_long_for_faiss_gpu_is_searched_on_the_cpu_and_said_once(faiss_gpu, caplog):
    asked, _ = faiss_gpu
    rng = np.random.default_rng(0)
    q, p = vectors(rng, 3, 4), vectors(rng, 5000, 4)
    for top_k, searched in ((100, True), (2100, False), (2200, False)):
        asked.clear()
        on_gpu = TopK(q, top_k, gpus=[0])
        on_gpu.add(0, p)
        assert np.array_equal(on_gpu.ranking().positions, search(q, p, top_k)[1])
        assert bool(asked) == searched
    assert caplog.text.count("at most 2048 results") == 1


def test_the_resources_of_a_gpu_are_made_once_in_the_process(faiss_gpu):
    _, made = faiss_gpu
    rng = np.random.default_rng(0)
    q, p = vectors(rng, 3, 4), vectors(rng, 60, 4)
    for _ in range(2):
        on_gpus = FaissSearch(q, 2, ties="first", gpus=[0, 1])
        for start in range(0, 60, 20):
            on_gpus.add(start, p[start : start + 20])
    assert len(made) == 2


@pytest.mark.parametrize(
    "error", [ImportError("libcublas.so.12: cannot open\nshared object"), RuntimeError("no CUDA wheel\nfor this")]
)
def test_a_faiss_that_cannot_be_imported_is_one_line_that_says_what_to_install(error, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "faiss":
                raise error

    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    first, queries = str(error).splitlines()[0], np.ones((1, 2), np.float32)
    for call in (import_faiss, lambda: TopK(queries, 1), lambda: near_pairs(queries, queries, 0.5)):
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value) == f"searching needs faiss, which cannot be imported ({first}): pip install faiss-cpu"


def test_only_queries_with_survivors_are_merged_and_only_as_many_columns_as_any_has(monkeypatch):
    merged = []
    monkeypatch.setattr(
        faiss_search, "best_of", lambda lists, k: merged.append(lists[1].shape) or np.sort(np.hstack(lists))[:, :k]
    )
    q = np.array([[1], [2], [-1]], np.float32)
    passages = FaissSearch(q, 2, ties="first")
    passages.add(0, np.array([[5], [9], [1]], np.float32))
    passages.add(3, np.array([[7], [2]], np.float32))
    passages.add(5, np.array([[4], [8]], np.float32))
    # 7 enters for the first two, 2 for the third. Of 4 and 8 only 8 enters, for the first two.
    assert merged == [(3, 3), (3, 1), (2, 1)]
    assert (passages.results(slice(None)) & (2**32 - 1)).tolist() == [[1, 6], [1, 6], [2, 4]]


def every_pair_scored_and_sorted(queries, passages, top_k, ties):
    """Positions and scores by the definition, pair by pair; -1 and -inf past the end."""
    everywhere, each = np.indices((len(queries), len(passages)))
    scores = exact_scores(queries, everywhere.ravel(), passages, each.ravel()).reshape(everywhere.shape)
    positions = np.full((len(queries), top_k), -1)
    best_scores = np.full((len(queries), top_k), -np.inf, np.float32)
    for row, own in enumerate(scores):
        order = np.lexsort((each[0] if ties == "first" else -each[0], -own))[:top_k]
        positions[row, : len(order)], best_scores[row, : len(order)] = order, own[order]
    return positions, best_scores


def real(rng, count):
    return rng.standard_normal((count, 5)).astype(np.float32)


STREAMS = {
    "random": lambda rng, n: real(rng, n),
    "random of many lengths": lambda rng, n: real(rng, n) * np.float32(10) ** rng.integers(-9, 9, (n, 1)),
    "random of all lengths": lambda rng, n: real(rng, n) * np.float32(10) ** rng.integers(-14, 15, (n, 1)),
    "each better than all before": lambda rng, n: np.abs(real(rng, n)) + 9 * np.arange(n, dtype=np.float32)[:, None],
    "better for some queries": lambda rng, n: real(rng, n) + np.arange(n, dtype=np.float32)[:, None] * [0, 0, 0, 0, 9],
    "each worse than all before": lambda rng, n: np.abs(real(rng, n)) - 9 * np.arange(n, dtype=np.float32)[:, None],
    "constant": lambda rng, n: np.ones((n, 5)),
    "of few kinds": lambda rng, n: real(rng, 4)[rng.integers(0, 4, n)],
    "better, of few kinds": lambda rng, n: real(rng, 4)[rng.integers(0, 4, n)] * (1 + np.arange(n) // 16)[:, None],
    "zero": lambda rng, n: np.zeros((n, 5)),
    "partly zero": lambda rng, n: real(rng, n) * rng.integers(0, 2, (n, 1)),
    "small integers": lambda rng, n: vectors(rng, n, 5),
}


@settings(max_examples=200)
@given(
    stream=st.sampled_from(list(STREAMS)),
    queries=st.sampled_from(list(STREAMS)),
    passages=st.integers(1, 300),
    top_k=st.sampled_from([1, 2, 5, 30, 400]),
    block=st.sampled_from([1, 3, 16, 60, 150]),
    ties=st.sampled_from(["first", "last"]),
    passages_at_once=st.sampled_from([40, 1000]),
    rows_at_once=st.sampled_from([1, 7, 100]),
    seed=st.integers(0, 10_000),
)
def test_whatever_comes_in_whatever_blocks_the_best_are_those_of_all_pairs(
    stream, queries, passages, top_k, block, ties, passages_at_once, rows_at_once, seed
):
    rng = np.random.default_rng(seed)
    q, p = STREAMS[queries](rng, 23).astype(np.float32), STREAMS[stream](rng, passages).astype(np.float32)
    best, start = TopK(q, top_k, ties=ties), 0
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="raise"):
        patch.setattr(faiss_search, "_PASSAGES_PER_SEARCH", passages_at_once)
        patch.setattr(faiss_search, "_PAIRS_PER_SEARCH", rows_at_once * block)
        while start < passages:
            size = int(rng.integers(1, 2 * block + 1))  # unequal, the last one often tiny
            best.add(start, p[start : start + size])
            start += size
    found = best.ranking()
    positions, scores = every_pair_scored_and_sorted(q, p, top_k, ties)
    assert np.array_equal(found.positions, positions)
    assert np.array_equal(found.scores, scores)


@pytest.fixture
def searched(monkeypatch):
    """The searches that were made, by name."""
    names = []
    for method in (faiss_search._Index.nearest, faiss_search._Index.above):

        def told(*args, method=method):
            names.append(method.__name__)
            return method(*args)

        monkeypatch.setattr(faiss_search._Index, method.__name__, told)
    return names


def test_where_few_enter_only_what_is_above_the_bound_is_looked_at(searched):
    rng = np.random.default_rng(0)
    search_in = FaissSearch(real(rng, 40), 10, ties="first")
    for start in range(0, 5000, 500):
        search_in.add(start, real(rng, 500))
    # As many as in the first block, 10 a query, are above its bound in the second, 5 in the third: less than half of
    # the 18 that are taken.
    assert searched == ["nearest"] * 3 + ["above"] * 7


def test_where_each_block_is_better_than_all_before_the_nearest_are_looked_at(searched):
    rng = np.random.default_rng(0)
    search_in = FaissSearch(np.abs(real(rng, 40)), 10, ties="first")
    for number in range(10):
        search_in.add(500 * number, np.abs(real(rng, 500)) + np.float32(20 * number))
    assert searched == ["nearest"] * 10


def test_after_a_better_block_the_nearest_are_looked_at_until_few_enter_again(searched):
    rng = np.random.default_rng(0)
    search_in = FaissSearch(np.abs(real(rng, 40)), 10, ties="first")
    for number, better in enumerate([0, 0, 0, 20, 0, 0]):
        search_in.add(500 * number, np.abs(real(rng, 500)) + np.float32(better))
    assert searched == ["nearest", "nearest", "nearest", "above", "nearest", "above"]


def test_of_many_passages_above_the_bound_only_those_are_scored_that_may_be_the_best(monkeypatch):
    scored = []

    def told(queries, rows, passages, places):
        scored.append(len(rows))
        return exact_scores(queries, rows, passages, places)

    monkeypatch.setattr(faiss_search, "exact_scores", told)
    rng = np.random.default_rng(0)
    search_in = FaissSearch(np.abs(real(rng, 40)), 10, ties="first")
    for number, better in enumerate([0, 0, 0, 20]):
        search_in.add(500 * number, np.abs(real(rng, 500)) + np.float32(better))
    assert scored[0] == 40 * 18
    assert scored[3] == 40 * 10


def test_faiss_gpu_gives_the_nearest_alone(faiss_gpu, searched):
    rng = np.random.default_rng(0)
    q, p = real(rng, 40), real(rng, 2000)
    on_gpu = TopK(q, 10, gpus=[0])
    for start in range(0, 2000, 500):
        on_gpu.add(start, p[start : start + 500])
    assert searched == ["nearest"] * 4
    assert np.array_equal(on_gpu.ranking().positions, search(q, p, 10)[1])
