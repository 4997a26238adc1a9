"""Texts of megabytes: the token ids of the whole text, though the tokenizer sees only its beginning."""

import itertools
import random

import pytest
from helpers.data import DEMO_MODEL, REPOSITORY, read_jsonl
from helpers.tiny import make_tiny_reranker, make_tokenizer
from helpers.tokenizer_kinds import KINDS, PIECES, tokenize, tokenizer_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from embedding_finetune.model import tokens as batching
from embedding_finetune.model.tokens import beginnings, pair_beginnings


@given(
    kind=st.sampled_from(KINDS),
    parts=st.lists(st.tuples(PIECES, st.sampled_from([1, 2, 9, 200])), min_size=1, max_size=4).filter(
        lambda parts: sum(len(piece) * count for piece, count in parts) < 60_000
    ),
    max_length=st.integers(4, 40),
    instruction=st.sampled_from(["", "query: ", "x" * 150]),
    lower_case=st.booleans(),
)
@example(kind="slow", parts=[("</s>", 9)], max_length=4, instruction="", lower_case=False)
@settings(max_examples=80)
def test_the_beginning_of_a_long_text_has_the_ids_of_the_whole(kind, parts, max_length, instruction, lower_case):
    tokenizer = tokenizer_of(kind)
    text = "".join(piece * count for piece, count in parts)
    whole = instruction + text
    whole = whole.lower() if lower_case else whole
    expected = tokenizer(whole, truncation=True, max_length=max_length)["input_ids"]
    uncut = len(tokenizer(whole, verbose=False)["input_ids"])
    options = {"instruction": instruction, "max_length": max_length, "lower_case": lower_case}
    assert tokenize(tokenizer, ["a", text], **options)[0][1] == expected
    assert tokenize(tokenizer, [text] * 2, **options)[1] == 2 * (uncut > max_length)


def test_the_beginnings_of_a_pair_have_the_ids_of_the_whole_pair(monkeypatch):
    monkeypatch.setattr(batching, "_FEWEST_CHARACTERS", 300)
    monkeypatch.setattr(batching, "_CHARACTERS_PER_TOKEN", 4)
    tokenizer, cut = make_tokenizer(), 0
    texts = [("reset the pump " * 300)[:size] for size in (3, 40, 1500, 4000)] + ["?" * 700, "x" * 3000]
    for max_length, query, passage in itertools.product((9, 16), texts, texts):
        options = {"truncation": "longest_first", "max_length": max_length}
        queries, passages = pair_beginnings(tokenizer, [query, "a"], [passage, "b"], max_length)
        ids = tokenizer(queries, passages, **options)["input_ids"]
        assert ids == tokenizer([query, "a"], [passage, "b"], **options)["input_ids"]
        cut += len(queries[0] + passages[0]) < len(query + passage)
    assert cut > 10


def test_a_word_that_is_too_long_for_the_vocabulary_is_unknown_though_its_beginning_is_known():
    tokenizer = make_tokenizer()
    text = "pump " * 5 + "ab" * 100_000
    (ids,), cut = tokenize(tokenizer, [text], instruction="", max_length=32)
    assert ids == tokenizer("pump " * 5 + "ab" * 51)["input_ids"]
    assert ids[-2] == tokenizer.unk_token_id
    assert cut == 0


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "BPE of whole texts", "Unigram"])
def test_the_tokenizer_never_sees_the_whole_of_a_text_of_20_megabytes(kind, monkeypatch):
    tokenizer = tokenizer_of(kind)
    words = "how do i reset the pump valve ? alarm , who is it".split()
    text = " ".join(random.Random(0).choices(words, k=100_000)) * 60
    assert len(text) > 20e6
    seen, backend = [], tokenizer.backend_tokenizer

    class Watched:
        def __getattr__(self, name):
            return getattr(backend, name)

        def encode_batch(self, texts, **options):
            seen.extend(map(len, texts))
            return backend.encode_batch(texts, **options)

        def encode_batch_fast(self, texts):
            seen.extend(map(len, texts))
            return backend.encode_batch_fast(texts)

    monkeypatch.setattr(tokenizer, "_tokenizer", Watched())
    (ids, _), cut = tokenize(tokenizer, [text, "a"], instruction="query: ", max_length=512)
    assert (len(ids), cut) == (512, 1)
    assert 1 < max(seen) <= 2 * 16 * 512
    seen.clear()
    queries, passages = pair_beginnings(tokenizer, ["reset the pump", text[:30_000]], [text, text], 512)
    assert max(seen) < 500_000
    assert max(map(len, [*queries, *passages])) < 500_000


def test_where_the_beginning_is_cut_away_a_text_stays_whole():
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "left"
    text = "reset the pump " * 10_000 + "alarm"
    assert beginnings(tokenizer, [text], 16) == [text]


@pytest.mark.demo_model
def test_the_real_tokenizer_gives_the_beginning_of_a_long_text_the_ids_of_the_whole(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    texts = [text for row in read_jsonl(REPOSITORY / "candidate_context.jsonl") for text in row["context"]]
    rng = random.Random(0)
    for number in range(20):
        text = rng.choice(["", " ", "\n\n"]).join(rng.choices(texts, k=200))
        max_length = rng.choice([8, 32, 128])
        expected = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        assert tokenize(tokenizer, [text], instruction="", max_length=max_length) == ([expected], 1), number


def test_a_reranker_scores_a_text_of_megabytes_by_its_beginning(tmp_path, monkeypatch):
    from helpers.running import encoding_arguments

    from embedding_finetune.retrieval import reranker as reranking

    reranker = reranking.load_reranker(str(make_tiny_reranker(tmp_path / "reranker")), encoding_arguments())
    text = "press the red handle and hold it " * 10_000
    cut = reranker.scores(["reset the pump"], [text])
    monkeypatch.setattr(reranking, "pair_beginnings", lambda _, queries, passages, __: (queries, passages))
    assert cut == reranker.scores(["reset the pump"], [text])
