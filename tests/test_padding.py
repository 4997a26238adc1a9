"""Batches hold every text once, within their budget, and padding is where the tokenizer has it."""

import numpy as np
from helpers.tiny import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.model.padding import batches_by_length, batches_of_one_length, pad, padded_length


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


def test_padded_lengths_are_few_and_never_pass_the_limit():
    assert [padded_length(n, limit=20) for n in (1, 8, 9, 17, 20)] == [8, 8, 16, 20, 20]
    assert pad(make_tokenizer(), [[2, 7, 3]], limit=128)["input_ids"].shape == (1, 8)
    assert pad(make_tokenizer(), [[2, 7, 3]], limit=3)["input_ids"].shape == (1, 3)


@given(
    token_ids=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), min_size=1, max_size=8),
    side=st.sampled_from(["left", "right"]),
    limit=st.integers(1, 30),
    packed=st.booleans(),
)
def test_every_row_is_padded_as_if_it_were_the_only_one(token_ids, side, limit, packed):
    tokenizer = make_tokenizer(padding_side=side)
    width = padded_length(max(map(len, token_ids)), limit)
    batch = pad(tokenizer, [np.array(ids, np.int32) for ids in token_ids] if packed else token_ids, limit=limit)
    for ids, row, mask in zip(token_ids, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        padding, ones = [0] * (width - len(ids)), [1] * len(ids)
        assert row == (padding + ids if side == "left" else ids + padding)
        assert mask == (padding + ones if side == "left" else ones + padding)
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
