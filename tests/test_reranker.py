"""Cross-encoders: scores equal to sentence-transformers', and models that are none are refused."""

import json

import numpy as np
import pytest
import torch
from helpers import kinds, published
from helpers.data import TOPICS, passage_about
from helpers.running import argv_of, encoding_arguments
from helpers.tiny import make_tiny_bert, make_tiny_reranker, make_tokenizer
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval.reranker import check_reranker, load_reranker


def questions_and_passages():
    passages = [passage_about(topic) for topic in TOPICS]
    queries = [f"reset the {topic}" + " please" * (n % 4) for n, topic in enumerate(TOPICS)]
    return [query for query in queries for _ in passages], passages * len(queries)


def test_scores_are_those_of_a_plain_forward_pass_pair_by_pair(tiny_reranker):
    queries, passages = questions_and_passages()
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
    queries, passages = questions_and_passages()
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


PAIRS = [
    ("reset the pump", "press the red light"),
    ("how do i open the gate", "a"),
    ("pump", "my desk is on the yard with no key and no form, who do i call after every month?"),
    ("what is it", "north hall"),
]


def make_classifier(kind, folder, tokenizer, **changes):
    """A tiny classifier of a kind with one logit, with a tokenizer; changes: of its config."""
    config = kinds.make_config(kind)
    for name, value in {"num_labels": 1, "vocab_size": max(160, len(tokenizer)), **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scores_of_pairs(folder, *flags):
    return load_reranker(folder, encoding_arguments("--dtype", "float32", *flags)).scores(*map(list, zip(*PAIRS)))


def by_sentence_transformers(folder, *, batch_size=32):
    encoder = CrossEncoder(folder, device="cpu")
    return encoder.predict(PAIRS, activation_fn=torch.nn.Identity(), batch_size=batch_size, show_progress_bar=False)


def without_padding(folder):
    """By a plain forward pass of each pair alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(*pair, truncation=True, return_tensors="pt")).logits.item() for pair in PAIRS]


ENCODERS = """albert bart bert big_bird camembert deberta deberta-v2 distilbert electra ernie mbart megatron-bert
modernbert mpnet roberta squeezebert xlm-roberta""".split()


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoders_scores_are_those_of_sentence_transformers(kind, tmp_path):
    folder = make_classifier(kind, tmp_path, make_tokenizer(model_max_length=64))
    scores = scores_of_pairs(folder)
    assert np.allclose(scores, by_sentence_transformers(folder), rtol=0, atol=1e-5)
    assert np.std(scores) > 0.01


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_a_decoders_scores_are_those_of_sentence_transformers_with_a_padding_token_in_the_config_or_none(
    kind, side, tmp_path
):
    tokenizer = make_tokenizer(padding_side=side, model_max_length=64)
    with_token = make_classifier(kind, tmp_path / "with", tokenizer)
    assert np.allclose(scores_of_pairs(with_token), by_sentence_transformers(with_token), rtol=0, atol=1e-5)
    without = make_classifier(kind, tmp_path / "without", tokenizer, pad_token_id=None)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        by_sentence_transformers(without)
    alone = by_sentence_transformers(without, batch_size=1)
    assert np.allclose(scores_of_pairs(without), alone, rtol=0, atol=1e-5)
    tokenizer.pad_token = None
    without_any = make_classifier(kind, tmp_path / "any", tokenizer, pad_token_id=None)
    assert AutoTokenizer.from_pretrained(without_any).pad_token_id is None
    assert np.allclose(scores_of_pairs(without_any), without_padding(without_any), rtol=0, atol=1e-5)


def test_a_decoder_whose_pairs_end_with_the_tokenizers_padding_token_is_padded_with_another(tmp_path):
    tokenizer = published.make_tokenizer(published.FURTHER["qwen3-embedding-0.6b"])
    assert tokenizer("a", "b")["input_ids"][-1] == tokenizer.pad_token_id
    folder = make_classifier("qwen3", tmp_path, tokenizer, pad_token_id=None, max_position_embeddings=512)
    alone = by_sentence_transformers(folder, batch_size=1)
    assert np.allclose(scores_of_pairs(folder), alone, rtol=0, atol=1e-5)
    # What transformers gives with that token as padding: it looks at the token before it.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.pad_token_id}))
    assert not np.allclose(by_sentence_transformers(folder), alone, rtol=0, atol=0.1)
    assert np.allclose(scores_of_pairs(folder), by_sentence_transformers(folder), rtol=0, atol=1e-5)


def test_a_classifier_that_counts_padding_on_the_left_or_sees_any_is_refused(tmp_path):
    on_the_left = make_classifier("bert", tmp_path / "left", make_tokenizer(padding_side="left"))
    with pytest.raises(UserError, match=r'sees the padding on the left .* its score .*write "padding_side": "right"'):
        load_reranker(on_the_left, encoding_arguments())
    convbert = make_classifier("convbert", tmp_path / "convbert", make_tokenizer())
    with pytest.raises(UserError, match=r"^--reranker_name_or_path .* sees the padding on the right .* its score"):
        load_reranker(convbert, encoding_arguments())


def test_a_reranker_that_does_not_work_is_refused_before_anything_is_encoded(tiny_bert, pairs, tmp_path, monkeypatch):
    convbert = make_classifier("convbert", tmp_path / "convbert", make_tokenizer())
    monkeypatch.setattr("embedding_finetune.mining.ranking.encode_queries", None)
    flags = argv_of(model_name_or_path=tiny_bert, input_file=pairs, output_file=tmp_path / "mined.jsonl")
    with pytest.raises(SystemExit, match="2"):
        mine_hard_neg.main([*flags, "--reranker_name_or_path", convbert])


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
