"""NAME@REVISION loads a model of the hub as it was at a branch, tag or commit; the cache here has the hub's layout."""

import shutil

import numpy as np
import pytest
from helpers.data import write_jsonl
from helpers.hub import put_into_cache
from helpers.running import encoder_for, encoding_arguments, evaluation
from helpers.tiny import make_tiny_bert, make_tiny_reranker
from helpers.training import TEXTS, embeddings, train, write_rows
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.model.checkpoint import read_config
from embedding_finetune.model.pretrained import load_pretrained
from embedding_finetune.model.revisions import at_revision
from embedding_finetune.model.training_queries import read_training_queries
from embedding_finetune.retrieval.reranker import check_reranker, load_reranker

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


def make_embedder(folder, *, seed, instruction):
    """A model with a Dense layer, an instruction and a record of training queries, each its own."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    bert = make_tiny_bert(folder / "bert", seed=seed)
    model = SentenceTransformer(
        modules=[Transformer(str(bert)), Pooling(32), Dense(32, 16), Normalize()],
        prompts={"query": instruction, "document": ""},
        device="cpu",
    )
    model.save(str(folder / "whole"))
    np.save(folder / "whole" / "training_queries.npy", np.array([seed]))
    return folder / "whole"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache with two revisions of an embedder, and two of a reranker: `v1` and `main`."""
    folder = tmp_path_factory.mktemp("hub")
    embedders = [make_embedder(folder / f"{n}", seed=n, instruction=f"call {n}: ") for n in (1, 2)]
    put_into_cache(folder / "cache", "me/embedder", {OLD: (embedders[0], "v1"), NEW: (embedders[1], "main")})
    rerankers = [make_tiny_reranker(folder / f"r{n}", logits=n) for n in (1, 2)]
    put_into_cache(folder / "cache", "me/reranker", {OLD: (rerankers[0], "v1"), NEW: (rerankers[1], "main")})
    return folder / "cache", embedders


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_every_file_of_a_model_is_of_its_revision(hub, revision):
    cache, folders = hub
    named = encoder_for(f"me/embedder@{revision}", "--cache_dir", str(cache), "--dtype", "float32")
    assert np.array_equal(named.encode_queries(TEXTS), embeddings(folders[0]))
    assert not np.allclose(named.encode_queries(TEXTS), embeddings(folders[1]))
    assert read_config(f"me/embedder@{revision}", cache_dir=str(cache)).query_instruction == "call 1: "
    assert read_training_queries(f"me/embedder@{revision}", cache_dir=str(cache)).tolist() == [1]


def test_without_a_revision_the_main_branch_is_loaded(hub):
    cache, folders = hub
    named = encoder_for("me/embedder", "--cache_dir", str(cache), "--dtype", "float32")
    assert np.array_equal(named.encode_queries(TEXTS), embeddings(folders[1]))


def test_config_and_tokenizer_have_revisions_of_their_own(tmp_path):
    from transformers import AutoModel

    other = make_tiny_bert(tmp_path / "other", model_max_length=99)
    put_into_cache(tmp_path / "cache", "me/parts", {OLD: (other, "v1"), NEW: (make_tiny_bert(tmp_path / "b"), "main")})
    config = (tmp_path / "cache/models--me--parts/snapshots" / OLD / "config.json").read_text()
    assert '"layer_norm_eps": 1e-12' in config
    changed = config.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 0.5')
    (tmp_path / "cache/models--me--parts/snapshots" / OLD / "config.json").write_text(changed)
    found = {}
    for name in ("me/parts@v1", "me/parts"):
        model, tokenizer = load_pretrained(
            AutoModel,
            str(other),
            flag="--model",
            remedy="",
            config_name=name,
            tokenizer_name=name,
            cache_dir=str(tmp_path / "cache"),
        )
        found[name] = model.config.layer_norm_eps, tokenizer.model_max_length
    assert found == {"me/parts@v1": (0.5, 99), "me/parts": (1e-12, 128)}


def test_a_reranker_is_checked_and_loaded_at_its_revision(hub):
    options = encoding_arguments("--cache_dir", str(hub[0]))
    check_reranker("me/reranker@v1", options)
    assert load_reranker("me/reranker@v1", options).model.config.num_labels == 1
    with pytest.raises(UserError, match="2 logits"):
        check_reranker("me/reranker", options)


def test_an_adapter_alone_is_of_its_revision_and_so_is_its_base(hub, tmp_path):
    cache, flags = tmp_path / "cache", ["--lora_rank", 2, "--save_adapter_only", "True"]
    shutil.copytree(hub[0], cache)
    bases = {OLD: (make_tiny_bert(tmp_path / "b1", seed=1), "v1"), NEW: (make_tiny_bert(tmp_path / "b2"), "main")}
    put_into_cache(cache, "me/base", bases)
    rows, used = write_rows(tmp_path), ["--cache_dir", str(cache)]
    alone = [train("me/base@v1", rows, tmp_path / f"a{n}", *flags, *used, "--seed", n) for n in (1, 2)]
    put_into_cache(cache, "me/adapter", {OLD: (alone[0], "v1"), NEW: (alone[1], "main")})
    for name, folder in (("me/adapter@v1", alone[0]), ("me/adapter", alone[1])):
        assert np.array_equal(embeddings(name, *used), embeddings(folder, *used))
    assert not np.allclose(embeddings("me/adapter@v1", *used), embeddings("me/adapter", *used))


def test_all_three_scripts_take_a_revision(hub, tmp_path):
    cache, name = ["--cache_dir", str(hub[0])], f"me/embedder@{OLD}"
    rows = write_rows(tmp_path)
    mined = tmp_path / "mined.jsonl"
    argv = ["--model_name_or_path", name, "--input_file", rows, "--output_file", mined, "--range_for_sampling", "0-5"]
    mine_hard_neg.main([*map(str, argv), "--reranker_name_or_path", "me/reranker@v1", *cache])
    tuned = train(name, mined, tmp_path / "tuned", "--config_name", name, "--tokenizer_name", name, *cache)
    assert load_file(tuned / "model.safetensors").keys() == load_file(hub[1][0] / "model.safetensors").keys()
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"text": text} for text in TEXTS])
    argv = evaluation(name, pool, rows)
    argv.insert(argv.index(name) + 1, "me/embedder")
    measures = evaluate.main([*argv, *cache, "--output_dir", str(tmp_path / "report")])
    assert list(measures) == [name, "me/embedder"]


@pytest.mark.parametrize("script", ["mine", "finetune", "evaluate"])
def test_a_revision_that_is_not_there_is_one_line_that_names_it(hub, tmp_path, capsys, script):
    rows, name = write_rows(tmp_path), "me/embedder@nonesuch"
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"text": text} for text in TEXTS])
    argv, main = {
        "mine": (["--model_name_or_path", name, "--input_file", rows, "--output_file", tmp_path / "o"], mine_hard_neg),
        "finetune": (["--model_name_or_path", name, "--train_data", rows, "--output_dir", tmp_path / "o"], finetune),
        "evaluate": (evaluation(name, pool, rows), evaluate),
    }[script]
    with pytest.raises(SystemExit) as stop:
        main.main([*map(str, argv), "--cache_dir", str(hub[0])])
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert name in errors[0]


def test_a_folder_of_the_very_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny_bert(tmp_path / "tuned@v2")
    assert at_revision("tuned@v2") == ("tuned@v2", {})
    assert at_revision("me/model@refs/pr/1") == ("me/model", {"revision": "refs/pr/1"})
    assert at_revision("model@v1@2") == ("model", {"revision": "v1@2"})
    assert at_revision("/data/me@host/model") == ("/data/me@host/model", {})


@pytest.mark.parametrize(("name", "said"), [("bert@v1", "bert is a folder"), ("me/model@", "after the @")])
def test_a_revision_of_a_folder_and_an_empty_one_are_refused(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    make_tiny_bert(tmp_path / "bert")
    with pytest.raises(UserError, match=said):
        encoder_for(name)
