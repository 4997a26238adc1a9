import numpy as np
import pytest
from helpers.tiny import make_tokenizer

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.texts import text_id
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.sub_batches import PaddedLayout
from embedding_finetune.model.tokens import text_kinds
from embedding_finetune.training import query_batches
from embedding_finetune.training.batches import TrainExample
from embedding_finetune.training.query_batches import Numbers, QueryCollator

POOL = ["the pump", "the gate", "a light", "the alarm", "a desk"]


def ids(*texts):
    return [text_id(text) for text in texts]


@pytest.fixture(params=[8192, 2])
def numbers(request, monkeypatch):
    monkeypatch.setattr(query_batches, "_TEXTS_PER_READ", request.param)
    return Numbers(Corpus(POOL))


def test_a_text_has_the_number_of_its_place_whatever_its_spaces(numbers):
    assert numbers.of(np.array(ids("a desk", " the pump ", "the gate", "nowhere"))).tolist() == [4, 0, 1, -1]


def example(row, query, positive, *negatives, known=(), instruction=None):
    return TrainExample(
        row=row,
        query=query,
        instruction=instruction,
        passages=[positive, *negatives],
        passage_ids=ids(positive, *negatives),
        known_ids=np.array(ids(*known, query)),
        confirmed_ids=[],
        teacher_scores=[],
        weight=1.0,
    )


def test_a_batch_holds_its_distinct_queries_and_the_numbers_of_their_passages(numbers):
    tokenizer = make_tokenizer()
    query, passage = text_kinds(EmbeddingConfig(query_instruction="how "), query_max_len=4, passage_max_len=9)
    collate = QueryCollator(tokenizer, query, passage, numbers, layout=PaddedLayout(tokenizer, 64, 1024))
    batch = collate(
        [
            example(7, "pump", "the pump", "a light", "nowhere", known=["the pump", "the gate"]),
            example(3, "a desk", "a desk", known=["a desk"]),
            example(9, "pump", "the gate", known=["the gate", "the pump"]),
        ]
    )
    assert batch["rows"].tolist() == [7, 3, 9]
    assert batch["targets"].tolist() == [0, 4, 1]
    assert batch["texts"]["positions"].shape[0] == 2
    assert batch["query_index"].tolist()[0] == batch["query_index"].tolist()[2]
    known = sorted(zip(batch["known"].rows.tolist(), batch["known"].columns.tolist()))
    assert known == [(0, 0), (0, 1), (1, 4), (1, 4), (2, 0), (2, 1)]  # the query "a desk" is a passage too
    assert (batch["negatives"].columns.tolist(), batch["negatives"].rows.tolist()) == (
        [2],
        [0],
    )
    assert batch["cut_texts"].tolist() == [[1, 3], [0, 0]]  # [CLS] how a desk [SEP] are five tokens


def test_a_querys_own_instruction_stands_before_it(numbers):
    tokenizer = make_tokenizer()
    query, passage = text_kinds(EmbeddingConfig(), query_max_len=9, passage_max_len=9)
    collate = QueryCollator(tokenizer, query, passage, numbers, layout=PaddedLayout(tokenizer, 64, 1024))
    batch = collate([example(0, "pump", "the pump", instruction="reset the ")])
    texts = batch["texts"]
    assert texts["token_ids"][texts["positions"][0]].tolist()[:5] == tokenizer("reset the pump")["input_ids"]
