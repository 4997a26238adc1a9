"""finetune.py --freeze_passages: queries are trained, passages keep their embeddings."""

import json
import shutil

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_evaluation, write_jsonl
from helpers.running import embed_passages, encoder_for
from helpers.tiny import make_tiny_bert
from helpers.tiny_runs import equal, flags, kill_after_checkpoint, refusal
from safetensors.torch import load_file, save_file

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.retrieval.tower import Tower
from embedding_finetune.training import choosing, verdict

HELD_OUT = {"hold_out": 4, "hold_out_by": "question", "eval_strategy": "steps", "eval_steps": 2}
TEXTS = ["how do i reset the pump?", "Call the alarm desk."]


@pytest.fixture
def rows(tmp_path):
    texts = [passage_about(topic) for topic in TOPICS]
    return write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"query": f"how do i {verb} the {topic}?", "pos": [texts[n], texts[n - 1]], "neg": [texts[n - 3]]}
            for verb in ("reset", "open")
            for n, topic in enumerate(TOPICS)
        ],
    )


@pytest.fixture
def pool(tmp_path):
    return write_jsonl(
        tmp_path / "pool.jsonl", [{"text": f"{passage_about(topic)} {n}"} for n in range(5) for topic in TOPICS]
    )


@pytest.fixture
def embedded(monkeypatch):
    """Kind and number of texts that go through a model to be searched with, block by block."""
    counts, embed = [], Tower._embed

    def counted(self, block, kind, progress):
        counts.append((kind.name, len(block.missing)))
        embed(self, block, kind, progress)

    monkeypatch.setattr(Tower, "_embed", counted)
    return counts


def argv_of(model, rows, folder, **changes):
    given = flags(model, rows, folder, freeze_passages=True, query_max_len=32, temperature=0.1, **changes)
    place = given.index("--train_group_size")
    return given[:place] + given[place + 2 :]


def query_weights(folder):
    return load_file(folder / "query_0_Transformer" / "model.safetensors")


def test_queries_learn_and_passages_keep_the_embeddings_of_the_base(tiny_bert, rows, pool, tmp_path):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "out", candidate_pool=pool))
    base, tuned = (encoder_for(folder, "--dtype", "float32") for folder in (tiny_bert, tmp_path / "out"))
    assert np.array_equal(embed_passages(base, TEXTS), embed_passages(tuned, TEXTS))
    assert base.passages.index_digest == tuned.passages.index_digest
    assert not np.allclose(base.encode_queries(TEXTS), tuned.encode_queries(TEXTS), atol=1e-3)
    assert base.passages.weights_digest in (tmp_path / "out" / "README.md").read_text()
    said = json.loads((tmp_path / "out" / "passage_model.json").read_text())
    assert said["weights_sha256"] == base.passages.weights_digest
    assert (said["name"], said["pooling"], said["max_seq_length"]) == (tiny_bert.name, "cls", 128)


def test_sentence_transformers_encodes_queries_and_documents_as_the_scripts_do(tiny_bert, rows, tmp_path):
    from sentence_transformers import SentenceTransformer

    instructions = {"query_instruction_for_retrieval": "how: ", "passage_instruction_for_retrieval": "it is "}
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "out", passage_max_len=16, **instructions))
    ours, theirs = encoder_for(tmp_path / "out", "--dtype", "float32"), SentenceTransformer(str(tmp_path / "out"))
    long = [*TEXTS, "red green blue " * 30]
    assert ((ours.encode_queries(long) * theirs.encode_query(long)).sum(axis=1) > 0.9999).all()
    assert ((embed_passages(ours, long) * theirs.encode_document(long)).sum(axis=1) > 0.9999).all()
    by_flags = encoder_for(
        tiny_bert, "--dtype", "float32", "--passage_max_len", "16", "--passage_instruction", "it is "
    )
    assert np.array_equal(embed_passages(ours, long), embed_passages(by_flags, long))


def test_passages_are_encoded_once_and_never_by_evaluate(tiny_bert, rows, pool, tmp_path, embedded, capsys):
    kept = {"embeddings_dir": tmp_path / "kept", "candidate_pool": pool}
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "out", **kept, **HELD_OUT))
    assert sum(count for kind, count in embedded if kind == "passage") == len(TOPICS) * 6
    capsys.readouterr()
    embedded.clear()
    files = ["--index_file_jsonl_path", str(pool), "--query_file_jsonl_path", str(rows)]
    models = ["--model_name", str(tiny_bert), str(tmp_path / "out")]
    evaluate.main([*models, *files, "--embeddings_dir", str(tmp_path / "kept")])
    assert {kind for kind, _ in embedded} == {"query"}
    told = f"{tmp_path / 'out'} searches the index of {tiny_bert}: passages have the same embeddings"
    assert told in capsys.readouterr().out


def test_evaluate_embeds_passages_once_for_both_without_a_folder_too(tiny_bert, rows, tmp_path, embedded):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "out"))
    embedded.clear()
    argv = ["--model_name", str(tiny_bert), str(tmp_path / "out"), *write_evaluation(tmp_path)]
    evaluate.main([*argv, "--output_dir", str(tmp_path / "report")])
    assert [count for kind, count in embedded if kind == "passage"] == [len(TOPICS)]
    document = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert document["index_unchanged"] == {str(tmp_path / "out"): str(tiny_bert)}
    assert "searches the index of" in (tmp_path / "report" / "report.html").read_text()


def test_the_measures_of_a_run_are_those_of_evaluate(tiny_bert, rows, tmp_path):
    out = tmp_path / "out"
    finetune.main(
        argv_of(tiny_bert, rows, out, hold_out=4, hold_out_by="question", eval_strategy="steps", eval_steps=2)
    )
    summary = json.loads((out / "training_summary.json").read_text())
    files = ["--index_file_jsonl_path", str(out / "held_out_candidates.jsonl")]
    files += ["--query_file_jsonl_path", str(out / "held_out.jsonl")]
    measured = evaluate.main(["--model_name", str(tiny_bert), str(out), *files, "--cutoffs", "1", "5", "10"])
    for name, key in ((str(tiny_bert), "metrics_before"), (str(out), "metrics_after")):
        assert measured[name] == pytest.approx(summary[key])
    assert summary["frozen_passages"]["passages"] == len(TOPICS)


def test_mine_hard_neg_reads_the_checkpoint(tiny_bert, rows, tmp_path):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "out"))
    flags = ["--model_name_or_path", str(tmp_path / "out"), "--input_file", str(rows)]
    mine_hard_neg.main([*flags, "--output_file", str(tmp_path / "mined.jsonl"), "--range_for_sampling", "0-8"])
    assert all(row["neg"] for row in read_jsonl(tmp_path / "mined.jsonl"))


def test_a_killed_run_goes_on_to_the_same_bits(rows, pool, tmp_path):
    model = make_tiny_bert(tmp_path / "bert")  # with dropout
    settings = {"candidate_pool": pool, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    finetune.main(argv_of(model, rows, tmp_path / "whole", **settings))
    killed = argv_of(model, rows, tmp_path / "killed", **settings)
    kill_after_checkpoint(killed, 4)
    finetune.main([*killed, "--resume_from_checkpoint", "True"])
    assert equal(query_weights(tmp_path / "whole"), query_weights(tmp_path / "killed"))


def test_a_run_does_not_go_on_against_other_passages(tiny_bert, rows, pool, tmp_path, capsys):
    settings = {"candidate_pool": pool, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "out", **settings))
    write_jsonl(pool, [{"text": "another passage"}])
    again = argv_of(tiny_bert, rows, tmp_path / "out", **{**settings, "max_steps": 6})
    assert "with other passages to train against" in refusal([*again, "--resume_from_checkpoint", "True"], capsys)


def test_a_checkpoint_is_trained_further_with_the_passages_that_it_has(tiny_bert, rows, tmp_path, capsys):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "first"))
    finetune.main(argv_of(tmp_path / "first", rows, tmp_path / "second"))
    base, tuned = (encoder_for(folder) for folder in (tiny_bert, tmp_path / "second"))
    assert base.passages.index_digest == tuned.passages.index_digest
    assert not equal(query_weights(tmp_path / "first"), query_weights(tmp_path / "second"))
    jointly = flags(tmp_path / "first", rows, tmp_path / "third")
    assert "has a model for queries and another one for passages" in refusal(jointly, capsys)


def test_a_base_that_is_kept_is_that_of_queries(tiny_bert, rows, tmp_path, monkeypatch):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "first"))
    for room in (verdict, choosing):
        monkeypatch.setattr(room, "FEWEST_TO_CHOOSE", 1)
    monkeypatch.setattr(choosing, "_SMALLEST_PART", 1)
    monkeypatch.setattr(verdict, "_chosen_by", lambda _: (1.0, 0.5))
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    finetune.main(argv_of(tmp_path / "first", rows, tmp_path / "out", **HELD_OUT, **best))
    assert equal(query_weights(tmp_path / "first"), query_weights(tmp_path / "out"))


def test_a_margin_is_taken_and_changes_the_weights(tiny_bert, rows, tmp_path):
    for name, margin in (("plain", {}), ("margin", {"false_negative_margin": 0.0})):
        finetune.main(argv_of(tiny_bert, rows, tmp_path / name, per_device_train_batch_size=1, **margin))
    assert not equal(query_weights(tmp_path / "plain"), query_weights(tmp_path / "margin"))


def test_a_disk_without_room_for_the_embeddings_is_one_line(tiny_bert, rows, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    line = refusal(argv_of(tiny_bert, rows, tmp_path / "out"), capsys)
    assert "--freeze_passages: TMPDIR cannot take the passages' model and embeddings: [Errno 28] No space left" in line


@pytest.mark.parametrize("kind", ["for masked tokens", "without a pooler"])
def test_an_index_stays_that_of_a_base_which_was_saved_with_another_head(rows, tmp_path, capsys, kind):
    model = make_tiny_bert(tmp_path / "bert")
    if kind == "without a pooler":
        path = model / "model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "pooler" not in name}, path)
    else:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["BertForMaskedLM"]}))
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    finetune.main(argv_of(model, rows, tmp_path / "out", **settings))
    evaluate.main(["--model_name", str(model), str(tmp_path / "out"), *write_evaluation(tmp_path)])
    assert f"searches the index of {model}" in capsys.readouterr().out
    finetune.main(
        [*argv_of(model, rows, tmp_path / "out", **{**settings, "max_steps": 6}), "--resume_from_checkpoint", "True"]
    )


def test_a_model_that_is_trained_further_says_which_model_its_index_is_of(tiny_bert, rows, tmp_path):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "first"))
    finetune.main(argv_of(tmp_path / "first", rows, tmp_path / "second"))
    first, second = (json.loads((tmp_path / name / "passage_model.json").read_text()) for name in ("first", "second"))
    assert first == second


def test_a_card_names_no_flag_that_would_be_refused_nor_a_length_that_is_not_the_indexs(tiny_bert, rows, tmp_path):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--train_group_size" not in card
    assert "--passage_max_len" not in card
    assert "Questions are cut to 128 tokens" in card
    assert "passages are cut to 128 tokens" in card


def test_an_output_folder_within_the_checkpoint_that_is_read_is_refused(tiny_bert, rows, tmp_path, capsys):
    finetune.main(argv_of(tiny_bert, rows, tmp_path / "first"))
    argv = argv_of(tmp_path / "first", rows, tmp_path / "first" / "query_0_Transformer", overwrite_output_dir=True)
    assert "would replace" in refusal(argv, capsys)


def test_another_instruction_in_the_config_of_the_base_is_another_run(tiny_bert, rows, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    finetune.main(argv_of(model, rows, tmp_path / "out", **settings))
    (model / "config_sentence_transformers.json").write_text('{"prompts": {"query": "how: "}}')
    again = argv_of(model, rows, tmp_path / "out", **{**settings, "max_steps": 6})
    line = refusal([*again, "--resume_from_checkpoint", "True"], capsys)
    assert "with other instructions before queries or passages" in line


def test_flags_that_give_passages_other_embeddings_are_told(tiny_bert, rows, tmp_path, caplog):
    with caplog.at_level("INFO"):
        finetune.main(argv_of(tiny_bert, rows, tmp_path / "same", sentence_pooling_method="cls", passage_max_len=128))
        assert "other embeddings" not in caplog.text
        assert "the pool is the passages of the rows alone" in caplog.text
        finetune.main(argv_of(tiny_bert, rows, tmp_path / "other", sentence_pooling_method="mean", passage_max_len=16))
    told = "--sentence_pooling_method and --passage_max_len: passages get other embeddings than"
    assert told in caplog.text
