"""finetune.py beyond the plain loss: adapters, Matryoshka, a teacher, weights mixed with those of the base."""

import json

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.running import encoding_arguments
from helpers.tiny import make_tiny_bert
from safetensors.torch import load_file

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.tokens import pad, tokenize
from embedding_finetune.retrieval.encoder import load_encoder
from embedding_finetune.training.loss import LossOptions, RetrievalLoss, contrastive_loss

TEXTS = ["how do i reset the pump?", "Call the alarm desk.", "red green blue " * 30]


@pytest.fixture
def rows(tmp_path):
    """Ten rows with two negatives each."""
    texts = [passage_about(topic) for topic in TOPICS]
    return write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"query": f"how do i reset the {topic}?", "pos": [texts[n]], "neg": [texts[n - 1], texts[n - 2]]}
            for n, topic in enumerate(TOPICS)
        ],
    )


def train(model, rows, output, *flags, steps=4):
    argv = ["--model_name_or_path", model, "--train_data", rows, "--output_dir", output, "--max_steps", steps]
    argv += ["--per_device_train_batch_size", 5, "--train_group_size", 3, "--learning_rate", 1e-2, "--temperature", 0.1]
    finetune.main([str(part) for part in (*argv, "--save_steps", 2, *flags)])
    return output


def embeddings(folder, *flags):
    encoder = load_encoder(str(folder), encoding_arguments("--dtype", "float32", *flags), flag="--model")
    return encoder.encode_queries(TEXTS)


def test_adapters_start_from_the_seed_alone(tiny_bert, rows, tmp_path):
    def adapter(name, seed):
        train(tiny_bert, rows, tmp_path / name, "--lora_rank", 4, "--seed", seed, steps=1)
        weights = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        return torch.cat([tensor.flatten() for name, tensor in sorted(weights.items()) if "lora_A" in name])

    torch.rand(3)  # whatever was drawn before
    first = adapter("first", 1)
    torch.rand(5)
    assert torch.equal(first, adapter("again", 1))
    assert not torch.equal(first, adapter("other", 2))


def test_adapters_train_few_weights_and_are_saved_merged_so_that_every_tool_loads_them(tiny_bert, rows, tmp_path):
    from sentence_transformers import SentenceTransformer

    tuned = train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4)
    assert not np.allclose(embeddings(tuned), embeddings(tiny_bert), atol=1e-3)
    assert np.allclose(embeddings(tuned), SentenceTransformer(str(tuned), device="cpu").encode(TEXTS), atol=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_bert, tuned))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("encoder.layer.") and name.endswith("weight") for name in changed)

    adapter = load_file(tuned / "adapter" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in adapter.values()} == {4}


def test_a_resumed_run_with_adapters_ends_where_an_unbroken_one_does(tiny_bert, rows, tmp_path):
    whole = embeddings(train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4))
    checkpoint = tmp_path / "tuned" / "checkpoint-2"
    train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4, "--resume_from_checkpoint", checkpoint)
    assert np.array_equal(embeddings(tmp_path / "tuned"), whole)


def test_the_adapter_alone_is_what_peft_loads_and_gives_the_merged_model(tiny_bert, rows, tmp_path):
    from peft import PeftModel

    merged = train(tiny_bert, rows, tmp_path / "merged", "--lora_rank", 4)
    alone = train(tiny_bert, rows, tmp_path / "alone", "--lora_rank", 4, "--save_adapter_only", "True")
    assert not (alone / "model.safetensors").exists()
    backbone, tokenizer, config = load_backbone(str(tiny_bert), flag="--model")
    model = BiEncoder(PeftModel.from_pretrained(backbone, str(alone)), config).eval()
    ids, _ = tokenize(tokenizer, TEXTS, instruction="", max_length=128)
    with torch.no_grad():
        assert np.allclose(model(**pad(tokenizer, ids, limit=128)), embeddings(merged), atol=1e-5)


def test_without_peft_the_flag_says_what_to_install(tiny_bert, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4)
    assert stop.value.code == 2
    assert "--lora_rank needs the package peft: pip install peft" in capsys.readouterr().err


@pytest.mark.parametrize("normalized", [True, False])
def test_the_matryoshka_loss_is_the_weighted_sum_over_renormalised_prefixes(tmp_path, normalized):
    backbone, _, config = load_backbone(str(make_tiny_bert(tmp_path / "bert", dropout=0.0)), flag="--model")
    config = config.with_flags(normalized=normalized)
    model = BiEncoder(backbone, config)
    loss_of = RetrievalLoss(model, LossOptions(temperature=0.5, matryoshka={32: 1.0, 8: 0.5, 2: 0.25}))
    ids = torch.randint(5, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    index = {"query_index": torch.tensor([0, 1]), "passage_index": torch.tensor([[2, 3], [4, 5]])}
    known = {"passage_ids": torch.arange(4).reshape(2, 2), "known_ids": torch.tensor([[0], [2]])}
    loss = loss_of(**batch, **index, **known)["loss"].item()
    expected = 0.0
    whole = model(**batch)
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
    assert evaluate.main([*map(str, argv), "--truncate_dim", "4"])
    mined = tmp_path / "mined.jsonl"
    argv = ["--model_name_or_path", tiny_bert, "--input_file", rows, "--output_file", mined, "--negative_number", 2]
    mine_hard_neg.main([*map(str, argv), "--range_for_sampling", "0-4", "--truncate_dim", "4"])
    assert all(len(row["neg"]) == 2 for row in read_jsonl(mined))
    with pytest.raises(SystemExit) as stop:
        mine_hard_neg.main([*map(str, argv), "--truncate_dim", "33"])
    assert stop.value.code == 2
    assert "--truncate_dim 33: the model's embeddings have 32 dimensions" in capsys.readouterr().err


def test_merging_with_the_base_saves_the_weighted_mean_of_all_weights(tiny_bert, rows, tmp_path):
    tuned = train(tiny_bert, rows, tmp_path / "tuned", "--merge_with_base", 0.25)
    base, own, mixed = (load_file(folder / "model.safetensors") for folder in (tiny_bert, tuned, tuned / "merged"))
    for name, tensor in base.items():
        assert torch.allclose(mixed[name], 0.25 * own[name] + 0.75 * tensor, atol=1e-7)
    assert embeddings(tuned / "merged").shape == (3, 32)


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
