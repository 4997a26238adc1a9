import numpy as np
import pytest
from helpers.tiny import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.tokens import (
    batches_by_length,
    batches_of_one_length,
    first_rows,
    pad,
    padded_length,
    text_kinds,
    tokenize,
)


@given(lengths=st.lists(st.integers(0, 50), max_size=60), budget=st.integers(1, 200))
def test_batches_hold_every_text_once_within_the_token_budget(lengths, budget):
    batches = list(batches_by_length(lengths, budget))
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = padded_length(max(lengths[row] for row in batch), budget)
        assert len(batch) == 1 or len(batch) * longest <= budget
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@given(lengths=st.lists(st.integers(0, 50), max_size=60), budget=st.integers(1, 200), limit=st.integers(50, 60))
def test_batches_of_one_length_pad_every_text_as_if_it_were_alone(lengths, budget, limit):
    batches = batches_of_one_length(lengths, budget, limit=limit)
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        (length,) = {padded_length(max(lengths[row], 1), limit) for row in batch}
        assert len(batch) == 1 or len(batch) * length <= budget


def test_padding_stands_on_the_tokenizers_own_side():
    ids = [[2, 7, 3], [2, 7, 8, 9, 3]]
    right = pad(make_tokenizer(padding_side="right"), ids, limit=5)
    assert right["input_ids"].tolist() == [[2, 7, 3, 0, 0], [2, 7, 8, 9, 3]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    left = pad(make_tokenizer(padding_side="left"), ids, limit=5)
    assert left["input_ids"].tolist() == [[0, 0, 2, 7, 3], [2, 7, 8, 9, 3]]


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


def test_padded_lengths_are_few_and_never_pass_the_limit():
    assert [padded_length(n, limit=20) for n in (1, 8, 9, 17, 20)] == [8, 8, 16, 20, 20]
    assert pad(make_tokenizer(), [[2, 7, 3]], limit=128)["input_ids"].shape == (1, 8)
    assert pad(make_tokenizer(), [[2, 7, 3]], limit=3)["input_ids"].shape == (1, 3)


def test_texts_have_the_tokens_of_their_own_instructions_or_of_their_kinds():
    tokenizer = make_tokenizer()
    kind, _ = text_kinds(EmbeddingConfig(query_instruction="how: "), query_max_len=8, passage_max_len=8)
    texts, own = ["the pump", "the pump", "the pump", "the red pump desk"], [None, "", "open ", "reset open call "]
    tokens, cut = kind.tokenize(tokenizer, texts, own)
    written = ["how: the pump", "the pump", "open the pump", "reset open call the red pump desk"]
    expected = [tuple(tokenizer(text, truncation=True, max_length=8)["input_ids"]) for text in written]
    assert [ids for ids, _ in tokens] == expected
    assert cut == 1
    assert kind.tokenize(tokenizer, texts) == kind.tokenize(tokenizer, texts, [None] * 4)


def test_each_texts_own_instruction_is_what_pooling_leaves_out():
    tokenizer = make_tokenizer()
    config = EmbeddingConfig(query_instruction="how : ", include_prompt=False)
    kind, _ = text_kinds(config, query_max_len=16, passage_max_len=16)
    tokens, _ = kind.tokenize(tokenizer, ["pump"] * 4, [None, "", "open the ", "reset open call "])
    assert [length for _, length in tokens] == [3, 0, 3, 4]  # with [CLS]; none where there is no instruction
    # The same letters, and another part of them is the instruction.
    one, other = kind.tokenize(tokenizer, ["the pump", "pump"], ["open ", "open the "])[0]
    assert one.ids == other.ids
    assert one != other


def test_an_instruction_that_fills_the_length_is_named_with_its_row():
    tokenizer = make_tokenizer()
    kind, _ = text_kinds(EmbeddingConfig(query_instruction="how: "), query_max_len=6, passage_max_len=6)
    kind.check_instructions(tokenizer, first_rows([None, "", "open the pump ", None]))
    with pytest.raises(
        UserError, match=r'^--query_max_len 6 leaves no token for the query of row 3 .*"instruction" \'a b'
    ):
        kind.check_instructions(tokenizer, first_rows([None, "", "a b c d ", "a b c d "]))
