"""What the processes of a torchrun run find together is what one finds alone; here they are threads that meet."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.vectors import encoder_of

from embedding_finetune import distributed
from embedding_finetune.retrieval import shared_search
from embedding_finetune.retrieval.top_k import NearDuplicates, PairScores, TopK

QUERIES = [f"query {number}" for number in range(5)]
PASSAGES = [f"passage {number}" for number in range(11)]
TABLE = np.random.default_rng(0).integers(-2, 3, (16, 3)) + np.array([0.5, 0.25, 0.125])  # many ties, and none is zero
ENCODER = encoder_of(dict(zip(QUERIES + PASSAGES, TABLE)))


def search():
    """Everything that the processes share: the results of one of them."""
    queries = shared_search.encode_queries(ENCODER, QUERIES)
    top = TopK(queries, 4)
    pairs = PairScores(queries, np.array([0, 4, 2]), np.array([10, 0, 5]))
    near = NearDuplicates(queries, 0.95)
    for first, block in shared_search.encode_own_passages(ENCODER, PASSAGES):
        for listener in (top, pairs, near):
            listener.add(first, block)
    shared_search.merge_rankings(top)
    shared_search.merge_scores(pairs)
    shared_search.merge_near_duplicates(near)
    passages = shared_search.encode_passages(ENCODER, PASSAGES, distributed.own_share(len(PASSAGES)))
    return queries, passages, *top.ranking(), pairs.scores, np.array(sorted(map(tuple, near.pairs.tolist())))


def run_together(count, monkeypatch):
    """The results of `count` processes."""
    here, meeting, table = threading.local(), threading.Barrier(count, timeout=60), [None] * count

    def gather(value):
        table[here.rank] = pickle.dumps(value)
        meeting.wait()
        values = list(map(pickle.loads, table))
        meeting.wait()
        return values

    monkeypatch.setattr(distributed, "world_size", lambda: count)
    monkeypatch.setattr(distributed, "process_rank", lambda: here.rank)
    monkeypatch.setattr(shared_search, "gather_objects", gather)

    def process(number):
        here.rank = number
        return search()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(process, range(count)))


def test_one_process_alone_finds_what_the_definition_says():
    queries, passages, positions, scores, pair_scores, near = search()
    expected = TABLE[:5] @ TABLE[5:].T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :4]
    assert np.array_equal(queries, TABLE[:5].astype(np.float32))
    assert np.array_equal(passages, TABLE[5:].astype(np.float32))
    assert np.array_equal(positions, order)
    assert np.allclose(scores, np.take_along_axis(expected, order, axis=1))
    assert np.allclose(pair_scores, [expected[0, 10], expected[4, 0], expected[2, 5]])
    lengths = np.linalg.norm(TABLE, axis=1)
    cosines = expected / lengths[:5, None] / lengths[5:]
    assert near.tolist() == np.argwhere(cosines >= 0.95).tolist() != []


@pytest.mark.parametrize("count", [2, 3, 7, 13])
def test_every_process_gets_what_one_alone_finds_also_when_there_are_more_of_them_than_texts(count, monkeypatch):
    alone = search()
    for results in run_together(count, monkeypatch):
        for one, other in zip(results, alone, strict=True):
            assert np.array_equal(one, other)


def test_queries_are_gathered_in_parts(monkeypatch):
    monkeypatch.setattr(shared_search, "_QUERIES_PER_GATHER", 2)
    alone = search()
    assert all(np.array_equal(own[2], alone[2]) for own in run_together(3, monkeypatch))
