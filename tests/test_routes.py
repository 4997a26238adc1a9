"""Checkpoints with a model for queries and another for passages, beside sentence-transformers' own reading of them."""

import json
import shutil

import numpy as np
import pytest
from helpers.running import embed_passages, encoder_for
from helpers.tiny import make_tiny_bert

from embedding_finetune.command_line import UserError
from embedding_finetune.model.checkpoint import (
    EmbeddingConfig,
    has_routes,
    read_config,
    save_checkpoint,
    save_route,
    save_router,
)
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.routes import modules_of_route, router_file
from embedding_finetune.model.side_files import SideFile

TEXTS = ["how do i reset the pump?", "Call the alarm desk.", "red green blue " * 30]
QUERY = EmbeddingConfig(pooling="mean", query_instruction="how: ", passage_instruction="never", max_seq_length=16)
DOCUMENT = EmbeddingConfig(pooling="cls", query_instruction="never", passage_instruction="it is ", max_seq_length=32)


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    """Queries and passages by two models, with other poolings, instructions and lengths."""
    folder = tmp_path_factory.mktemp("router")
    for seed, route, config in ((0, "query", QUERY), (1, "document", DOCUMENT)):
        backbone, tokenizer, _ = load_backbone(str(make_tiny_bert(folder / f"{route}_base", seed=seed)), flag="--model")
        save_route(folder, route, backbone, tokenizer, config)
        (folder / f"{route}_alone").mkdir()
        save_checkpoint(folder / f"{route}_alone", backbone, tokenizer, config)
    save_router(folder, query=QUERY, document=DOCUMENT)
    return folder


def test_each_kind_of_text_goes_through_its_own_model(router):
    encoder = encoder_for(router, "--dtype", "float32")
    queries, passages = (
        encoder_for(router / f"{route}_alone", "--dtype", "float32") for route in ("query", "document")
    )
    assert np.array_equal(encoder.encode_queries(TEXTS), queries.encode_queries(TEXTS))
    assert np.array_equal(embed_passages(encoder, TEXTS), embed_passages(passages, TEXTS))
    assert not np.allclose(encoder.encode_queries(TEXTS), embed_passages(encoder, TEXTS), atol=0.1)


def test_sentence_transformers_gets_the_same_embeddings(router):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(router), device="cpu")
    ours = encoder_for(router, "--dtype", "float32")
    for mine, other in (
        (ours.encode_queries(TEXTS), theirs.encode_query(TEXTS)),
        (embed_passages(ours, TEXTS), theirs.encode_document(TEXTS)),
    ):
        assert ((mine * other).sum(axis=1) > 0.9999).all()


def test_what_sentence_transformers_wrote_is_read(router, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    parts = [
        list(SentenceTransformer(str(router / f"{route}_alone"), device="cpu").children())
        for route in ("query", "document")
    ]
    prompts = {"query": "how: ", "document": "it is "}
    normalize = parts[0].pop()
    parts[1].pop()
    theirs = SentenceTransformer(modules=[Router.for_query_document(*parts), normalize], prompts=prompts, device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    ours, own = (encoder_for(folder, "--dtype", "float32") for folder in (tmp_path / "theirs", router))
    assert np.allclose(ours.encode_queries(TEXTS), own.encode_queries(TEXTS), atol=1e-6)
    assert np.allclose(embed_passages(ours, TEXTS), embed_passages(own, TEXTS), atol=1e-6)


def test_an_index_is_that_of_the_model_of_passages_alone(router):
    encoder, alone = encoder_for(router), encoder_for(router / "document_alone")
    assert encoder.passages.index_digest == alone.passages.index_digest
    assert encoder.weights_digest not in (encoder.queries.weights_digest, alone.weights_digest)


def test_a_checkpoint_with_one_model_has_no_routes_and_reads_as_either(router):
    alone = str(router / "query_alone")
    assert not has_routes(alone)
    assert read_config(alone, route="query") == read_config(alone, route="document") == read_config(alone)
    assert has_routes(str(router))


def test_without_a_route_two_models_are_refused(router):
    with pytest.raises(UserError, match="has a model for queries and another one for passages; --freeze_passages True"):
        read_config(str(router))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"structure": {"query": [], "image": []}}, "a Router with the routes query, image; only query and document"),
        ({"parameters": {"route_mappings": {"('query', 'text')": "query"}}}, "a Router with route_mappings"),
        ({"structure": {"query": "all", "document": []}}, '"structure": "query" is "all", expected a list of folders'),
        ({"types": {}}, '"query_0_Transformer" is missing, expected the type of a module'),
        ({"structure": 3}, '"structure" is 3, expected an object'),
    ],
)
def test_other_routers_are_refused_by_name(router, tmp_path, change, complaint):
    shutil.copytree(router, tmp_path / "other")
    path = tmp_path / "other" / "router_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path / "other"), route="query")
    assert complaint in str(error.value)


def test_a_route_with_modules_that_are_not_applied_here_is_refused_by_name(router, tmp_path):
    shutil.copytree(router, tmp_path / "other")
    path = tmp_path / "other" / "router_config.json"
    content = json.loads(path.read_text())
    content["types"]["query_0_Transformer"] = "sentence_transformers.models.StaticEmbedding"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="asks for StaticEmbedding > Pooling > Normalize; only Transformer > Pooling"):
        read_config(str(tmp_path / "other"), route="query")
    assert read_config(str(tmp_path / "other"), route="document").pooling == "cls"


@pytest.mark.parametrize("name", ["../other", "/tmp/other", "a/../../b"])
def test_a_router_that_leads_out_of_its_folder_is_refused(name):
    content = router_file({"query": [(name, "Transformer")], "document": [("d", "Transformer")]})
    with pytest.raises(UserError, match=r"f: the module .* is not in the checkpoint's folder"):
        modules_of_route(SideFile("f", content), "query")


def test_a_router_in_a_folder_of_its_own_has_its_modules_there(router, tmp_path):
    shutil.copytree(router, tmp_path / "other" / "0_Router")
    for name in ("modules.json", "config_sentence_transformers.json"):
        shutil.move(tmp_path / "other" / "0_Router" / name, tmp_path / "other")
    path = tmp_path / "other" / "modules.json"
    path.write_text(path.read_text().replace('"path": ""', '"path": "0_Router"'))
    (tmp_path / "other" / "0_Router" / "router_config.json").rename(tmp_path / "other" / "0_Router" / "config.json")
    moved, own = (encoder_for(folder, "--dtype", "float32") for folder in (tmp_path / "other", router))
    assert np.array_equal(moved.encode_queries(TEXTS), own.encode_queries(TEXTS))


def test_a_router_without_its_file_is_one_line(router, tmp_path):
    shutil.copytree(router, tmp_path / "other")
    (tmp_path / "other" / "router_config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing, though modules.json names it"):
        read_config(str(tmp_path / "other"), route="query")


def test_what_is_written_is_read_again():
    modules = {"query": [("query_0_Transformer", "Transformer")], "document": [("d", "Transformer"), ("p", "Pooling")]}
    described = SideFile("f", router_file(modules))
    for route, listed in modules.items():
        assert modules_of_route(described, route) == [(kind, folder) for folder, kind in listed]
