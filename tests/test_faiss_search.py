import sys

import numpy as np
import pytest
from helpers.running import search

from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval import faiss_search
from embedding_finetune.retrieval.faiss_search import FaissSearch, import_faiss, near_pairs
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


def test_only_as_many_columns_are_merged_as_any_query_has_survivors(monkeypatch):
    merged = []
    monkeypatch.setattr(
        faiss_search, "best_of", lambda lists, k: merged.append(lists[1].shape[1]) or np.sort(np.hstack(lists))[:, :k]
    )
    q = np.array([[1], [2]], np.float32)
    passages = FaissSearch(q, 2, ties="first")
    passages.add(0, np.array([[5], [9], [1]], np.float32))
    passages.add(3, np.array([[1], [2], [7]], np.float32))
    passages.add(6, np.array([[1], [2]], np.float32))
    assert merged == [3, 1, 0]
    assert (passages.results(slice(None)) & (2**32 - 1)).tolist() == [[1, 5], [1, 5]]
