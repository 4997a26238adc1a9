from unittest import mock

import numpy as np
import pytest
from helpers.tiny import make_tokenizer
from helpers.tokenizer_kinds import KINDS, PIECES, tokenize, tokenizer_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from embedding_finetune.command_line import UserError
from embedding_finetune.model import tokens as batching
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.tokens import (
    TextKind,
    first_rows,
    prompt_length,
    text_kinds,
)


def test_token_ids_are_those_of_the_tokenizer_with_instruction_and_truncation():
    tokenizer = make_tokenizer()
    texts = ["reset the {pump}", "", "who do i call for the alarm before the week"]
    ours, cut = tokenize(tokenizer, texts, instruction="how: ", max_length=8)
    assert ours == [tokenizer("how: " + text, truncation=True, max_length=8)["input_ids"] for text in texts]
    assert max(map(len, ours)) == 8
    assert cut == 2


def test_an_empty_instruction_leaves_the_text_as_it_is():
    tokenizer = make_tokenizer()
    token_ids, _ = tokenize(tokenizer, [" {x} 100%s "], instruction="", max_length=64)
    assert token_ids == [tokenizer(" {x} 100%s ")["input_ids"]]


def test_a_text_that_just_fits_is_not_counted_as_cut():
    tokenizer = make_tokenizer()
    whole = len(tokenizer("reset the pump")["input_ids"])
    assert tokenize(tokenizer, ["reset the pump"] * 3, instruction="", max_length=whole)[1] == 0
    assert tokenize(tokenizer, ["reset the pump"] * 3, instruction="", max_length=whole - 1)[1] == 3


def test_no_texts_give_no_tokens():
    assert tokenize(make_tokenizer(), [], instruction="", max_length=8) == ([], 0)


def test_texts_have_the_tokens_of_their_own_instructions_or_of_their_kinds():
    tokenizer = make_tokenizer()
    kind, _ = text_kinds(EmbeddingConfig(query_instruction="how: "), query_max_len=8, passage_max_len=8)
    texts, own = ["the pump", "the pump", "the pump", "the red pump desk"], [None, "", "open ", "reset open call "]
    tokens, cut = kind.tokenize(tokenizer, texts, own)
    written = ["how: the pump", "the pump", "open the pump", "reset open call the red pump desk"]
    expected = [tokenizer(text, truncation=True, max_length=8)["input_ids"] for text in written]
    assert [one.ids.tolist() for one in tokens] == expected
    assert cut == 1
    assert kind.tokenize(tokenizer, texts) == kind.tokenize(tokenizer, texts, [None] * 4)


def test_each_texts_own_instruction_is_what_pooling_leaves_out():
    tokenizer = make_tokenizer()
    config = EmbeddingConfig(query_instruction="how : ", include_prompt=False)
    kind, _ = text_kinds(config, query_max_len=16, passage_max_len=16)
    tokens, _ = kind.tokenize(tokenizer, ["pump"] * 4, [None, "", "open the ", "reset open call "])
    assert [one.prompt_length for one in tokens] == [3, 0, 3, 4]  # with [CLS]; none where there is no instruction
    # The same letters, and another part of them is the instruction.
    one, other = kind.tokenize(tokenizer, ["the pump", "pump"], ["open ", "open the "])[0]
    assert one.ids.tolist() == other.ids.tolist()
    assert one != other


def test_an_instruction_that_fills_the_length_is_named_with_its_row():
    tokenizer = make_tokenizer()
    kind, _ = text_kinds(EmbeddingConfig(query_instruction="how: "), query_max_len=6, passage_max_len=6)
    kind.check_instructions(tokenizer, first_rows([None, "", "open the pump ", None]))
    with pytest.raises(
        UserError, match=r'^--query_max_len 6 leaves no token for the query of row 3 .*"instruction" \'a b'
    ):
        kind.check_instructions(tokenizer, first_rows([None, "", "a b c d ", "a b c d "]))


def by_calls_of_the_tokenizer(kind, tokenizer, texts, instructions):
    """What TextKind.tokenize gives, by calls of transformers for one text each: [(ids, prompt length)], number cut."""
    tokens, cut = [], 0
    for text, own in zip(texts, instructions):
        own = kind.instruction if own is None else own
        text = (own + text).lower() if kind.lower_case else own + text
        encoded = tokenizer([text], truncation=True, max_length=kind.max_length)
        left_out = 0 if kind.include_prompt else prompt_length(tokenizer, own, lower_case=kind.lower_case)
        tokens.append((encoded["input_ids"][0], left_out))
        cut += len(tokenizer([text], verbose=False)["input_ids"][0]) > kind.max_length
    return tokens, cut


def settings_of(tokenizer):
    backend = tokenizer.backend_tokenizer
    return backend.truncation, backend.padding, backend.encode_special_tokens


def first_places(items):
    """For each item the place of the first one that is equal: which are the same, to a dict."""
    places = {}
    return [places.setdefault(item, place) for place, item in enumerate(items)]


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(PIECES, max_size=5).map("".join),
    st.tuples(PIECES, st.integers(100, 2000)).map(lambda pair: (pair[0] * pair[1])[:12_000]),
    st.sampled_from(["", " ", "\0", "the pump", "\ufeff", "e\u0301", "\u1e9e", "İ", "[CLS]", "<s>", "\U0010ffff"]),
)
RUST_KINDS = [kind for kind in KINDS if kind != "slow"]


@given(
    kind_of_tokenizer=st.sampled_from(KINDS),
    rows=st.lists(st.tuples(TEXTS, st.sampled_from([None, None, "", "open the ", "</s>"])), max_size=8),
    kind=st.builds(
        TextKind,
        name=st.just("query"),
        instruction=st.sampled_from(["", "How: ", "[SEP]"]),
        max_length=st.integers(3, 40),
        lower_case=st.booleans(),
        include_prompt=st.booleans(),
    ),
    truncation_side=st.sampled_from(["right", "left"]),
    split_special_tokens=st.booleans(),
    at_once=st.sampled_from([1, 3, 2048]),
)
@example("WordPiece", [("a " * 9000, None)] * 2, TextKind("query", "", 8, False, True), "right", False, 2048)
@settings(max_examples=100)
def test_texts_have_the_tokens_that_calls_of_the_tokenizer_give(
    kind_of_tokenizer, rows, kind, truncation_side, split_special_tokens, at_once
):
    tokenizer, texts, instructions = tokenizer_of(kind_of_tokenizer), *([row[i] for row in rows] for i in (0, 1))
    with (
        mock.patch.object(batching, "_TEXTS_AT_ONCE", at_once),
        mock.patch.object(tokenizer, "truncation_side", truncation_side),
        mock.patch.object(tokenizer, "split_special_tokens", split_special_tokens),
    ):
        expected, expected_cut = by_calls_of_the_tokenizer(kind, tokenizer, texts, instructions)
        tokens, cut = kind.tokenize(tokenizer, texts, instructions)
        assert [(one.ids.tolist(), one.prompt_length) for one in tokens] == expected
        assert all(one.ids.dtype == np.int32 for one in tokens)
        assert cut == expected_cut
        assert first_places(tokens) == first_places([(tuple(ids), left_out) for ids, left_out in expected])
        options = {"instruction": kind.instruction, "max_length": kind.max_length, "lower_case": kind.lower_case}
        plain, plain_cut = tokenize(tokenizer, texts, **options)
        plainly, plainly_cut = by_calls_of_the_tokenizer(kind, tokenizer, texts, [None] * len(texts))
        assert (plain, plain_cut) == ([ids for ids, _ in plainly], plainly_cut)


@pytest.mark.parametrize("kind", RUST_KINDS)
def test_a_rust_tokenizer_is_left_as_a_call_leaves_it(kind):
    tokenizer = tokenizer_of(kind)
    for before in ({"padding": "max_length", "max_length": 9}, {"truncation": True, "max_length": 5}, {}):
        tokenizer(["the pump"], truncation=True, max_length=7)
        expected = settings_of(tokenizer)
        tokenizer(["the red pump"], **before)
        tokenize(tokenizer, ["the red pump"], instruction="", max_length=7)
        assert settings_of(tokenizer) == expected


@pytest.mark.parametrize("kind", RUST_KINDS)
def test_half_a_surrogate_pair_is_the_same_error_as_of_a_call(kind):
    texts = ["the pump", "the \ud800 pump"]
    with pytest.raises(TypeError) as expected:
        tokenizer_of(kind)(texts)
    with pytest.raises(TypeError) as error:
        tokenize(tokenizer_of(kind), texts, instruction="", max_length=8)
    assert str(error.value) == str(expected.value)


def test_a_tokenizer_that_is_python_in_part_is_called():
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return super()._encode_plus(text=[f"{one} !" for one in text], **options)

    backend = make_tokenizer().backend_tokenizer
    tokenizer = Shouting(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    (ids, _), cut = tokenize(tokenizer, ["the pump", "the red pump"], instruction="", max_length=5)
    assert ids == make_tokenizer()("the pump !")["input_ids"]
    assert cut == 1


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", text_kinds(EmbeddingConfig(), query_max_len=8, passage_max_len=8))
def test_a_text_without_tokens_is_an_error_that_names_it_wherever_it_stands(kind, place):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # which adds special tokens
    texts = ["reset the pump", "a desk", "an alarm"]
    texts[place] = "\u200b"  # a space without a width, which BERT's normalisation removes
    with pytest.raises(UserError, match=rf"makes no token of the {kind.name} '\\u200b'; leave it out"):
        kind.tokenize(tokenizer, texts)
