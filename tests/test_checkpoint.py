"""Checkpoints in both directions, with transformers and sentence-transformers as independent oracles."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.data import read_jsonl
from helpers.running import encoding_arguments
from helpers.tiny import make_tiny_bert
from helpers.tokenizer_kinds import tokenize
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import finetune
from embedding_finetune.command_line import UserError
from embedding_finetune.model.checkpoint import EmbeddingConfig, read_config, save_checkpoint
from embedding_finetune.model.folder import model_replaced
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.modules import load_projection
from embedding_finetune.model.pooling import POOLING_METHODS
from embedding_finetune.retrieval.encoder import load_encoder

TEXTS = ["how do i reset the pump?", "Call the alarm desk.", "a", "red green blue " * 30]


def our_embeddings(folder, texts, kind="query"):
    encoder = load_encoder(str(folder), encoding_arguments("--dtype", "float32"), flag="--model")
    return encoder.encode_queries(texts) if kind == "query" else next(encoder.encode_passages(texts))[1]


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def assert_equal_embeddings(a, b):
    assert cosines(a, b).min() >= 0.9999
    assert np.allclose(a, b, atol=1e-4)


POOLINGS = [*POOLING_METHODS, "cls+mean", "max+weightedmean+lasttoken", "mean+cls"]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalized", [True, False])
def test_what_we_save_sentence_transformers_loads_with_the_same_embeddings(tiny_bert, tmp_path, pooling, normalized):
    from sentence_transformers import SentenceTransformer

    config = EmbeddingConfig(
        pooling=pooling,
        normalized=normalized,
        query_instruction="how: ",
        passage_instruction="it is ",
        max_seq_length=20,
    )
    backbone, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    save_model(tmp_path / "saved", backbone, tokenizer, config)

    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert peer.max_seq_length == 20
    assert_equal_embeddings(our_embeddings(tmp_path / "saved", TEXTS), peer.encode_query(TEXTS))
    assert_equal_embeddings(our_embeddings(tmp_path / "saved", TEXTS, "passage"), peer.encode_document(TEXTS))
    assert not [path.name for path in (tmp_path / "saved").iterdir() if path.name.startswith(".")]


def test_what_we_save_transformers_loads_with_the_same_weights(tiny_bert, tmp_path):
    backbone, tokenizer, config = load_backbone(str(tiny_bert), flag="--model")
    save_model(tmp_path, backbone, tokenizer, config)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        inputs = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
        theirs = F.normalize(model(**inputs).last_hidden_state[:, 0], dim=-1).numpy()
    assert_equal_embeddings(our_embeddings(tmp_path, TEXTS[:3]), theirs)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalized", [True, False])
def test_what_sentence_transformers_saves_we_load_with_the_same_embeddings(tiny_bert, tmp_path, pooling, normalized):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(tiny_bert), max_seq_length=16)
    modules = [transformer, Pooling(32, pooling_mode=pooling.split("+")), *([Normalize()] if normalized else [])]
    peer = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "how: ", "document": "it is "})
    peer.save(str(tmp_path))

    assert read_config(str(tmp_path)).pooling == pooling
    assert_equal_embeddings(our_embeddings(tmp_path, TEXTS[:3]), peer.encode_query(TEXTS[:3]))
    assert_equal_embeddings(our_embeddings(tmp_path, TEXTS[:3], "passage"), peer.encode_document(TEXTS[:3]))


def make_dense_model(tiny_bert, folder, *, prompts, include_prompt=True, pooling="mean"):
    """A model with two Dense modules, and Dropout and LayerNorm between them, saved by sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Normalize, Pooling

    torch.manual_seed(3)
    norm = LayerNorm(48)
    torch.nn.init.uniform_(norm.norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(norm.norm.bias)
    modules = [
        Transformer(str(tiny_bert), max_seq_length=24),
        Pooling(32, pooling_mode=pooling.split("+"), include_prompt=include_prompt),
        Dense(32 * len(pooling.split("+")), 48, activation_function=torch.nn.Identity(), bias=False),
        Dropout(0.5),
        norm,
        Dense(48, 16, activation_function=torch.nn.Tanh()),
        Normalize(),
    ]
    peer = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    peer.save(str(folder))
    return peer


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_all_modules_and_pooling_without_the_instruction_are_those_of_sentence_transformers(
    tiny_bert, tmp_path, pooling, include_prompt
):
    prompts = {"query": "how do i reset the pump: ", "document": "", "similar": "red "}
    peer = make_dense_model(tiny_bert, tmp_path, prompts=prompts, include_prompt=include_prompt, pooling=pooling)
    ours = our_embeddings(tmp_path, TEXTS)
    assert ours.shape == (4, 16)
    assert_equal_embeddings(ours, peer.encode_query(TEXTS))
    assert_equal_embeddings(our_embeddings(tmp_path, TEXTS, "passage"), peer.encode_document(TEXTS))


def test_modules_after_pooling_are_trained_saved_and_everything_else_is_kept(tiny_bert, pairs, tmp_path):
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "how: ", "document": "", "similar": "red "}
    make_dense_model(tiny_bert, tmp_path / "base", prompts=prompts, include_prompt=False)
    edit(tmp_path / "base" / "config_sentence_transformers.json", default_prompt_name="similar")
    flags = "--max_steps 4 --per_device_train_batch_size 8 --train_group_size 1 --learning_rate 1e-2 --save_steps 2"
    flags += " --query_max_len 24 --passage_max_len 24"
    argv = ["--model_name_or_path", tmp_path / "base", "--output_dir", tmp_path / "tuned", "--train_data", pairs]
    finetune.main([*map(str, argv), *flags.split()])
    before, after = (
        load_projection(str(tmp_path / name), read_config(str(tmp_path / name))) for name in ("base", "tuned")
    )
    for name, tensor in before.state_dict().items():
        assert not torch.equal(tensor, after.state_dict()[name])
    peer = SentenceTransformer(str(tmp_path / "tuned"), device="cpu")
    assert (peer.prompts, peer.default_prompt_name) == (prompts, "similar")
    assert_equal_embeddings(our_embeddings(tmp_path / "tuned", TEXTS), peer.encode_query(TEXTS))
    texts = [row["pos"][0] for row in read_jsonl(pairs)][:4]
    assert_equal_embeddings(our_embeddings(tmp_path / "tuned", texts, "passage"), peer.encode_document(texts))

    whole = our_embeddings(tmp_path / "tuned", TEXTS)
    resumed = [*map(str, argv), *flags.split(), "--resume_from_checkpoint", str(tmp_path / "tuned" / "checkpoint-2")]
    finetune.main(resumed)
    assert np.array_equal(whole, our_embeddings(tmp_path / "tuned", TEXTS))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"activation_function": "torch.nn.modules.activation.GELU"}, "GELU"),
        ({"use_residual": True}, "residual"),
        ({"out_features": 17}, "not the weights of a Dense module"),
    ],
)
def test_a_dense_module_that_would_not_be_applied_is_refused(tiny_bert, tmp_path, changes, complaint):
    make_dense_model(tiny_bert, tmp_path, prompts={})
    edit(tmp_path / "5_Dense" / "config.json", **changes)
    with pytest.raises(UserError, match=complaint):
        load_projection(str(tmp_path), read_config(str(tmp_path)))


@pytest.mark.demo_model
def test_the_real_model_embeds_as_in_sentence_transformers(demo_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    backbone, tokenizer, config = load_backbone(str(demo_model), flag="--model")
    assert (config.pooling, config.normalized, config.max_seq_length) == ("mean", True, 256)
    save_model(tmp_path, backbone, tokenizer, config)
    theirs = SentenceTransformer(str(demo_model), device="cpu").encode(TEXTS)
    assert_equal_embeddings(our_embeddings(demo_model, TEXTS), theirs)
    assert_equal_embeddings(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), theirs)


def test_a_plain_transformers_folder_is_cls_pooled_and_normalised(tiny_bert, caplog):
    with caplog.at_level("INFO"):
        assert read_config(str(tiny_bert)) == EmbeddingConfig(pooling="cls", normalized=True)
    assert "no modules.json" in caplog.text


def test_a_flag_that_contradicts_the_checkpoint_wins_and_both_are_logged(caplog):
    with caplog.at_level("INFO"):
        config = EmbeddingConfig(pooling="cls").with_flags(pooling="mean", normalized=None)
    assert config == EmbeddingConfig(pooling="mean", normalized=True)
    assert "'mean'" in caplog.text
    assert "'cls'" in caplog.text


def save_model(folder, *parts):
    with model_replaced(folder) as staging:
        save_checkpoint(staging, *parts)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def saved(tiny_bert, folder):
    backbone, tokenizer, config = load_backbone(str(tiny_bert), flag="--model")
    save_model(folder, backbone, tokenizer, config)
    return folder


def test_a_module_that_would_not_be_applied_is_refused_by_name(tiny_bert, tmp_path):
    folder = saved(tiny_bert, tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"idx": 2, "name": "2", "path": "2_LSTM", "type": "sentence_transformers.models.LSTM"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="LSTM"):
        read_config(str(folder))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pooling_mode_cls_token": False}, "the pooling is none"),
        ({"pooling_mode": "median"}, "the pooling is median; cls, max, mean, "),
        ({"pooling_mode": ["cls", "median"]}, r"the pooling is cls\+median"),
        ({"pooling_mode": [1]}, '"pooling_mode" is \\[1\\], expected the name of a pooling, or a list'),
        ({"pooling_mode_cls_token": "yes"}, '"pooling_mode_cls_token" is "yes", expected true or false'),
        ({"include_prompt": 1}, '"include_prompt" is 1, expected true or false'),
    ],
)
def test_a_pooling_that_would_not_be_applied_is_refused_by_name(tiny_bert, tmp_path, changes, complaint):
    folder = saved(tiny_bert, tmp_path)
    edit(folder / "1_Pooling" / "config.json", **changes)
    with pytest.raises(UserError, match=complaint):
        read_config(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("modules.json", {}, "modules.json: expected a list of modules"),
        ("modules.json", [], "modules.json: expected a list of modules"),
        ("modules.json", ["x"], "modules.json: module 0: a JSON str, expected an object"),
        ("modules.json", [{"path": ""}], 'module 0: "type" is missing, expected a string'),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling", "path": ""}], 'module 0: "path" is missing'),
        (
            "sentence_bert_config.json",
            {"max_seq_length": -1},
            '"max_seq_length" is -1, expected a whole number',
        ),
        ("sentence_bert_config.json", {"max_seq_length": "512"}, '"max_seq_length" is "512", expected'),
        ("sentence_bert_config.json", {"max_seq_length": True}, '"max_seq_length" is true, expected'),
        ("sentence_bert_config.json", {"do_lower_case": "no"}, '"do_lower_case" is "no", expected true or false'),
        ("sentence_bert_config.json", [], "sentence_bert_config.json: a JSON list, expected an object"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, '"prompts" is .*, expected an object of strings'),
        ("config_sentence_transformers.json", {"prompts": {"query": 7}}, '"prompts" is .*, expected an object of str'),
        ("config_sentence_transformers.json", {"default_prompt_name": 1}, '"default_prompt_name" is 1, expected'),
        ("config_sentence_transformers.json", None, "config_sentence_transformers.json: a JSON NoneType, expected"),
        ("1_Pooling/config.json", [], "config.json: a JSON list, expected an object"),
        ("config.json", {"model_type": "bert", "hidden_size": 64}, "--model .*: cannot be loaded: .*"),
        ("config.json", {"model_type": "bert", "hidden_size": "64"}, "--model .*: cannot be loaded: .*"),
        ("config.json", [], "--model .*: cannot be loaded: .*"),
        ("tokenizer.json", {}, "--model .*: cannot be loaded: .*"),
        ("tokenizer_config.json", [], "--model .*: cannot be loaded: .*"),
    ],
)
def test_a_side_file_of_another_kind_is_one_line_that_names_it(tiny_bert, tmp_path, name, content, complaint):
    folder = saved(tiny_bert, tmp_path)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=complaint) as refusal:
        load_backbone(str(folder), flag="--model")
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_module_without_its_files_or_with_those_of_another_is_named(tiny_bert, tmp_path):
    make_dense_model(tiny_bert, tmp_path, prompts={})
    edit(tmp_path / "4_LayerNorm" / "config.json", dimension=47)
    with pytest.raises(UserError, match=r"4_LayerNorm: .*; these are not the weights of a LayerNorm module"):
        load_projection(str(tmp_path), read_config(str(tmp_path)))
    (tmp_path / "4_LayerNorm" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r'4_LayerNorm/config\.json: "dimension" is missing, expected a whole number'):
        read_config(str(tmp_path))
    (tmp_path / "2_Dense" / "model.safetensors").write_bytes(b"no weights")
    edit(tmp_path / "4_LayerNorm" / "config.json", dimension=48)
    with pytest.raises(UserError, match="2_Dense: "):
        load_projection(str(tmp_path), read_config(str(tmp_path)))
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"2_Dense/model\.safetensors is missing, though modules.json names its module"):
        load_projection(str(tmp_path), read_config(str(tmp_path)))
    (tmp_path / "2_Dense" / "config.json").unlink()
    with pytest.raises(UserError, match=r"2_Dense/config\.json is missing, though modules.json names it"):
        read_config(str(tmp_path))


def test_modules_whose_weights_are_pickles_are_read(tiny_bert, tmp_path):
    make_dense_model(tiny_bert, tmp_path, prompts={})
    expected = our_embeddings(tmp_path, TEXTS)
    for name in ("2_Dense", "4_LayerNorm"):
        path = tmp_path / name / "model.safetensors"
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    assert np.array_equal(our_embeddings(tmp_path, TEXTS), expected)


def test_a_side_file_that_is_not_json_is_named(tiny_bert, tmp_path):
    folder = saved(tiny_bert, tmp_path)
    (folder / "modules.json").write_text("{")
    with pytest.raises(UserError, match=r"modules\.json"):
        read_config(str(folder))


def test_saving_unnormalised_over_a_normalised_checkpoint_leaves_no_stale_module(tiny_bert, tmp_path):
    backbone, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    save_model(tmp_path, backbone, tokenizer, EmbeddingConfig(normalized=True))
    (tmp_path / "1_my_notes").mkdir()
    save_model(tmp_path, backbone, tokenizer, EmbeddingConfig(normalized=False))
    assert read_config(str(tmp_path)).normalized is False
    assert not (tmp_path / "2_Normalize").exists()
    assert (tmp_path / "1_my_notes").exists()


def test_cased_text_is_lowered_when_the_checkpoint_says_so(tmp_path):
    folder = make_tiny_bert(tmp_path / "cased", lower_case=False)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": true}')
    config = read_config(str(folder))
    assert config.lower_case is True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    upper, lower = (
        tokenize(tokenizer, [text], instruction="", max_length=32, lower_case=True) for text in ("RESET", "reset")
    )
    assert upper == lower
