"""finetune.py beyond the plain loss: Matryoshka, a teacher."""

import json

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.running import embed_passages, encoder_for, encoding_arguments, mean_reciprocal_rank
from helpers.tiny import make_tiny_bert
from helpers.training import embeddings, train, write_rows

import evaluate
import mine_hard_neg
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import padded_texts
from embedding_finetune.retrieval.encoder import load_encoder
from embedding_finetune.training.loss import LossOptions, RetrievalLoss, contrastive_loss


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_matryoshka_loss_is_the_weighted_sum_over_renormalised_prefixes(tmp_path, normalized):
    backbone, _, config = load_backbone(str(make_tiny_bert(tmp_path / "bert", dropout=0.0)), flag="--model")
    config = config.with_flags(normalized=normalized)
    model = BiEncoder(backbone, config)
    loss_of = RetrievalLoss(model, LossOptions(temperature=0.5, matryoshka={32: 1.0, 8: 0.5, 2: 0.25}))
    ids = torch.randint(5, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    texts = padded_texts(ids, torch.ones_like(ids))
    index = {"query_index": torch.tensor([0, 1]), "passage_index": torch.tensor([[2, 3], [4, 5]])}
    known = {"passage_ids": torch.arange(4).reshape(2, 2), "known_ids": torch.tensor([[0], [2]])}
    loss = loss_of(texts, **index, **known)["loss"].item()
    expected = 0.0
    whole = model(ids, torch.ones_like(ids))
    for dimensions, weight in ((32, 1.0), (8, 0.5), (2, 0.25)):
        prefix = whole[:, :dimensions]
        prefix = prefix / prefix.norm(dim=1, keepdim=True) if normalized else prefix
        own = contrastive_loss(prefix[:2], prefix[2:].reshape(2, 2, -1), temperature=0.5)
        expected += weight * own.item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_truncated_embeddings_are_renormalised_prefixes_kept_apart_in_the_store(tiny_bert, tmp_path):
    whole = embeddings(tiny_bert, "--embeddings_dir", str(tmp_path))
    for dimensions in (8, 32):
        cut = embeddings(tiny_bert, "--truncate_dim", str(dimensions), "--embeddings_dir", str(tmp_path))
        prefix = whole[:, :dimensions]
        assert np.allclose(cut, prefix / np.linalg.norm(prefix, axis=1)[:, None], atol=1e-6)


def test_evaluate_and_mine_take_truncate_dim_and_refuse_one_that_is_too_large(tiny_bert, rows, tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": passage_about(topic)} for topic in TOPICS])
    argv = ["--model_name", tiny_bert, "--index_file_jsonl_path", corpus, "--query_file_jsonl_path", rows]
    metrics = evaluate.main([*map(str, argv), "--truncate_dim", "4", "--dtype", "float32"])
    encoder = encoder_for(tiny_bert, "--dtype", "float32")
    cut = [
        encoder.encode_queries([row["query"] for row in read_jsonl(rows)])[:, :4],
        embed_passages(encoder, [passage_about(topic) for topic in TOPICS])[:, :4],
    ]
    cut = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in cut]
    assert metrics["MRR@10"] == pytest.approx(mean_reciprocal_rank(*cut, range(len(TOPICS))))
    mined = tmp_path / "mined.jsonl"
    argv = ["--model_name_or_path", tiny_bert, "--input_file", rows, "--output_file", mined, "--negative_number", 2]
    mine_hard_neg.main([*map(str, argv), "--range_for_sampling", "0-4", "--truncate_dim", "4"])
    assert all(len(row["neg"]) == 2 for row in read_jsonl(mined))
    with pytest.raises(SystemExit) as stop:
        mine_hard_neg.main([*map(str, argv), "--truncate_dim", "33"])
    assert stop.value.code == 2
    assert "--truncate_dim 33: the model's embeddings have 32 dimensions" in capsys.readouterr().err


def scored(rows, tmp_path, name="scored.jsonl"):
    """The same rows with a teacher that likes the second negative as much as the positive."""
    records = [{**row, "pos_scores": [4.0], "neg_scores": [-4.0, 4.0]} for row in read_jsonl(rows)]
    return write_jsonl(tmp_path / name, records)


def test_a_teacher_makes_its_choice_the_models(tiny_bert, rows, tmp_path):
    flags = ("--save_strategy", "no", "--sentence_pooling_method", "mean")
    data = scored(rows, tmp_path)
    taught = train(tiny_bert, data, tmp_path / "taught", "--distillation_weight", 20, *flags, steps=30)
    plain = train(tiny_bert, rows, tmp_path / "plain", *flags, steps=30)

    def liked(folder):
        """How much closer queries are to their second negative than to their first."""
        encoder = load_encoder(str(folder), encoding_arguments("--dtype", "float32"), flag="--model")
        records = read_jsonl(rows)
        q = encoder.encode_queries([row["query"] for row in records])
        first, second = (next(encoder.encode_passages([row["neg"][n] for row in records]))[1] for n in (0, 1))
        return float(((q * second).sum(axis=1) - (q * first).sum(axis=1)).mean())

    assert liked(taught) > liked(plain) + 0.1


def test_teacher_scores_follow_the_sampled_negatives(rows, tmp_path):
    from embedding_finetune.training.batches import TrainDataset
    from embedding_finetune.training.rows import load_rows

    records = [
        {**row, "neg": [f"{n} of {row['query']}" for n in range(6)], "neg_scores": list(range(6)), "pos_scores": [9]}
        for row in read_jsonl(rows)
    ]
    data = write_jsonl(tmp_path / "many.jsonl", records)
    dataset = TrainDataset(load_rows(str(data), scores_required=True), group_size=4, seed=0)
    seen = set()
    for epoch in range(3):
        for index in range(len(records)):
            example = dataset[epoch, index]
            assert example.teacher_scores == [9, *(int(text[0]) for text in example.passages[1:])]
            seen.add(tuple(example.teacher_scores))
    assert len(seen) > 10


def test_a_row_without_scores_is_named_by_its_line_when_there_is_a_teacher(tiny_bert, rows, tmp_path, capsys):
    records = read_jsonl(scored(rows, tmp_path))
    del records[6]["neg_scores"]
    data = write_jsonl(tmp_path / "gap.jsonl", records)
    with pytest.raises(SystemExit) as stop:
        train(tiny_bert, data, tmp_path / "tuned", "--distillation_weight", 1)
    assert stop.value.code == 2
    assert 'gap.jsonl:7: "neg_scores" is missing' in capsys.readouterr().err
    train(tiny_bert, data, tmp_path / "tuned")  # without a teacher it is no mistake


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--matryoshka_dims", 16, 64), "--matryoshka_dims 64: the model's embeddings have 32 dimensions"),
        (("--matryoshka_dims", 16, 16), "--matryoshka_dims 16 16"),
        (("--matryoshka_dims", 16, "--matryoshka_weights", 1, 2), "--matryoshka_weights"),
        (("--matryoshka_dims", 16, "--matryoshka_weights", 0), "--matryoshka_weights"),
        (("--distillation_weight", -1), "--distillation_weight"),
        (("--teacher_temperature", 0), "--teacher_temperature"),
        (("--merge_with_base", 1.5), "--merge_with_base"),
        (("--lora_rank", 0), "--lora_rank"),
        (("--lora_rank", 33), "--lora_rank 33: the model's hidden states have 32"),
        (("--save_adapter_only", "True"), "--save_adapter_only"),
    ],
)
def test_values_without_a_meaning_are_refused_by_flag(tiny_bert, rows, tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit) as stop:
        train(tiny_bert, rows, tmp_path / "tuned", *flags)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "tuned" / "model.safetensors").exists()


def test_a_summary_is_written_whatever_is_saved(tiny_bert, rows, tmp_path):
    tuned = train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 2, "--save_adapter_only", "True")
    assert json.loads((tuned / "training_summary.json").read_text())["steps"] == 4
