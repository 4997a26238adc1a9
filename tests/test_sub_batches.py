"""How the texts of a training batch are laid out: cuts by cost, padding, and what the forward needs to know."""

import itertools
from array import array

import numpy as np
import pytest
import torch
from helpers.data import padded_ids
from helpers.tiny import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.model.padding import batches_by_length
from embedding_finetune.model.sub_batches import (
    PackedLayout,
    PaddedLayout,
    cheapest_cuts,
    cuts_of_sums,
    layout_for,
    padded_texts,
)
from embedding_finetune.model.tokens import Tokens


def tokens_of(ids, prompt_length=0):
    return Tokens(array("i", ids).tobytes(), prompt_length)


def cost_of(lengths, ends, cost):
    return sum((end - first) * lengths[first] + cost for first, end in zip([0, *ends], ends))


def test_the_worked_example_of_cuts():
    lengths = np.repeat([96, 16], 8)
    assert cheapest_cuts(lengths, 10_000, 500) == [8, 16]  # 1896 tokens
    assert cheapest_cuts(lengths, 10_000, 700) == [16]  # 2236, apart 2296
    assert cheapest_cuts(lengths, 400, 500) == [4, 8, 16]  # eight texts of 96 are too many at once
    assert cheapest_cuts(np.array([90]), 10, 5) == [1]  # one text goes through, however long it is


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([8, 16, 24, 40, 80]), min_size=1, max_size=9),
    most=st.sampled_from([40, 100, 400]),
    cost=st.sampled_from([0, 7, 50, 300]),
)
def test_cuts_are_as_cheap_as_the_cheapest_of_all(lengths, most, cost):
    lengths = np.sort(lengths)[::-1]
    rows = len(lengths)
    possible = [
        cost_of(lengths, [*ends, rows], cost)
        for count in range(rows)
        for ends in itertools.combinations(range(1, rows), count)
        if all(
            (end - first) * lengths[first] <= most or end - first == 1 for first, end in zip([0, *ends], [*ends, rows])
        )
    ]
    ends = cheapest_cuts(lengths, most, cost)
    assert ends[-1] == rows
    assert ends == sorted(set(ends))
    assert all((end - first) * lengths[first] <= most or end - first == 1 for first, end in zip([0, *ends], ends))
    # Stretches are cut into equal parts only, between lengths: a part may be a little wider than it need be.
    assert cost_of(lengths, ends, cost) <= min(possible) * 1.5


def debian_like(rows, group, seed):
    """Padded lengths of a batch of make_debian.py's rows: a query and `group` passages each, longest first."""
    rng = np.random.default_rng(seed)
    queries, passages = rng.lognormal(2.43, 0.30, rows), rng.lognormal(4.46, 0.48, rows * group)
    lengths = np.clip(np.concatenate([queries, passages]).round(), 3, 512)
    return np.sort(lengths)[::-1], np.sort(-(-lengths // 8) * 8)[::-1].astype(int)


@pytest.mark.parametrize(("rows", "group"), [(32, 2), (64, 2), (128, 2), (128, 8)])
def test_on_an_accelerator_little_padding_is_computed_in_few_sub_batches(rows, group):
    ratios, counts = [], []
    for seed in range(20):
        real, padded = debian_like(rows, group, seed)
        ends = cheapest_cuts(padded, 2**14, 1000)
        ratios.append(cost_of(padded, ends, 0) / real.sum())
        counts.append(len(ends))
    assert np.mean(ratios) <= 1.35
    assert np.mean(counts) <= 13


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), most=st.integers(1, 200))
def test_sums_are_within_the_most_and_no_text_is_lost(lengths, most):
    lengths = np.sort(lengths)[::-1]
    ends = cuts_of_sums(lengths, most)
    assert ends[-1] == len(lengths)
    assert ends == sorted(set(ends))
    for first, end in zip([0, *ends], ends):
        assert lengths[first:end].sum() <= most or end - first == 1


TEXTS = [tokens_of(ids) for ids in ([2, 7, 3], [2, 7, 8, 9, 7, 7, 7, 7, 7, 7, 7, 3], [2, 3], [2, 9, 9, 3])]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_texts_stand_from_the_longest_to_the_shortest_in_the_columns_they_need(side):
    tokenizer = make_tokenizer(padding_side=side)
    places, texts = PaddedLayout(tokenizer, limit=128, tokens_per_sub_batch=16)(TEXTS)
    assert places.tolist() == [2, 0, 3, 1]
    assert texts["sub_batches"] == (
        [(0, 1, 0, 16), (1, 3, 0, 8), (3, 4, 0, 8)]
        if side == "right"
        else [(0, 1, 0, 16), (1, 3, 8, 16), (3, 4, 8, 16)]
    )
    ids, mask = padded_ids(texts), texts["attention_mask"].bool()
    for text, place in zip(TEXTS, places):
        assert ids[place][mask[place]].tolist() == text.ids.tolist()
    assert texts["token_ids"].tolist() == [0, 2, 3, 7, 8, 9]


def test_packed_texts_stand_end_to_end():
    places, texts = PackedLayout(first_position=2, tokens_per_sub_batch=12)(TEXTS)
    assert places.tolist() == [2, 0, 3, 1]
    assert texts["boundaries"].tolist() == [0, 12, 16, 19, 21]
    assert texts["sub_batches"] == [(0, 1, 0, 12, 12), (1, 4, 12, 21, 4)]
    assert texts["token_ids"][texts["positions"]][16:].tolist() == [2, 7, 3, 2, 3]
    assert texts["position_ids"][10:18].tolist() == [12, 13, 2, 3, 4, 5, 2, 3]


def test_prompts_follow_their_texts():
    texts = [tokens_of([2, 7, 3], 1), tokens_of([2, 7, 7, 7, 3], 2)]
    for layout in (PackedLayout(0, 99), PaddedLayout(make_tokenizer(), 128, 99)):
        places, laid_out = layout(texts)
        assert places.tolist() == [1, 0]
        assert laid_out["prompt_lengths"].tolist() == [2, 1]


def layout_on(device, **options):
    return layout_for(torch.device(device), make_tokenizer(), limit=64, **{"hidden_size": 32, **options})


def test_the_layout_suits_the_device():
    cpu, gpu = layout_on("cpu"), layout_on("cuda", hidden_size=1024)
    assert (cpu.tokens_per_sub_batch, cpu.cost_of_a_sub_batch) == (1024, None)
    assert (gpu.tokens_per_sub_batch, gpu.cost_of_a_sub_batch) == (16_384, 4096)
    assert (layout_on("mps").tokens_per_sub_batch, layout_on("mps").cost_of_a_sub_batch) == (8192, None)
    assert layout_on("cuda", tokens_per_sub_batch=7).tokens_per_sub_batch == 7
    assert layout_on("cuda", packed_from=2) == PackedLayout(2, 65_536)
    assert layout_on("cuda", packed_from=2, recompute=True) == PackedLayout(2, 16_384)
    assert layout_on("cuda", packed_from=2, recompute=True, tokens_per_sub_batch=7) == PackedLayout(2, 7)


def test_on_a_cpu_sub_batches_are_filled_as_far_as_they_go():
    lengths = np.random.default_rng(0).integers(3, 60, 50)
    places, laid_out = layout_on("cpu", tokens_per_sub_batch=200)(
        [tokens_of([2, *[7] * (length - 2), 3]) for length in lengths]
    )
    expected = list(batches_by_length(lengths, 200))
    assert np.array_equal(np.argsort(places), np.concatenate(expected))
    assert [end - first for first, end, _, _ in laid_out["sub_batches"]] == [len(rows) for rows in expected]


def test_one_sub_batch_holds_whole_texts():
    ids = torch.tensor([[2, 7, 3], [2, 3, 0]])
    texts = padded_texts(ids, (ids > 0).long())
    assert texts["sub_batches"] == [(0, 2, 0, 3)]
    assert torch.equal(padded_ids(texts), ids)
