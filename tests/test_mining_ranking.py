"""What mining chooses from: rankings of one retriever or several, their scores, near-duplicates, a reranker's order."""

import numpy as np
import pytest
from helpers.mining import SENTENCES, mine, reference, similarity, write_data
from helpers.vectors import encoder_of

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.mining import ranking
from embedding_finetune.mining.arguments import MiningOptions
from embedding_finetune.mining.candidates import Pairs
from embedding_finetune.mining.ranking import rank_candidates
from embedding_finetune.mining.stopwatch import Stopwatch


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def test_near_duplicates_of_a_positive_are_left_out_of_the_window_and_of_random_fills(tiny_bert, data, tmp_path):
    flags = ("--range_for_sampling", "0-8", "--negative_number", "19")
    threshold = 0.996
    close = similarity(tiny_bert, SENTENCES, SENTENCES) >= threshold
    assert 20 < close.sum() < 300
    mined, audit = mine(tiny_bert, data, tmp_path, *flags, "--near_duplicate_threshold", str(threshold))
    plain, _ = mine(tiny_bert, data, tmp_path, *flags)
    for row, without in zip(mined, plain):
        near = {
            text
            for positive in row["pos"]
            for text, is_near in zip(SENTENCES, close[SENTENCES.index(positive)])
            if is_near
        }
        assert set(row["neg"]) == set(without["neg"]) - near
    assert audit["left_out"]["near-duplicate of a positive"] > 0


def test_several_retrievers_are_fused_and_the_first_gives_the_scores(tiny_bert, other_bert, data, tmp_path):
    flags = ("--range_for_sampling", "0-6", "--negative_number", "6", "--sampling_strategy", "top", "--save_scores")
    mined, audit = mine([tiny_bert, other_bert], data, tmp_path, *flags)
    queries = [row["query"] for row in mined]
    scores = [similarity(model, queries, SENTENCES) for model in (tiny_bert, other_bert)]
    for number, row in enumerate(mined):
        credit = np.zeros(len(SENTENCES))
        for own in scores:
            ranking = np.argsort(-own[number], kind="stable")[:6]
            credit[ranking] += 1 / (60 + np.arange(1, 7))
        fused = [SENTENCES[p] for p in np.argsort(-credit, kind="stable")[:6] if credit[p]]
        expected = [text for text in fused if text not in row["pos"]]
        assert row["neg"][: len(expected)] == expected
        assert row["neg_scores"] == pytest.approx([scores[0][number][SENTENCES.index(t)] for t in row["neg"]], abs=2e-6)
    assert list(audit["weights_sha256"]) == [str(tiny_bert), str(other_bert)]


def test_a_reranker_orders_filters_and_scores(tiny_bert, tiny_reranker, data, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    flags = ("--range_for_sampling", "2-12", "--negative_number", "10", "--sampling_strategy", "top", "--save_scores")
    flags += ("--reranker_name_or_path", tiny_reranker, "--absolute_margin", "0.05")
    mined, audit = mine(tiny_bert, data, tmp_path, *flags)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reranker).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reranker)

    def logit(query, text):
        with torch.no_grad():
            return model(**tokenizer(query, text, return_tensors="pt")).logits.item()

    windows = reference(tiny_bert, data, window=(2, 12), allowed=lambda *_: True)
    for row, window in zip(mined, windows):
        lowest = min(logit(row["query"], text) for text in row["pos"])
        logits = {text: logit(row["query"], text) for text in window}
        expected = sorted((text for text in window if logits[text] <= lowest - 0.05), key=lambda text: -logits[text])
        assert row["neg"][: len(expected)] == expected
        for field in ("pos", "neg"):
            expected = [logit(row["query"], text) for text in row[field]]
            assert row[f"{field}_scores"] == pytest.approx(expected, abs=1e-4)
    assert str(tiny_reranker) in audit["weights_sha256"]
    assert audit["left_out"]["--absolute_margin"] > 0


def test_a_range_as_wide_as_you_like_is_cut_to_the_corpus(tiny_bert, other_bert, tiny_reranker, data, tmp_path):
    several = ("--near_duplicate_threshold", "0.996", "--reranker_name_or_path", tiny_reranker)
    for models, flags in ((tiny_bert, ()), ([tiny_bert, other_bert], several)):
        flags = (*flags, "--negative_number", "9", "--save_scores")
        whole, _ = mine(models, data, tmp_path, *flags, "--range_for_sampling", "4-20")
        wide, audit = mine(models, data, tmp_path, *flags, "--range_for_sampling", "4-2000000000")
        assert wide == whole
        assert all(len(row["neg"]) == 9 for row in wide)
        assert audit["settings"]["range_for_sampling"] == [4, 2000000000]


def test_the_parts_add_up_and_every_text_that_is_encoded_counts_as_encoding(
    tiny_bert, other_bert, tiny_reranker, data, tmp_path, monkeypatch
):
    """On a clock that only encoding, loading and rescoring move."""
    from types import SimpleNamespace

    from embedding_finetune.mining import ranking as candidates
    from embedding_finetune.mining import stopwatch
    from embedding_finetune.retrieval import reranker as reranking
    from embedding_finetune.retrieval import tower as towers

    now = [0.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(owner, name, seconds):
        original = getattr(owner, name)

        def slowed(*args, **kwargs):
            now[0] += seconds(*args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, slowed)

    slow(towers.Tower, "_embed", lambda encoder, block, *_: len(block.missing))
    slow(candidates, "load_encoder", lambda *_: 1000)
    slow(reranking.Reranker, "scores", lambda reranker, queries, _: 0.25 * len(queries))
    flags = ("--range_for_sampling", "0-3", "--negative_number", "8")
    _, plain = mine(tiny_bert, data, tmp_path, *flags)
    assert plain["seconds"] == pytest.approx(
        {"read": 0, "load": 1000, "encode": 30, "search": 0, "select": 0, "write": 0, "total": 1030}
    )
    filters = ("--relative_margin", "0.001", "--near_duplicate_threshold", "0.99", "--save_scores")
    _, filtered = mine(tiny_bert, data, tmp_path, *flags, *filters)
    assert filtered["negatives_drawn_at_random"] > 0
    assert filtered["seconds"] == plain["seconds"]  # positives, fills: no text is encoded twice
    _, several = mine([tiny_bert, other_bert], data, tmp_path, *flags, *filters)
    assert several["seconds"]["encode"] == 60
    assert several["seconds"]["load"] == 2000
    _, reranked = mine(tiny_bert, data, tmp_path, *flags, *filters, "--reranker_name_or_path", tiny_reranker)
    assert (reranked["seconds"]["encode"], reranked["seconds"]["load"]) == (30, 1000)
    assert reranked["seconds"]["rescore"] >= 0.25 * (30 + 11 + reranked["negatives_drawn_at_random"])
    for audit in (plain, filtered, several, reranked):
        assert sum(audit["seconds"].values()) == pytest.approx(2 * audit["seconds"]["total"])


def rank(monkeypatch, vectors, texts, beyond="", **flags):
    """Candidates of the queries "q" and "r" over texts, of models of made-up embeddings, by name."""
    encoders = {name: encoder_of(table) for name, table in vectors.items()}
    for name, encoder in encoders.items():
        encoder.weights_digest = f"digest of {name}"
    monkeypatch.setattr(ranking, "load_encoder", lambda name, *_, **__: encoders[name])
    options = MiningOptions(model_name_or_path=list(vectors), input_file="", output_file="", **flags)
    corpus = Corpus(texts, beyond=beyond)
    pairs = Pairs(np.array([0, 1, 1]), np.array([0, 0, len(corpus.texts) - 1]))
    return rank_candidates(["q", "r"], corpus, pairs, np.array([0, 2]), options, Stopwatch())


ONE = {"q": [1, 0], "r": [0, 1], "a": [3, 0], "b": [1, 1], "c": [2, 2], "d": [0, 1]}
OTHER = {"q": [1, 0], "r": [0, 1], "a": [0, 1], "b": [1, 0], "c": [0, 2], "d": [4, 0]}


def test_a_ranking_ends_with_the_window_whose_scores_are_known(monkeypatch):
    found = rank(monkeypatch, {"one": ONE}, "abcd", range_for_sampling=(1, 3))
    assert found.ranking.tolist() == [[0, 2, 1], [2, 1, 3]]  # q: 3 1 2 0; r: 0 1 2 1, ties by position
    assert found.window_scores.tolist() == [[2, 1], [1, 1]]
    assert found.window == (1, 3)
    assert found.pair_scores.tolist() == [3, 0, 1]
    assert found.score(Pairs(np.array([1, 0, 1]), np.array([3, 3, 0]))).tolist() == [1, 0, 0]
    assert found.weights_digests == {"one": "digest of one"}
    assert found.near_duplicates.shape == (0, 2)


def test_a_window_past_the_end_of_the_corpus_is_cut(monkeypatch):
    found = rank(monkeypatch, {"one": ONE}, "abcd", range_for_sampling=(3, 100))
    assert (found.window, found.window_scores.tolist()) == ((3, 4), [[0], [0]])
    beyond = rank(monkeypatch, {"one": ONE}, "abcd", range_for_sampling=(50, 100))
    assert (beyond.window, beyond.window_scores.shape) == ((4, 4), (2, 0))


def test_positives_that_the_pool_lacks_are_scored_and_never_ranked(monkeypatch):
    found = rank(monkeypatch, {"one": {**ONE, "best": [9, 9]}}, "abcd", beyond=["a", "best"], range_for_sampling=(0, 9))
    assert found.ranking.tolist() == [[0, 2, 1, 3], [2, 1, 3, 0]]
    assert found.pair_scores.tolist() == [3, 0, 9]


def test_two_models_are_fused_by_reciprocal_ranks_and_the_first_gives_the_scores(monkeypatch):
    found = rank(monkeypatch, {"one": ONE, "other": OTHER}, "abcd", range_for_sampling=(0, 2))
    # q: a c by the first, d b by the second: of the two first ranks the earlier position. r: c b and c a.
    assert found.ranking.tolist() == [[0, 3], [2, 0]]
    assert found.window_scores.tolist() == [[3, 0], [2, 0]]
    assert list(found.weights_digests) == ["one", "other"]


def test_near_duplicates_are_those_of_the_positives_by_cosine(monkeypatch):
    found = rank(monkeypatch, {"one": ONE}, "abcd", range_for_sampling=(0, 2), near_duplicate_threshold=0.99)
    # Of a: itself. Of c: b, of the same direction though half as long, and itself.
    assert sorted(map(tuple, found.near_duplicates.tolist())) == [(0, 0), (2, 1), (2, 2)]


def test_a_reranker_puts_the_window_into_its_own_order_and_scores_the_pairs(monkeypatch):
    class Reranker:
        weights_digest = "digest of it"

        def scores(self, queries, texts):
            return np.array([ord(text) - ord("a") + 10 * (query == "r") for query, text in zip(queries, texts)], float)

    monkeypatch.setattr(ranking, "load_reranker", lambda *_: Reranker())
    found = rank(monkeypatch, {"one": ONE}, "abcd", range_for_sampling=(1, 4), reranker_name_or_path="it")
    assert found.ranking.tolist() == [[0, 3, 2, 1], [2, 3, 1, 0]]  # the first rank is no part of the window
    assert found.window_scores.tolist() == [[3, 2, 1], [13, 11, 10]]
    assert found.pair_scores.tolist() == [0, 10, 13]
    assert found.weights_digests == {"one": "digest of one", "it": "digest of it"}
