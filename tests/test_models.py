"""Every verified model, and further kinds: through all three scripts, and equal to sentence-transformers."""

import numpy as np
import pytest
from helpers import published as models
from helpers.data import REPOSITORY, TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.running import encoding_arguments, mean_reciprocal_rank

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.model.checkpoint import read_config
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.retrieval.encoder import load_encoder

QUERIES = ["how do i reset the pump?", "who", "My motor is red. " * 30]


@pytest.mark.parametrize("name", [*models.VERIFIED, *models.FURTHER])
def test_a_small_model_of_this_kind_goes_the_whole_way(name, tmp_path):
    go_the_whole_way(name, tmp_path, full_size=False)


@pytest.mark.full_size
@pytest.mark.parametrize("name", models.VERIFIED)
def test_the_verified_model_goes_the_whole_way_at_full_size(name, tmp_path):
    go_the_whole_way(name, tmp_path, full_size=True)


def go_the_whole_way(name, tmp_path, *, full_size):
    """Embeddings as sentence-transformers gives them; mining, two steps, saving, evaluation; and again."""
    from sentence_transformers import SentenceTransformer

    published = (models.VERIFIED | models.FURTHER)[name]
    base = models.make(name, tmp_path / "base", full_size=full_size)
    instructions = [
        *("--query_instruction_for_retrieval", published.instructions[0]),
        *("--passage_instruction_for_retrieval", published.instructions[1]),
    ]
    flags = instructions if any(published.instructions) else []  # none where the checkpoint says it
    queries = flags[1] if flags else published.prompts.get("query", "")
    passages = flags[3] if flags else ""
    assert_same_embeddings(base, flags, queries, passages)

    texts = [passage_about(topic) for topic in TOPICS]
    rows = [{"query": f"how do i reset the {topic}?", "pos": [text]} for topic, text in zip(TOPICS, texts)]
    data, mined, tuned = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "mined.jsonl", tmp_path / "tuned"
    argv = ["--model_name_or_path", base, "--input_file", data, "--output_file", mined, "--range_for_sampling", "0-4"]
    mine_hard_neg.main([*map(str, argv), *flags, "--negative_number", "2"])
    assert all(len(row["neg"]) == 2 for row in read_jsonl(mined))
    argv = ["--model_name_or_path", base, "--train_data", mined, "--output_dir", tuned, "--train_group_size", "2"]
    # A step that is too large for a large model leaves all its embeddings alike.
    training = f"--max_steps 2 --per_device_train_batch_size 4 --learning_rate {1e-5 if full_size else 1e-3}"
    training += " --query_max_len 128"  # of a tokenizer that knows few words, instructions have many tokens
    finetune.main([*map(str, argv), *flags, *training.split(), "--save_strategy", "no"])
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    argv = ["--index_file_jsonl_path", corpus, "--query_file_jsonl_path", data, "--model_name", tuned]
    # Without flags of the model: the checkpoint says all.
    metrics = evaluate.main([*map(str, argv), "--dtype", "float32"])
    peer = SentenceTransformer(str(tuned), device="cpu")
    ranked = peer.encode([row["query"] for row in rows], prompt=queries), peer.encode(texts, prompt=passages)
    assert metrics["MRR@10"] == pytest.approx(mean_reciprocal_rank(*ranked, range(len(rows))))

    config = read_config(str(tuned))
    assert (config.query_instruction, config.passage_instruction) == (queries, passages)
    assert (config.pooling, config.max_seq_length) == (published.pooling, published.max_seq_length)
    before, after = (embeddings(folder, flags)[0] for folder in (base, tuned))
    assert not np.allclose(before, after, atol=1e-4)
    assert_same_embeddings(tuned, [], queries, passages)


@pytest.mark.full_size
def test_all_mpnet_base_v2_goes_the_whole_way_with_its_real_weights(tmp_path):
    """`make test-models` fetches it. On the sample data: mining, eight steps, sentence-transformers' embeddings."""
    from sentence_transformers import SentenceTransformer

    base, mined, tuned = REPOSITORY / ".models" / "all-mpnet-base-v2", tmp_path / "mined.jsonl", tmp_path / "tuned"
    rows = ["--input_file", REPOSITORY / "example.jsonl", "--output_file", mined]
    mine_hard_neg.main([*map(str, ["--model_name_or_path", base, *rows, "--range_for_sampling", "2-10"])])
    argv = ["--model_name_or_path", base, "--train_data", mined, "--output_dir", tuned, "--train_group_size", 2]
    training = "--max_steps 8 --per_device_train_batch_size 16 --learning_rate 5e-5 --temperature 0.05 --bf16 True"
    finetune.main([*map(str, argv), *training.split(), "--passage_max_len", "256", "--save_strategy", "no"])
    files = ["--query_file_jsonl_path", REPOSITORY / "example_heldout.jsonl"]
    files += ["--index_file_jsonl_path", REPOSITORY / "candidate_context.jsonl", "--dtype", "float32"]
    metrics = evaluate.main(["--model_name", *map(str, [base, tuned, *files])])
    passages = [text for line in read_jsonl(REPOSITORY / "candidate_context.jsonl") for text in line["context"]]
    for model in (base, tuned):
        encoder = load_encoder(str(model), encoding_arguments("--dtype", "float32"), flag="--model")
        theirs = SentenceTransformer(str(model), device="cpu").encode(passages)
        assert (next(encoder.encode_passages(passages))[1] * theirs).sum(axis=1).min() >= 0.99999
    assert metrics[str(base)]["MRR@10"] == pytest.approx(0.641, abs=2e-3)
    assert metrics[str(tuned)]["MRR@10"] > metrics[str(base)]["MRR@10"] + 0.05


@pytest.mark.parametrize("name", ["gte-base", "all-mpnet-base-v2", *list(models.FURTHER)[1:-1]])
def test_adapters_are_trained_on_this_kind_and_saved_merged(name, tmp_path):
    base, tuned = models.make(name, tmp_path / "base"), tmp_path / "tuned"
    rows = [{"query": f"how do i reset the {topic}?", "pos": [passage_about(topic)]} for topic in TOPICS]
    argv = [
        "--model_name_or_path",
        base,
        "--train_data",
        write_jsonl(tmp_path / "r.jsonl", rows),
        "--output_dir",
        tuned,
    ]
    training = "--max_steps 2 --per_device_train_batch_size 5 --train_group_size 1 --learning_rate 1e-2 --lora_rank 2"
    training += " --query_max_len 128"
    finetune.main([*map(str, argv), *training.split()])
    before, after = (embeddings(folder, [])[0] for folder in (base, tuned))
    assert not np.allclose(before, after, atol=1e-4)
    prompts = (models.VERIFIED | models.FURTHER)[name].prompts
    assert_same_embeddings(tuned, [], prompts.get("query", ""), "")


def embeddings(folder, flags):
    """Of queries and of passages, in float32."""
    encoder = load_encoder(str(folder), encoding_arguments("--dtype", "float32", *flags), flag="--model")
    return encoder.encode_queries(QUERIES), next(encoder.encode_passages(QUERIES))[1]


def assert_same_embeddings(folder, flags, query_instruction, passage_instruction):
    """Ours and those of sentence-transformers are equal, and those of different texts are not."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(folder), device="cpu")
    for ours, prompt in zip(embeddings(folder, flags), (query_instruction, passage_instruction)):
        theirs = peer.encode(QUERIES, prompt=prompt)
        assert (ours * theirs).sum(axis=1).min() >= 0.99999
        assert (ours[0] * ours[1]).sum() < 0.9999


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_the_limit_of_an_old_checkpoint_is_read_as_sentence_transformers_reads_it(kind, tmp_path):
    folder = models.make("gte-base", tmp_path / "old")
    (folder / "sentence_bert_config.json").unlink()
    (folder / f"sentence_{kind}_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    assert read_config(str(folder)).max_seq_length == 24
    assert_same_embeddings(folder, [], "", "")  # one of the texts has 120 tokens
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    assert read_config(str(folder)).max_seq_length == 16
    assert_same_embeddings(folder, [], "", "")


def test_a_decoder_gives_the_same_embeddings_whichever_side_is_padded(tmp_path):
    left, right = (models.make(name, tmp_path / name[:8], full_size=False) for name in list(models.FURTHER)[-2:])
    for one, other in zip(embeddings(left, []), embeddings(right, [])):
        assert np.allclose(one, other, atol=1e-5)


def test_a_model_that_does_not_embed_text_is_refused_by_name(tmp_path):
    from transformers import M2M100Config, M2M100Model

    folder = models.make("gte-base", tmp_path / "m2m")
    (folder / "config.json").unlink()
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    M2M100Model(M2M100Config(vocab_size=200, **sizes, **heads)).save_pretrained(folder)
    with pytest.raises(UserError, match="a M2M100Model does not embed text by itself"):
        load_backbone(str(folder), flag="--model")
