import random

import numpy as np
import pytest
import torch
from helpers.data import padded_ids, write_jsonl
from helpers.tiny import make_tokenizer
from torch.utils.data import DataLoader

from embedding_finetune.data.judgements import Judgements
from embedding_finetune.data.texts import text_id
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.sub_batches import PaddedLayout
from embedding_finetune.training.batches import EmbedCollator, EpochSampler, KnownPositives, TrainDataset
from embedding_finetune.training.loss import PADDING_ID
from embedding_finetune.training.rows import load_rows


def rows_of(tmp_path, records):
    return load_rows(str(write_jsonl(tmp_path / "rows.jsonl", records)))


def many(count, negatives=6):
    return [
        {"query": f"q{n}", "pos": [f"p{n}", f"other p{n}"], "neg": [f"n{n}-{i}" for i in range(negatives)]}
        for n in range(count)
    ]


def collator(group_size, **config):
    tokenizer = make_tokenizer()
    return EmbedCollator(
        tokenizer,
        EmbeddingConfig(**config),
        group_size=group_size,
        query_max_len=16,
        passage_max_len=32,
        layout=PaddedLayout(tokenizer, 32, 1024),
    )


def test_an_example_is_one_positive_and_distinct_negatives(tmp_path):
    dataset = TrainDataset(rows_of(tmp_path, many(20)), group_size=4, seed=1)
    for index in range(20):
        example = dataset[0, index]
        positive, *negatives = example.passages
        assert positive in (f"p{index}", f"other p{index}")
        assert len(set(negatives)) == 3
        assert all(text.startswith(f"n{index}-") for text in negatives)


def test_choices_depend_on_seed_epoch_and_index_alone(tmp_path):
    rows = rows_of(tmp_path, many(20))
    forward = [TrainDataset(rows, group_size=3, seed=1)[2, i].passages for i in range(20)]
    dataset = TrainDataset(rows, group_size=3, seed=1)
    backward = [dataset[2, i].passages for i in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [dataset[3, i].passages for i in range(20)]
    assert forward != [TrainDataset(rows, group_size=3, seed=2)[2, i].passages for i in range(20)]


@pytest.mark.parametrize("persistent", [False, True])
def test_dataloader_workers_see_the_same_epochs_as_the_main_process(tmp_path, persistent):
    dataset = TrainDataset(rows_of(tmp_path, many(20)), group_size=3, seed=1)

    def epochs(**workers):
        sampler = EpochSampler(20, seed=5)
        loader = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=list, **workers)
        seen = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            seen.append([example.passages for batch in loader for example in batch])
        return seen

    alone = epochs(num_workers=0)
    assert alone == epochs(num_workers=2, persistent_workers=persistent)
    assert alone[0] != alone[1] != alone[2]


def test_the_sampler_yields_every_row_once_and_as_many_as_its_length():
    sampler = EpochSampler(13, seed=0)
    order = [index for _, index in sampler]
    assert sorted(order) == list(range(13))
    assert order != list(range(13))
    assert len(order) == len(sampler)
    assert [index for _, index in EpochSampler(5, seed=0, shuffle=False)] == [0, 1, 2, 3, 4]


def test_known_positives_are_those_of_every_row_with_the_same_query(tmp_path):
    rows = rows_of(
        tmp_path,
        [
            {"query": "caf\u00e9", "pos": ["a"]},
            {"query": "other", "pos": ["b"]},
            {"query": " cafe\u0301 ", "pos": ["c", "a"]},
        ],
    )
    known = set(KnownPositives(rows).of(text_id("caf\u00e9")).tolist())
    assert known == {text_id("a"), text_id("c"), text_id("caf\u00e9")}


def test_rows_without_negatives_and_with_other_fields_are_read_together(tmp_path):
    rows = rows_of(
        tmp_path,
        [
            {"query": "a", "pos": ["p"]},
            {"query": "b", "pos": ["p"], "neg": [], "meta": {"x": 1}},
            {"query": "c", "pos": ["p"], "neg": ["n"], "pos_scores": [0.5]},
        ],
    )
    dataset = TrainDataset(rows, group_size=3, seed=0)
    assert [dataset[0, i].passages for i in range(3)] == [["p"], ["p"], ["p", "n"]]


def test_a_group_short_of_negatives_is_filled_with_masked_columns(tmp_path):
    rows = rows_of(tmp_path, [{"query": "a", "pos": ["red"], "neg": ["green"]}, {"query": "b", "pos": ["blue"]}])
    dataset = TrainDataset(rows, group_size=4, seed=0)
    batch = collator(4)([dataset[0, 0], dataset[0, 1]])
    red, green, blue = map(text_id, ("red", "green", "blue"))
    assert batch["passage_ids"].tolist() == [[red, green, PADDING_ID, PADDING_ID], [blue] + [PADDING_ID] * 3]
    assert len(padded_ids(batch["texts"])) == 5  # two queries, three passages: padding is not encoded


def test_a_text_that_a_batch_holds_several_times_is_encoded_once(tmp_path):
    rows = rows_of(tmp_path, [{"query": q, "pos": ["reset"], "neg": ["a", "b"]} for q in ("red", "green", "red")])
    dataset = TrainDataset(rows, group_size=3, seed=0)
    batch = collator(3)([dataset[0, i] for i in range(3)])
    assert len(padded_ids(batch["texts"])) == 5
    texts = padded_ids(batch["texts"])[batch["passage_index"][:, 0]]
    assert torch.equal(texts[0], texts[1])
    assert batch["query_index"][0] == batch["query_index"][2] != batch["query_index"][1]


def test_instructions_go_before_queries_and_passages_and_never_into_text_ids(tmp_path):
    rows = rows_of(tmp_path, [{"query": "red", "pos": ["green"], "neg": ["blue"]}])
    example = TrainDataset(rows, group_size=2, seed=0)[0, 0]
    batch = collator(2, query_instruction="how: ", passage_instruction="it is ")([example])
    tokenizer = make_tokenizer()
    texts = tokenizer.batch_decode(padded_ids(batch["texts"]), skip_special_tokens=True)
    assert texts[batch["query_index"][0]] == "how : red"
    assert [texts[place] for place in batch["passage_index"][0]] == ["it is green", "it is blue"]
    assert batch["passage_ids"].tolist() == [[text_id("green"), text_id("blue")]]


def test_known_ids_of_unequal_number_are_filled_up(tmp_path):
    rows = rows_of(tmp_path, [{"query": "a", "pos": ["p", "q"]}, {"query": "b", "pos": ["p"]}])
    dataset = TrainDataset(rows, group_size=1, seed=0)
    known = collator(1)([dataset[0, 0], dataset[0, 1]])["known_ids"].numpy()
    assert known.shape == (2, 3)
    assert (known == PADDING_ID).sum(axis=1).tolist() == [0, 1]
    assert np.isin([text_id("p"), text_id("b")], known[1]).all()


def test_a_group_size_beyond_all_negatives_is_cut_to_what_the_rows_can_fill(tmp_path):
    rows = rows_of(tmp_path, [*many(2, negatives=3), {"query": "q", "pos": ["p"]}])
    dataset = TrainDataset(rows, group_size=10**12, seed=0)
    assert dataset.group_size == 4
    assert [len(dataset[0, i].passages) for i in range(3)] == [4, 4, 1]
    assert TrainDataset(rows, group_size=2, seed=0).group_size == 2
    assert TrainDataset(rows_of(tmp_path, many(2, negatives=0)), group_size=9, seed=0).group_size == 1


def test_a_rows_instruction_goes_before_its_query_in_place_of_the_models(tmp_path):
    rows = rows_of(
        tmp_path,
        [
            {"query": "red", "pos": ["green"]},
            {"query": "red", "pos": ["blue"], "instruction": "open the "},
            {"query": "red", "pos": ["blue"], "instruction": ""},
            {"query": "red", "pos": ["gate"], "prompt": "open the "},
        ],
    )
    dataset = TrainDataset(rows, group_size=1, seed=0)
    batch = collator(1, query_instruction="how: ")([dataset[0, n] for n in range(4)])
    queries = padded_ids(batch["texts"])[batch["query_index"]]
    texts = make_tokenizer().batch_decode(queries, skip_special_tokens=True)
    assert texts == ["how : red", "open the red", "red", "open the red"]
    first, second, third, fourth = batch["query_index"].tolist()
    assert second == fourth  # with another instruction it is another text
    assert len({first, second, third}) == 3
    # What is known to answer a query is known by its text alone.
    known = {text_id(text) for text in ("red", "green", "blue", "gate")}
    assert [set(ids) for ids in batch["known_ids"].tolist()] == [known] * 4


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_batch_of_queries_with_instructions_is_that_of_queries_written_out(tmp_path, include_prompt):
    pooling = {"include_prompt": include_prompt}
    own = [("red", "open the "), ("pump", ""), ("gate", "open the "), ("desk", None)]
    instructed = [{"query": q, "pos": [f"the {q}"], "instruction": i} for q, i in own]
    written = [{"query": ("how: " if i is None else i) + q, "pos": [f"the {q}"]} for q, i in own]
    batches = []
    for records, flag in ((instructed, "how: "), (written, "")):
        dataset = TrainDataset(rows_of(tmp_path, records), group_size=1, seed=0)
        batches.append(collator(1, query_instruction=flag, **pooling)([dataset[0, n] for n in range(4)]))
    for name in ("query_index", "passage_index", "passage_ids"):
        assert torch.equal(batches[0][name], batches[1][name]), name
    texts, written_out = (batch["texts"] for batch in batches)
    for name in ("token_ids", "positions", "attention_mask"):
        assert torch.equal(texts[name], written_out[name]), name
    assert texts["sub_batches"] == written_out["sub_batches"]
    assert "prompt_lengths" not in written_out
    if not include_prompt:
        assert texts["prompt_lengths"][batches[0]["query_index"]].tolist() == [3, 0, 3, 3]


def test_a_row_without_weight_brings_no_negatives_and_no_loss(tmp_path):
    dataset = TrainDataset(rows_of(tmp_path, many(2)), group_size=3, seed=1)
    batch = collator(3)([dataset[0, 1, 0.0], dataset[None]])
    assert batch["weight"] == 0
    assert batch["passage_ids"].tolist() == [[PADDING_ID] * 3]
    assert "weight" not in collator(3)([dataset[0, 1]])


def test_confirmed_negatives_are_drawn_before_others_and_their_ids_stand_in_the_batch(tmp_path):
    rows = [
        {"query": "q0", "pos": ["p0"], "neg": [f"n{n}" for n in range(9)]},
        {"query": "q1", "pos": ["p1"], "neg": ["m0", "m1"]},
    ]
    judgements = Judgements([("q0", "n7", False), ("q0", "new", False), ("q1", "p0", True)])
    loaded = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", rows)), judgements=judgements)
    assert loaded["neg"][0] == ["n7", "new", *(f"n{n}" for n in range(9) if n != 7)]
    dataset = TrainDataset(loaded, group_size=4, seed=0)
    drawn = [dataset[epoch, 0] for epoch in range(50)]
    assert all(set(example.passages[1:3]) == {"n7", "new"} for example in drawn)
    assert len({example.passages[3] for example in drawn}) == 8
    one = TrainDataset(loaded, group_size=2, seed=0)
    assert {one[epoch, 0].passages[1] for epoch in range(50)} == {"n7", "new"}
    assert {dataset[epoch, 1].passages[0] for epoch in range(50)} == {"p0", "p1"}
    batch = collator(4)([dataset[0, 0], dataset[0, 1]])
    assert batch["confirmed_ids"].tolist() == [[text_id("n7"), text_id("new")], [PADDING_ID] * 2]
    assert "confirmed_ids" not in collator(4)([dataset[0, 1]])


def test_rows_without_judgements_draw_as_they_always_did(tmp_path):
    rows = rows_of(tmp_path, many(5))
    for index in range(5):
        rng = random.Random(f"7:3:{index}")
        positive, negatives = rng.choice(range(2)), rng.sample(range(6), 3)
        expected = [rows[index]["pos"][positive], *(rows[index]["neg"][place] for place in negatives)]
        assert TrainDataset(rows, group_size=4, seed=7)[3, index].passages == expected
