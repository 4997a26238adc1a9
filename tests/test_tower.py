import itertools

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about
from helpers.running import embed_passages, encoder_for

from embedding_finetune.command_line import UserError
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.retrieval import tower as towers
from embedding_finetune.retrieval.tower import Tower

BEYOND = "too long or too short to be compared"
TEXTS = [passage_about(topic) * repeat for topic in TOPICS for repeat in (1, 2)] + ["a", "press"]


def test_embeddings_do_not_depend_on_batch_or_block_size(tiny_bert, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        flags = ("--dtype", dtype, "--tokens_per_batch")
        whole = embed_passages(encoder_for(tiny_bert, *flags, "4096"), TEXTS)
        for budget, block in itertools.product(("1", "100", "100000"), (1, 5, 1000)):
            monkeypatch.setattr(towers, "TEXTS_PER_BLOCK", block)
            assert np.array_equal(embed_passages(encoder_for(tiny_bert, *flags, budget), TEXTS), whole)


def test_blocks_come_in_order_with_their_positions(tiny_bert, monkeypatch):
    monkeypatch.setattr(towers, "TEXTS_PER_BLOCK", 5)
    blocks = [(start, len(block)) for start, block in encoder_for(tiny_bert).encode_passages(TEXTS)]
    assert blocks == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 2)]
    share = [(start, len(block)) for start, block in encoder_for(tiny_bert).encode_passages(TEXTS, slice(9, 16))]
    assert share == [(9, 5), (14, 2)]


def test_on_an_accelerator_blocks_are_larger_after_a_first_one_that_it_has_soon(tiny_bert, monkeypatch):
    monkeypatch.setattr(towers, "TEXTS_PER_BLOCK", 2)
    monkeypatch.setattr(towers.Tower, "device", torch.device("mps"))
    encoder = encoder_for(tiny_bert)
    blocks = [(start, len(block)) for start, block in encoder.encode_passages(TEXTS, slice(1, 20))]
    assert blocks == [(1, 2), (3, 8), (11, 8), (19, 1)]


def test_texts_of_the_same_tokens_get_identical_embeddings(tiny_bert):
    embeddings = encoder_for(tiny_bert).encode_queries(["Reset the PUMP", *TEXTS, "reset  the pump"])
    assert np.array_equal(embeddings[0], embeddings[-1])


def test_repeated_texts_go_through_the_model_once(tiny_bert, monkeypatch):
    encoder, batches = encoder_for(tiny_bert, "--tokens_per_batch", "1"), []  # each text is a batch of its own
    encode = encoder.passages.model.forward
    monkeypatch.setattr(encoder.passages.model, "forward", lambda **batch: batches.append(batch) or encode(**batch))
    encoder.encode_queries([*TEXTS, *TEXTS, "Reset the PUMP", "reset  the pump"])
    assert [len(batch["input_ids"]) for batch in batches] == [1] * (len(TEXTS) + 1)


def test_no_texts_give_no_embeddings(tiny_bert):
    assert encoder_for(tiny_bert).encode_queries([]).shape == (0, 32)
    assert list(encoder_for(tiny_bert).encode_passages([])) == []


@pytest.mark.parametrize("flag", ["--query_max_len", "--passage_max_len"])
def test_more_tokens_than_the_model_takes_is_an_error_that_names_the_flag(tiny_bert, flag):
    with pytest.raises(UserError, match=f"{flag} 129: the model takes at most 128"):
        encoder_for(tiny_bert, flag, "129")


def test_length_flags_cut_queries_and_passages_separately(tiny_bert):
    short = encoder_for(tiny_bert, "--query_max_len", "4", "--passage_max_len", "6")
    long = encoder_for(tiny_bert)
    text = passage_about("pump")
    assert not np.allclose(short.encode_queries([text]), long.encode_queries([text]), atol=1e-3)
    assert not np.allclose(embed_passages(short, [text]), short.encode_queries([text]), atol=1e-3)


def test_the_query_instruction_applies_to_queries_and_the_passage_instruction_to_passages(tiny_bert):
    flags = ("--query_instruction_for_retrieval", "how: ", "--passage_instruction_for_retrieval", "it is ")
    instructed, plain = encoder_for(tiny_bert, *flags), encoder_for(tiny_bert)
    text = "reset the pump"
    assert np.allclose(instructed.encode_queries([text]), plain.encode_queries(["how: " + text]), atol=1e-6)
    assert np.allclose(embed_passages(instructed, [text]), embed_passages(plain, ["it is " + text]), atol=1e-6)


def test_texts_that_are_cut_are_counted(tiny_bert, caplog):
    with caplog.at_level("INFO"):
        encoder_for(tiny_bert, "--query_max_len", "6").encode_queries(["reset the pump", "reset the pump", "a b c d e"])
    assert "1 of 3 query texts were cut to 6 tokens" in caplog.text


def test_texts_that_are_cut_are_counted_among_those_that_were_not_in_the_store(tiny_bert, tmp_path, caplog):
    encoder = encoder_for(tiny_bert, "--query_max_len", "6", "--embeddings_dir", str(tmp_path))
    encoder.encode_queries(["a b c d e f"])
    with caplog.at_level("INFO"):
        encoder.encode_queries(["a b c d e f", "a b c d e", "a"])
    assert "1 of 2 new query texts were cut to 6 tokens" in caplog.text


@pytest.mark.parametrize(
    ("value", "complaint"),
    [(float("nan"), "not finite"), (0.0, "zero"), (1e19, BEYOND), (1e-20, BEYOND)],
)
def test_an_embedding_without_a_direction_is_an_error_that_names_the_text(tiny_bert, monkeypatch, value, complaint):
    monkeypatch.setattr(towers, "TEXTS_PER_BLOCK", 5)
    encoder = encoder_for(tiny_bert)
    encode = encoder.passages.model.forward

    def broken(input_ids, attention_mask):
        embeddings = encode(input_ids, attention_mask)
        embeddings[(input_ids == encoder.passages.tokenizer.convert_tokens_to_ids("desk")).any(dim=1)] = value
        return embeddings

    monkeypatch.setattr(encoder.passages.model, "forward", broken)
    with pytest.raises(UserError, match=f"passage 8 has an embedding that is {complaint}: 'my desk'"):
        list(encoder.encode_passages(["pump", "gate"] * 3 + ["red", "my desk", "panel"]))


def test_running_out_of_gpu_memory_halves_the_batch_and_says_so(tiny_bert, monkeypatch, caplog):
    whole = embed_passages(encoder_for(tiny_bert), TEXTS)
    encoder = encoder_for(tiny_bert)
    encode, sizes = encoder.passages.model.forward, []

    def small_gpu(input_ids, attention_mask):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(input_ids, attention_mask)

    monkeypatch.setattr(encoder.passages.model, "forward", small_gpu)
    assert np.array_equal(embed_passages(encoder, TEXTS), whole)
    assert "out of GPU memory: --tokens_per_batch is" in caplog.text
    sizes.clear()
    embed_passages(encoder, TEXTS)
    assert max(sizes) <= 100


def test_other_errors_and_a_text_that_does_not_fit_alone_are_not_swallowed(tiny_bert, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("something else")):
        encoder = encoder_for(tiny_bert)
        monkeypatch.setattr(encoder.passages.model, "forward", lambda error=error, **_: (_ for _ in ()).throw(error))
        with pytest.raises(type(error), match=str(error)):
            encoder.encode_queries(TEXTS)


def test_an_encoder_that_does_not_know_its_weights_keeps_no_embeddings(tiny_bert, tmp_path):
    tower = encoder_for(tiny_bert).passages
    tower.weights_digest = ""
    with pytest.raises(ValueError, match="two models would share them"):
        tower.keep_embeddings(tower.passage, str(tmp_path))


@pytest.mark.parametrize("flag", ["", "it is "])
def test_queries_with_instructions_have_the_embeddings_of_what_is_written_out(tiny_bert, flag):
    instructions = [None, "", "how: ", "open the ", "how: ", None]
    written = [(flag if own is None else own) + text for own, text in zip(instructions, TEXTS)]
    instructed = encoder_for(tiny_bert, "--query_instruction_for_retrieval", flag)
    plain = encoder_for(tiny_bert, "--query_instruction_for_retrieval", "")
    assert np.array_equal(instructed.encode_queries(TEXTS[:6], instructions), plain.encode_queries(written))


def test_without_instructions_of_their_own_queries_keep_their_bits(tiny_bert):
    encoder = encoder_for(tiny_bert, "--query_instruction_for_retrieval", "how: ")
    assert np.array_equal(encoder.encode_queries(TEXTS), encoder.encode_queries(TEXTS, [None] * len(TEXTS)))


def test_pooling_leaves_out_each_querys_own_instruction(tiny_bert, tmp_path):
    backbone, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    config = EmbeddingConfig(pooling="mean", include_prompt=False)
    encoder = Tower(BiEncoder(backbone.eval(), config), tokenizer, query_max_len=32, passage_max_len=32)
    query, instructions = "reset the pump", [None, "how do i ", "open the "]
    for number, vector in enumerate(encoder.encode_queries([query] * 3, instructions)):
        own = instructions[number] or ""
        ids = torch.tensor([tokenizer(own + query)["input_ids"]])
        states = backbone(ids).last_hidden_state[0].detach()
        kept = states[len(tokenizer(own)["input_ids"]) - 1 :] if own else states
        assert np.allclose(vector, torch.nn.functional.normalize(kept.mean(dim=0), dim=0), atol=1e-6)
