"""Cross-encoders: scores equal to a plain forward pass, and models that are none are refused."""

import json

import numpy as np
import pytest
import torch
from helpers import kinds
from helpers.data import TOPICS, passage_about
from helpers.running import encoding_arguments
from helpers.tiny import make_tiny_bert, make_tiny_reranker, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval.reranker import check_reranker, load_reranker


def pairs():
    passages = [passage_about(topic) for topic in TOPICS]
    queries = [f"reset the {topic}" + " please" * (n % 4) for n, topic in enumerate(TOPICS)]
    return [query for query in queries for _ in passages], passages * len(queries)


def test_scores_are_those_of_a_plain_forward_pass_pair_by_pair(tiny_reranker):
    queries, passages = pairs()
    scores = load_reranker(str(tiny_reranker), encoding_arguments("--dtype", "float32")).scores(queries, passages)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reranker).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reranker)
    with torch.no_grad():
        expected = [
            model(**tokenizer(query, passage, return_tensors="pt")).logits.item()
            for query, passage in zip(queries, passages)
        ]
    assert np.allclose(scores, expected, atol=1e-4)
    assert np.std(scores) > 0.01


def test_a_score_does_not_depend_on_batch_size_or_neighbours(tiny_reranker):
    queries, passages = pairs()
    scores = load_reranker(str(tiny_reranker), encoding_arguments()).scores(queries, passages)
    one_by_one = load_reranker(str(tiny_reranker), encoding_arguments("--tokens_per_batch", "1"))
    assert np.array_equal(one_by_one.scores(queries[3:20], passages[3:20]), scores[3:20])
    assert one_by_one.scores([], []).shape == (0,)


def test_of_a_pair_that_is_too_long_the_longer_text_is_cut(tiny_reranker):
    reranker = load_reranker(str(tiny_reranker), encoding_arguments("--dtype", "float32"))
    scores = reranker.scores(
        ["pump " * 300, "pump", "pump " * 300, "pump " * 10], ["valve", "valve " * 300, "valve " * 300, "valve " * 115]
    )
    # Of 128 tokens three are special ones, [CLS] query [SEP] passage [SEP]; of equally long texts both are cut.
    cut_by_hand = [(124, 1), (1, 124), (62, 63), (10, 115)]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reranker).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reranker)
    with torch.no_grad():
        for score, (pumps, valves) in zip(scores, cut_by_hand, strict=True):
            inputs = tokenizer("pump " * pumps, "valve " * valves, return_tensors="pt")
            assert inputs["input_ids"].shape == (1, 128)
            assert score == pytest.approx(model(**inputs).logits.item(), abs=1e-4)


def test_a_model_without_a_single_logit_is_refused_by_its_config_and_one_without_a_head_by_its_weights(tmp_path):
    two_logits = make_tiny_reranker(tmp_path / "two", logits=2)
    with pytest.raises(UserError, match=r"--reranker_name_or_path .*two: its config says 2 logits"):
        check_reranker(str(two_logits), encoding_arguments())
    with pytest.raises(UserError, match="--reranker_name_or_path no/such"):
        check_reranker("no/such", encoding_arguments())
    headless = make_tiny_bert(tmp_path / "bert")
    config = (headless / "config.json").read_text()
    (headless / "config.json").write_text(config.replace("{", '{"id2label": {"0": "score"},', 1))
    check_reranker(str(headless), encoding_arguments())
    with pytest.raises(UserError, match=r"2 tensors are missing, classifier\.bias among them; give a cross-encoder"):
        load_reranker(str(headless), encoding_arguments())


def test_a_score_that_is_not_finite_names_its_texts(tmp_path):
    folder = make_tiny_reranker(tmp_path / "damaged")
    reranker = load_reranker(str(folder), encoding_arguments())
    with torch.no_grad():
        reranker.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="'how are you'"):
        reranker.scores(["how are you"], ["fine"])


@pytest.mark.parametrize("kind", ["deberta-v2", "squeezebert", "xlm-roberta", "convbert"])
def test_a_classifier_of_another_kind_keeps_its_pooler_or_is_refused_for_seeing_its_padding(kind, tmp_path):
    config = kinds.make_config(kind)
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    if kind == "convbert":
        with pytest.raises(UserError, match=r"^--reranker_name_or_path .* sees the padding on the right .* its score"):
            load_reranker(str(tmp_path), encoding_arguments())
        return
    scores = load_reranker(str(tmp_path), encoding_arguments("--dtype", "float32")).scores(["pump"] * 2, ["a", "valve"])
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    with torch.no_grad():
        for score, passage in zip(scores, ["a", "valve"]):
            inputs = tokenizer("pump", passage, return_tensors="pt")
            assert model(**inputs).logits.item() == pytest.approx(float(score), abs=1e-5)


def test_a_reranker_without_tokenizer_files_is_refused(tmp_path):
    folder = make_tiny_reranker(tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"^--reranker_name_or_path .*the tokenizer knows no words"):
        load_reranker(str(folder), encoding_arguments())


def test_a_reranker_may_be_a_pickle_and_code_of_its_own_is_refused_with_the_remedy(tmp_path):
    folder = make_tiny_reranker(tmp_path / "pickled")
    expected = load_reranker(str(folder), encoding_arguments()).scores(["pump", "desk"], ["valve", "panel"])
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    pickled = load_reranker(str(folder), encoding_arguments())
    assert np.array_equal(pickled.scores(["pump", "desk"], ["valve", "panel"]), expected)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise AssertionError('it was run')")
    for load in (check_reranker, load_reranker):
        with pytest.raises(UserError, match="read it, and give --trust_remote_code True"):
            load(str(folder), encoding_arguments())
