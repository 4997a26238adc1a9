import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.data import REPOSITORY, TOPICS, passage_about, write_jsonl
from helpers.quick_python import quick_python
from helpers.running import embed_passages, encoder_for, evaluation

import evaluate
from embedding_finetune.command_line import UserError
from embedding_finetune.data.texts import raw_digests
from embedding_finetune.retrieval import store as module
from embedding_finetune.retrieval import tower as towers
from embedding_finetune.retrieval.store import EmbeddingStore, tell_size

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
    monkeypatch.setattr(towers, "TEXTS_PER_BLOCK", 7)
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
    monkeypatch.setattr(towers, "TEXTS_PER_BLOCK", 10)
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


def store_in(folder, **named):
    return EmbeddingStore(folder, {"weights": "x"}, dimensions=8, **named)


def keep(store, numbers):
    return store.keep(raw_digests([TEXTS[number] for number in numbers]), VECTORS[numbers])


def found_in(store):
    """The numbers of the texts that a store gives, each with its embedding."""
    embeddings, found = store.get(TEXTS)
    assert np.array_equal(embeddings[found], VECTORS[found])
    return np.flatnonzero(found).tolist()


def get_and_keep(folder, start):
    for step in range(20):
        store = store_in(folder)
        found_in(store)
        keep(store, list(range((start + step) % 20, (start + step) % 20 + 10)))
        keep(store, [start, start + 5])
        store.tidy()
        found_in(store)


@pytest.mark.parametrize("most_small", [32, 1])
def test_processes_on_the_same_folder_do_not_disturb_each_other(tmp_path, monkeypatch, most_small):
    monkeypatch.setattr(module, "MOST_SMALL", most_small)  # with 1 all four merge all the time
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(get_and_keep, [(tmp_path, start) for start in range(4)])
    assert found_in(store_in(tmp_path)) == list(range(29))


def test_many_small_segments_are_merged_and_the_next_run_finds_all(tmp_path, caplog):
    store = store_in(tmp_path)
    for number in range(30):
        keep(store, [number])
    keep(store, [0, 1])
    keep(store, [2, 3])
    store.tidy()
    assert len(list(store.folder.glob("*.segment"))) == 32
    keep(store, [4, 5])
    store.tidy()
    assert len(list(store.folder.glob("*.segment"))) == 1
    assert found_in(store) == []  # it looks for what others wrote when a pass begins
    store.refresh()
    assert found_in(store) == found_in(store_in(tmp_path)) == list(range(30))
    assert caplog.text == ""


def test_queries_that_come_one_at_a_time_leave_few_segments(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_SMALL", 5)
    encoder = encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path))
    for text in TEXTS:
        encoder.encode_queries([text])
        assert len(list(tmp_path.rglob("*.segment"))) <= 5
    fresh = encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path))
    assert fresh.queries.stores["query"].get(TEXTS)[1].all()


def test_what_another_process_merged_meanwhile_is_found_where_it_is_now(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "MOST_SMALL", 1)
    writer = store_in(tmp_path)
    for number in range(10):
        keep(writer, [number])
    reader = store_in(tmp_path)
    writer.tidy()
    assert len(list(writer.folder.glob("*.segment"))) == 1
    assert found_in(reader) == list(range(10))
    for path in writer.folder.glob("*.segment"):  # and what a person removed is encoded again
        path.unlink()
    assert found_in(reader) == []
    assert caplog.text == ""


def test_a_segment_that_goes_while_the_folder_is_listed_is_looked_for_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "MOST_SMALL", 1)
    writer, read = store_in(tmp_path), module.read_digests
    for number in range(10):
        keep(writer, [number])

    def merging_meanwhile(path, dimensions):
        writer.tidy()
        return read(path, dimensions)

    monkeypatch.setattr(module, "read_digests", merging_meanwhile)
    assert found_in(store_in(tmp_path)) == list(range(10))
    assert caplog.text == ""


def test_a_segment_that_is_cut_short_after_it_was_checked_is_left_out(tmp_path, caplog):
    writer = store_in(tmp_path)
    cut, whole = keep(writer, [0, 1, 2]), keep(writer, [3, 4])
    reader = store_in(tmp_path)
    assert found_in(reader) == [0, 1, 2, 3, 4]
    cut.write_bytes(cut.read_bytes()[:-5])
    assert found_in(reader) == [3, 4]
    assert caplog.text.count("is damaged") == 1
    assert not cut.exists()
    assert whole.exists()


def test_a_segment_that_cannot_be_read_is_told_once_and_stays(tmp_path, caplog, monkeypatch):
    """It may be another user's, or a disk that comes back."""
    writer, read = store_in(tmp_path), module.read_digests
    unreadable = keep(writer, [0, 1])
    keep(writer, [2])

    def failing(path, dimensions):
        if path == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, dimensions)

    monkeypatch.setattr(module, "read_digests", failing)
    reader = store_in(tmp_path)
    assert found_in(reader) == [2]
    reader.refresh()
    assert caplog.messages == [
        f"warning: --embeddings_dir: {unreadable} cannot be read (Input/output error); its texts are encoded again"
    ]
    assert unreadable.exists()
    keep(reader, [0, 1])  # the same file, written anew
    monkeypatch.undo()
    reader.refresh()
    assert found_in(reader) == [0, 1, 2]


def test_a_damaged_segment_that_cannot_be_removed_is_told_once_and_left_out(tmp_path, caplog, monkeypatch):
    writer, other = store_in(tmp_path), store_in(tmp_path)
    path = keep(writer, [0, 1])
    keep(writer, [2])
    path.write_bytes(path.read_bytes()[:-5])

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    writer.refresh()
    writer.refresh()
    assert found_in(writer) == [2]
    assert caplog.text.count("is damaged") == 1
    keep(other, [0, 1])  # until another process writes it anew
    writer.refresh()
    assert found_in(writer) == [0, 1, 2]
    assert caplog.text.count("is damaged") == 1


@pytest.mark.parametrize(
    ("look", "how"), [(EmbeddingStore.refresh, "truncated"), (found_in, "flipped"), (EmbeddingStore.tidy, "flipped")]
)
def test_a_damaged_segment_that_another_process_writes_anew_meanwhile_stays(tmp_path, monkeypatch, look, how):
    monkeypatch.setattr(module, "MOST_SMALL", 1)
    other, leave_out = store_in(tmp_path), EmbeddingStore._leave_out
    path = keep(other, [0, 1])
    keep(other, [2])
    reader = store_in(tmp_path)
    damage(path, how)
    os.utime(path, (0, 0))  # the new file may get the inode of the removed one: then the time alone tells them apart

    def writing_meanwhile(*arguments):
        path.unlink()
        keep(other, [0, 1])
        leave_out(*arguments)

    monkeypatch.setattr(EmbeddingStore, "_leave_out", writing_meanwhile)
    look(reader)
    monkeypatch.undo()
    assert path.exists()
    reader.refresh()
    assert found_in(reader) == [0, 1, 2]


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path):
    folder = store_in(tmp_path).folder
    names = [".00112233445566aa.tmp", ".00112233445566bb.tmp", ".mine.tmp", "00112233445566aa.tmp"]
    for name in names:
        (folder / name).write_bytes(b"half a segment")
    for name in names[::2]:
        os.utime(folder / name, (time.time() - 25 * 3600,) * 2)
    os.utime(folder / names[1], (time.time() - 23 * 3600,) * 2)
    store_in(tmp_path)
    assert {path.name for path in folder.iterdir()} == {*names[1:], "settings.json"}


def test_a_store_tells_which_model_used_it_last_and_when(tiny_bert, tmp_path, encoded):
    store, copy = tmp_path / "store", tmp_path / "copy"
    shutil.copytree(tiny_bert, copy)
    for folder in (tiny_bert, copy):
        encoder = encoder_for(folder, "--embeddings_dir", str(store), "--dtype", "float32")
        embed_passages(encoder, TEXTS[:3])
        for settings in store.glob("*/settings.json"):
            assert time.time() - settings.stat().st_mtime < 1000
            os.utime(settings, (0, 0))
            assert (settings.parent / "model.txt").read_text() == f"{folder}, float32\n"
    assert encoded == TEXTS[:3]
    assert len(list(store.iterdir())) == 1  # queries and passages are encoded alike


def test_the_size_that_is_told_is_that_of_all_files(tmp_path, caplog):
    (tmp_path / "of_a_model").mkdir()
    (tmp_path / "of_a_model" / "one").write_bytes(b"x" * 1_200_000)
    (tmp_path / "two").write_bytes(b"x" * 50_000)
    with caplog.at_level("INFO"):
        tell_size(tmp_path)
        tell_size(None)
        tell_size(tmp_path / "not made")
    assert caplog.messages == [f"--embeddings_dir {tmp_path} holds 1.2 MB in 2 files"]


def test_a_run_over_two_models_says_it_once_after_the_last(tiny_bert, other_bert, candidates, pairs, tmp_path, caplog):
    argv = evaluation(tiny_bert, candidates, pairs)
    argv[2:2] = [str(other_bert)]
    evaluate.main([*argv, "--embeddings_dir", str(tmp_path / "store")])
    ours = [line for line in caplog.messages if "passage texts were in --embeddings_dir" in line or " MB in " in line]
    assert len(ours) == 3
    # of each model settings.json, model.txt, and a segment of queries and one of passages, which are encoded alike
    assert re.fullmatch(r"--embeddings_dir \S+/store holds 0\.0 MB in 8 files", ours[2])


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--embeddings_dir .*cannot be written"):
        EmbeddingStore(tmp_path / "file", {}, dimensions=8)


def test_a_file_of_the_users_that_ends_like_a_segment_stays(tmp_path):
    store = store_in(tmp_path)
    (store.folder / "video.segment").write_bytes(b"precious")
    os.mkfifo(store.folder / f"{'a' * 32}.segment")
    store.refresh()
    assert not store.get(TEXTS)[1].any()
    assert (store.folder / "video.segment").read_bytes() == b"precious"


def test_a_segment_from_the_folder_of_another_model_is_not_read_and_stays(tmp_path, caplog):
    one, other = (EmbeddingStore(tmp_path, {"weights": name}, dimensions=8) for name in "xy")
    path = keep(one, [0, 1])
    copy = Path(shutil.copy(path, other.folder))
    other.refresh()
    assert not other.get(TEXTS)[1].any()
    assert f"{copy} was written for another folder; its texts are encoded again" in caplog.text
    assert copy.read_bytes() == path.read_bytes()  # it may have been moved, and be the only one
    one.refresh()
    assert one.get(TEXTS)[1].sum() == 2


KILLED = """
import os, signal, sys
sys.path.insert(0, {repository!r})
import mine_hard_neg
from embedding_finetune.retrieval import store, tower
tower.TEXTS_PER_BLOCK = 5
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
        command = [*quick_python(), "-c", program, *arguments, "--output_file", tmp_path / name]
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
