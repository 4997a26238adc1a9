"""What finetune.py's flags make of data and model before training."""

import pytest
from helpers.data import write_jsonl
from transformers import BertConfig, BertModel

from embedding_finetune.command_line import UserError
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.training.arguments import DataArguments, RetrieverTrainingArguments
from embedding_finetune.training.batches import TrainDataset
from embedding_finetune.training.rows import load_rows
from embedding_finetune.training.setup import has_one_file_per_batch, make_loss


def loss_with(tmp_path, **flags):
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    args = RetrieverTrainingArguments(output_dir=str(tmp_path), **flags)
    return make_loss(BiEncoder(BertModel(config), EmbeddingConfig()), args)


def test_the_loss_has_what_the_flags_say(tmp_path):
    loss = loss_with(tmp_path, temperature=0.5, use_inbatch_neg=False, matryoshka_dims=[4, 2])
    assert (loss.options.temperature, loss.options.use_inbatch_neg) == (0.5, False)
    assert loss.options.matryoshka == {8: 1.0, 4: 1.0, 2: 1.0}
    loss = loss_with(tmp_path, matryoshka_dims=[8, 4], matryoshka_weights=[0.5, 0.25])
    assert loss.options.matryoshka == {8: 0.5, 4: 0.25}
    assert loss_with(tmp_path).options.matryoshka == {8: 1.0}


def test_more_matryoshka_dimensions_than_the_model_has_are_refused(tmp_path):
    with pytest.raises(UserError, match="--matryoshka_dims 9: the model's embeddings have 8 dimensions"):
        loss_with(tmp_path, matryoshka_dims=[9])


def one_file(tmp_path, sizes, **flags):
    paths = [
        str(write_jsonl(tmp_path / f"{n}.jsonl", [{"query": "q", "pos": ["p"]}] * size)) for n, size in enumerate(sizes)
    ]
    dataset = TrainDataset(load_rows(paths), group_size=1, seed=0)
    args = RetrieverTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **flags)
    return has_one_file_per_batch(DataArguments(train_data=paths, one_file_per_batch=True), dataset, args)


def test_with_one_file_alone_one_file_per_batch_is_noted_to_change_nothing(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert one_file(tmp_path, [9, 2])
        assert "changes nothing" not in caplog.text
        assert not one_file(tmp_path, [9])
    assert "--one_file_per_batch changes nothing: all rows are in one file" in caplog.text


def test_a_file_that_drop_last_would_never_train_on_is_refused(tmp_path):
    assert one_file(tmp_path, [9, 4], dataloader_drop_last=True)
    with pytest.raises(UserError, match=r"would never train on \S+1\.jsonl: its 3 rows do not fill a batch of 4; "):
        one_file(tmp_path, [9, 3], dataloader_drop_last=True)
