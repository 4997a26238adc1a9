"""One loading of a model for encoding and for training."""

import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.model.loading import load_embedding_model


def test_lengths_and_config_are_the_checkpoints_unless_flags_say_otherwise(tiny_bert):
    own = load_embedding_model(str(tiny_bert), flag="--model", given={})
    assert (own.query_max_len, own.passage_max_len, own.own_max_len, own.length_limit) == (128, 128, 128, 128)
    given = {"pooling": "mean", "normalized": None, "truncate_dim": 8}
    changed = load_embedding_model(str(tiny_bert), flag="--model", given=given, query_max_len=7)
    assert (changed.query_max_len, changed.passage_max_len, changed.own_max_len) == (7, 128, 128)
    assert (changed.config.pooling, changed.config.normalized, changed.config.truncate_dim) == ("mean", True, 8)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"passage_max_len": 129}, "--passage_max_len 129: the model takes at most 128"),
        ({"given": {"truncate_dim": 33}}, "--truncate_dim 33: the model's embeddings have 32"),
        ({"given": {"query_instruction": "a b c"}, "query_max_len": 5}, "--query_max_len 5 leaves no token"),
    ],
)
def test_flags_that_ask_for_more_than_the_model_has_are_refused_by_name(tiny_bert, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        load_embedding_model(str(tiny_bert), flag="--model", **{"given": {}, **flags})
