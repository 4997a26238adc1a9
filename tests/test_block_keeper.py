"""A block is kept while it is encoded: few parts, each whole, and one segment in the end."""

import numpy as np
import pytest

from embedding_finetune.data.texts import raw_digests
from embedding_finetune.retrieval import segments
from embedding_finetune.retrieval.block_keeper import SECONDS_BETWEEN_KEEPING, BlockKeeper, has_direction
from embedding_finetune.retrieval.store import EmbeddingStore

TEXTS = [f"text {number}" for number in range(40)]
VECTORS = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(tmp_path, {"weights": "x"}, dimensions=8)


def keeper_of(store, clock, texts=TEXTS, different=None):
    different = np.arange(len(texts)) if different is None else np.array(different)
    return BlockKeeper(store, raw_digests(texts), different, clock=clock)


def kept(store, texts=TEXTS):
    """Which texts a new run would find; what it finds are their embeddings."""
    store.refresh()
    embeddings, found = store.get(texts)
    if texts is TEXTS:
        assert np.array_equal(embeddings[found], VECTORS[found])
    return np.flatnonzero(found).tolist()


def test_what_is_done_is_kept_as_soon_as_5_s_have_passed(store, clock):
    keeper = keeper_of(store, clock)
    for number, at in enumerate([1.5, 3, 4.5, 6, 7.5, 9, 10.5, 12]):
        clock.now = 1000 + at
        keeper.done(np.array([number]), VECTORS)
        # The first 6 s make 4 texts; the next 5 s end with the eighth, 6 s later.
        assert kept(store) == list(range(0 if number < 3 else 4 if number < 7 else 8))


def test_the_parts_of_a_block_are_as_few_as_the_ones_of_a_binary_number(store, clock, monkeypatch):
    written = []
    write = segments.write_segment
    monkeypatch.setattr(
        "embedding_finetune.retrieval.store.write_segment",
        lambda folder, digests, *rest: written.append(len(digests)) or write(folder, digests, *rest),
    )
    keeper = keeper_of(store, clock)
    for number in np.random.default_rng(1).permutation(32).tolist():  # batches come sorted by length
        clock.now += SECONDS_BETWEEN_KEEPING
        keeper.done(np.array([number]), VECTORS)
        assert len(list(store.folder.glob("*.segment"))) == bin(len(written)).count("1")
    assert kept(store) == list(range(32))
    # 32 of 1 text are what was kept at once; of 2, 4, 8, 16 and 32 what they were merged into.
    assert sum(written) == 1 * 16 + 2 * 8 + 4 * 4 + 8 * 2 + 16 * 1 + 32
    keeper.finish(VECTORS)
    assert kept(store) == list(range(40))
    assert len(list(store.folder.glob("*.segment"))) == 1


def test_a_block_that_was_kept_in_one_part_stays_when_it_is_finished(store, clock):
    keeper = keeper_of(store, clock)
    clock.now += 5
    keeper.done(np.arange(40), VECTORS)
    (part,) = store.folder.glob("*.segment")
    keeper.finish(VECTORS)
    assert list(store.folder.glob("*.segment")) == [part]
    assert kept(store) == list(range(40))


def test_texts_with_the_same_tokens_are_kept_together(store, clock):
    texts = ["a", "A", "b", "a ", "B"]
    keeper = keeper_of(store, clock, texts, [0, 0, 1, 0, 1])
    clock.now += 5
    keeper.done(np.array([1]), VECTORS[:2])
    assert kept(store, texts) == [2, 4]
    assert np.array_equal(store.get(texts)[0][[2, 4]], VECTORS[[1, 1]])
    keeper.finish(VECTORS[:2])
    assert kept(store, texts) == [0, 1, 2, 3, 4]
    assert np.array_equal(store.get(texts)[0], VECTORS[[0, 0, 1, 0, 1]])


def test_an_embedding_without_direction_is_never_kept(store, clock):
    bad = VECTORS.copy()
    bad[1], bad[3, 2] = 0, np.nan
    keeper = keeper_of(store, clock)
    for batch in ([1], [0, 1, 2, 3, 4], [5]):
        clock.now += 5
        keeper.done(np.array(batch), bad)
    assert kept(store) == [0, 2, 4, 5]
    assert has_direction(bad[:5]).tolist() == [True, False, True, False, True]


def test_rows_that_are_not_done_yet_are_not_kept_whatever_they_hold(store, clock):
    so_far = np.full((40, 8), 7, np.float32)
    so_far[[30, 2]] = VECTORS[[30, 2]]
    clock_of_block = keeper_of(store, clock)
    clock.now += 5
    clock_of_block.done(np.array([30, 2]), so_far)
    assert kept(store) == [2, 30]


def test_another_process_may_merge_the_parts_of_a_block_meanwhile(store, clock, monkeypatch):
    monkeypatch.setattr("embedding_finetune.retrieval.store.MOST_SMALL", 1)
    other = EmbeddingStore(store.folder.parent, {"weights": "x"}, dimensions=8)
    keeper = keeper_of(store, clock)
    for number in range(7):
        clock.now += 5
        keeper.done(np.array([number]), VECTORS)
        other.refresh()
        other.tidy()
        assert kept(other) == list(range(number + 1))
    keeper.finish(VECTORS)
    assert kept(store) == list(range(40))


def test_a_temporary_store_has_whole_blocks_only(tmp_path, clock):
    store = EmbeddingStore(tmp_path, {"weights": "x"}, dimensions=8, is_scratch=True)
    keeper = keeper_of(store, clock)
    clock.now += 100
    keeper.done(np.arange(30), VECTORS)
    assert kept(store) == []
    keeper.finish(VECTORS)
    assert kept(store) == list(range(40))


def test_a_direction_needs_a_length_whose_products_float32_holds():
    lengths = np.array([0, 1e-38, 1e-16, 1e-14, 1, 1e14, 1e16, 3e38, np.inf, np.nan], dtype=np.float32)
    assert has_direction(lengths[:, None]).tolist() == [False] * 3 + [True] * 3 + [False] * 4
