import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.data import REPOSITORY, TOPICS, passage_about, write_jsonl
from helpers.running import embed_passages, encoder_for

from embedding_finetune.command_line import UserError
from embedding_finetune.data.texts import raw_digests
from embedding_finetune.retrieval import encoder as encoding
from embedding_finetune.retrieval.store import EmbeddingStore

TEXTS = [f"{passage_about(topic)} {number}" for number in range(3) for topic in TOPICS]


def test_a_second_run_encodes_nothing_and_gives_the_same_bits(tiny_bert, tmp_path, encoded):
    flags = ("--embeddings_dir", str(tmp_path / "store"))
    first = embed_passages(encoder_for(tiny_bert, *flags), TEXTS)
    assert encoded == TEXTS
    assert np.array_equal(embed_passages(encoder_for(tiny_bert, *flags), TEXTS), first)
    assert encoded == TEXTS
    assert np.array_equal(embed_passages(encoder_for(tiny_bert), TEXTS), first)


def test_only_new_texts_are_encoded_in_whatever_order_the_others_come(tiny_bert, tmp_path, encoded, monkeypatch):
    flags = ("--embeddings_dir", str(tmp_path / "store"))
    embed_passages(encoder_for(tiny_bert, *flags), TEXTS)
    encoded.clear()
    monkeypatch.setattr(encoding, "TEXTS_PER_BLOCK", 7)
    changed = [*TEXTS[::-2], "a new text", TEXTS[0] + "!", *TEXTS[5:9]]
    again = embed_passages(encoder_for(tiny_bert, *flags), changed)
    assert encoded == ["a new text", TEXTS[0] + "!"]
    assert np.array_equal(again, embed_passages(encoder_for(tiny_bert), changed))


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        place = len(content) - 6 if how == "flipped" else 30  # in an embedding, in a digest
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "digest"])
def test_a_damaged_block_is_noticed_and_made_again(tiny_bert, tmp_path, encoded, caplog, monkeypatch, how):
    monkeypatch.setattr(encoding, "TEXTS_PER_BLOCK", 10)
    flags = ("--embeddings_dir", str(tmp_path / "store"))
    whole = embed_passages(encoder_for(tiny_bert, *flags), TEXTS)
    segments = sorted((tmp_path / "store").rglob("*.segment"))
    assert len(segments) == 3
    damage(segments[1], how)
    encoded.clear()
    assert np.array_equal(embed_passages(encoder_for(tiny_bert, *flags), TEXTS), whole)
    assert len(encoded) == 10
    assert "damaged; its texts are encoded again" in caplog.text
    encoded.clear()
    assert np.array_equal(embed_passages(encoder_for(tiny_bert, *flags), TEXTS), whole)
    assert encoded == []


VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)


def get_and_put(folder, start):
    for step in range(20):
        store = EmbeddingStore(folder, {"weights": "x"}, dimensions=8)
        embeddings, found = store.get(TEXTS)
        assert np.array_equal(embeddings[found], VECTORS[found])
        part = slice((start + step) % 20, (start + step) % 20 + 10)
        store.keep(raw_digests(TEXTS[part]), VECTORS[part])


def test_processes_on_the_same_folder_do_not_disturb_each_other(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(get_and_put, [(tmp_path, start) for start in range(4)])
    embeddings, found = EmbeddingStore(tmp_path, {"weights": "x"}, dimensions=8).get(TEXTS)
    assert np.array_equal(embeddings[found], VECTORS[found])
    assert found.sum() == 29


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--embeddings_dir .*cannot be written"):
        EmbeddingStore(tmp_path / "file", {}, dimensions=8)


KILLED = """
import os, signal, sys
sys.path.insert(0, {repository!r})
import mine_hard_neg
from embedding_finetune.retrieval import encoder as encoding, store
encoding.TEXTS_PER_BLOCK = 5
keep, blocks = store.EmbeddingStore.keep, []
def keep_and_die(self, digests, embeddings):
    blocks.append(len(digests))
    path = keep(self, digests, embeddings)
    if len(blocks) == {dies_after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return path
store.EmbeddingStore.keep = keep_and_die
mine_hard_neg.main(sys.argv[1:])
print(sum(blocks))
"""


def test_a_killed_run_goes_on_with_the_first_block_that_is_not_there(tiny_bert, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"query": f"my {t}", "pos": [t]} for t in TEXTS])
    arguments = ["--model_name_or_path", tiny_bert, "--input_file", rows, "--range_for_sampling", "0-9"]

    def run(name, *, dies_after=0, store=True):
        program = KILLED.format(repository=str(REPOSITORY), dies_after=dies_after)
        command = [sys.executable, "-c", program, *arguments, "--output_file", tmp_path / name]
        command += ["--embeddings_dir", tmp_path / "store"] if store else []
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})

    assert run("out.jsonl", dies_after=9).returncode == -signal.SIGKILL  # 6 blocks of queries, 3 of passages
    assert not (tmp_path / "out.jsonl").exists()
    resumed = run("out.jsonl")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == "15\n"
    assert "30 of 30 query texts were in --embeddings_dir" in resumed.stderr
    assert "15 of 30 passage texts were in --embeddings_dir" in resumed.stderr
    assert run("fresh.jsonl", store=False).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()


def test_a_scratch_store_never_speaks_of_a_flag_that_nobody_gave(tmp_path, caplog):
    store = EmbeddingStore(tmp_path, {"weights": "a"}, dimensions=2, is_scratch=True)
    store.keep(raw_digests(["x"]), np.ones((1, 2), np.float32))
    (path,) = store.folder.glob("*.segment")
    path.write_bytes(path.read_bytes()[:-1])
    store.refresh()
    assert f"warning: TMPDIR: {path} is damaged" in caplog.text
    path.mkdir()
    for _ in range(2):  # on a full disk it is of no use, and does no harm
        store.keep(raw_digests(["x"]), np.ones((1, 2), np.float32))
    assert caplog.text.count("embeddings are not kept") == 1
    assert "warning: TMPDIR: " in caplog.text
    assert "embeddings_dir" not in caplog.text
    assert store.get(["x"])[1].tolist() == [False]


def test_a_query_with_two_instructions_is_two_embeddings_of_which_each_is_found_again(tiny_bert, tmp_path, encoded):
    flags = ("--query_instruction_for_retrieval", "how: ", "--embeddings_dir", str(tmp_path / "store"))
    queries, instructions = ["reset the pump"] * 4, [None, "open: ", "", "red light "]
    plain = encoder_for(tiny_bert).encode_queries(
        [f"{own}reset the pump" for own in ("how: ", "open: ", "", "red light ")]
    )
    for asked in ([0], [1, 0], [3, 2, 1, 0], [2, 2]):
        encoder = encoder_for(tiny_bert, *flags)
        again = encoder.encode_queries([queries[n] for n in asked], [instructions[n] for n in asked])
        assert np.array_equal(again, plain[asked])
    assert encoded[4:] == ["reset the pump"] * 4  # each one once
