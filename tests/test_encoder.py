import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about
from helpers.running import embed_passages, encoder_for
from helpers.tiny import make_tiny_bert, make_tokenizer
from transformers import BertConfig, BertModel

from embedding_finetune.command_line import UserError
from embedding_finetune.model.checkpoint import EmbeddingConfig, save_route, save_router
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.retrieval.encoder import Encoder, check_dimensions

TEXTS = ["how do i reset the pump?", "Call the alarm desk."]


def test_a_model_without_routes_is_loaded_once(tiny_bert):
    encoder = encoder_for(tiny_bert)
    assert encoder.queries is encoder.passages
    assert encoder.weights_digest == encoder.queries.weights_digest


def test_towers_of_other_dimensions_are_refused(tiny_bert):
    check_dimensions(32, 32, what="m")
    with pytest.raises(UserError, match="m: embeddings of its queries have 8 dimensions, those of its passages 32"):
        check_dimensions(8, 32, what="m")


def test_flags_about_passages_are_for_the_model_of_passages(tmp_path):
    backbone, tokenizer, _ = load_backbone(str(make_tiny_bert(tmp_path / "bert")), flag="--model")
    config = EmbeddingConfig(max_seq_length=32)
    folder = tmp_path / "router"
    folder.mkdir()
    for route in ("query", "document"):
        save_route(folder, route, backbone, tokenizer, config)
    save_router(folder, query=config, document=config)
    flags = ("--passage_max_len", "6", "--passage_instruction_for_retrieval", "it is ")
    given, plain = encoder_for(folder, *flags), encoder_for(folder)
    assert np.array_equal(given.encode_queries(TEXTS), plain.encode_queries(TEXTS))
    assert np.array_equal(embed_passages(given, TEXTS), embed_passages(encoder_for(tmp_path / "bert", *flags), TEXTS))


def test_queries_and_passages_are_kept_by_the_model_of_each(tiny_bert, other_bert, tmp_path):
    base = encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path))
    embed_passages(base, TEXTS)
    routed = Encoder(encoder_for(other_bert, "--embeddings_dir", str(tmp_path)).queries, base.passages)
    routed.passages.stores["passage"].refresh()
    assert routed.passages.stores["passage"].get(TEXTS)[1].all()
    assert not routed.queries.stores["query"].get(TEXTS)[1].any()


def test_a_dense_module_gives_a_text_the_same_bits_alone_and_beside_others(tmp_path):
    """MKL sums the products of up to three rows in another order than those of more. Long texts have such batches."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    config = BertConfig(vocab_size=200, hidden_size=384, num_hidden_layers=1, num_attention_heads=12)
    BertModel(config).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(384, pooling_mode="mean"), Dense(384, 384)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "dense"))
    texts = [f"{passage_about(topic)} " * 30 for topic in TOPICS]
    together = embed_passages(encoder_for(tmp_path / "dense"), texts)
    for budget in ("100", "300"):
        few = embed_passages(encoder_for(tmp_path / "dense", "--tokens_per_batch", budget), texts)
        assert np.array_equal(few, together)
