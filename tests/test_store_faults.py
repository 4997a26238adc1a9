"""--embeddings_dir under what befalls a run: kill -9, a full disk, one that cannot be written. One fault at a time."""

import errno
import functools
import os
import random
import signal
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from helpers.data import REPOSITORY, TOPICS, write_jsonl
from helpers.quick_python import quick_python
from helpers.running import argv_of, embed_passages, encoder_for

from embedding_finetune.command_line import UserError

TEXTS = [" ".join(words) + " call the desk" * (len(words[0]) % 4) for words in product(TOPICS, TOPICS, TOPICS[:3])]

RUN = """
import sys
sys.path.insert(0, {repository!r})
import mine_hard_neg
from embedding_finetune.retrieval import block_keeper
block_keeper.SECONDS_BETWEEN_KEEPING = 0
mine_hard_neg.main(sys.argv[1:])
"""
SLOW = """
import sys, time
sys.path[:0] = [{repository!r}, {repository!r} + "/tests"]
from helpers.running import embed_passages, encoder_for
from test_store_faults import TEXTS
from embedding_finetune.retrieval import block_keeper, token_encoder
block_keeper.SECONDS_BETWEEN_KEEPING = 0.2
put = token_encoder._put
def slow_put(embeddings, rows, *rest):
    time.sleep(0.02)
    put(embeddings, rows, *rest)
    print(len(rows), flush=True)
token_encoder._put = slow_put
embed_passages(encoder_for(sys.argv[1], "--embeddings_dir", sys.argv[2], "--tokens_per_batch", "1"), TEXTS)
"""


@functools.cache
def why_no_mounts():
    """Why a process cannot have mounts of its own; "" where it can."""
    try:
        tried = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True
        )
    except OSError as error:
        return f"unshare: {error.strerror}"
    return tried.stderr.strip()


def run_with(mount, *argv):
    """Run mine_hard_neg.py where a shell command has mounted something; the mount goes with the process."""
    if why_no_mounts():
        pytest.skip(f"there is no way to mount a disk here: {why_no_mounts()}")
    program = RUN.format(repository=str(REPOSITORY))
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'{mount}; "$@"; status=$?; cd /; [ ! -d "$KEPT" ] || cp -r "$DISK"/. "$KEPT"; exit $status',
    ]
    return subprocess.run([*command, "sh", sys.executable, "-c", program, *argv], capture_output=True, text=True)


@pytest.fixture
def mining(tiny_bert, tmp_path):
    """The flags of a run that mines for 5 queries among TEXTS."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"query": f"unit {n}", "pos": [TEXTS[n]]} for n in range(5)])
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"text": text} for text in TEXTS])
    return argv_of(
        model_name_or_path=tiny_bert,
        input_file=rows,
        candidate_pool=pool,
        output_file=tmp_path / "out.jsonl",
        range_for_sampling="0-30",
        negative_number=2,
        embeddings_dir=tmp_path / "store",
        dtype="float32",
        tokens_per_batch=1000,
    )


def passages_kept(model, store):
    """Which of TEXTS a run would find, each with the right embedding; and what it would say of the store."""
    encoder = encoder_for(model, "--embeddings_dir", str(store), "--dtype", "float32")
    embeddings, found = encoder.passages.stores["passage"].get(TEXTS)
    right = embed_passages(encoder_for(model, "--dtype", "float32"), TEXTS)
    assert np.array_equal(embeddings[found], right[found])
    return int(found.sum())


@pytest.mark.slow
def test_a_disk_that_gets_full_ends_the_run_in_one_line_and_keeps_what_it_holds(
    tiny_bert, mining, tmp_path, caplog, monkeypatch
):
    store, kept = tmp_path / "store", tmp_path / "kept"
    store.mkdir()
    kept.mkdir()
    monkeypatch.setenv("KEPT", str(kept))
    monkeypatch.setenv("DISK", str(store))
    # All embeddings are 300 * (32 * 4 + 16) = 43,200 bytes.
    full = run_with(f"mount -t tmpfs -o size=40k none {store}", *mining)
    assert full.returncode == 2, full.stderr
    line = full.stderr.splitlines()[-1]
    assert line.startswith("mine_hard_neg.py: error: --embeddings_dir: ")
    assert line.endswith("cannot be written: No space left on device")
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "out.jsonl").exists()
    assert list(kept.rglob("*.tmp")) == []
    count = passages_kept(tiny_bert, kept)
    assert 50 < count < 300
    assert caplog.text == ""
    mining[mining.index(str(store))] = str(kept)
    again = run_with("true", *mining)
    assert again.returncode == 0, again.stderr
    assert f"{count} of 300 passage texts were in --embeddings_dir" in again.stderr
    assert passages_kept(tiny_bert, kept) == 300


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_is_read_and_told_once(tiny_bert, mining, tmp_path):
    store = tmp_path / "store"
    embed_passages(encoder_for(tiny_bert, "--embeddings_dir", str(store), "--dtype", "float32"), TEXTS[:200])
    before = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    read_only = f"mount --bind {store} {store} && mount -o remount,bind,ro {store}"
    result = run_with(read_only, *mining)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("warning: --embeddings_dir")] == [
        f"warning: --embeddings_dir {store}: cannot be written (Read-only file system): what is there is read, "
        "nothing new is kept"
    ]
    assert "200 of 300 passage texts were in --embeddings_dir" in result.stderr
    assert result.stderr.count("MB in 3 files") == 1  # settings.json, model.txt and a segment
    assert sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*")) == before
    # A model that was never used there finds nothing, and says the same.
    result = run_with(read_only, *mining, "--passage_max_len", "9")
    assert result.returncode == 0, result.stderr
    assert "0 of 300 passage texts were in --embeddings_dir" in result.stderr


@pytest.mark.slow
def test_where_only_the_folder_of_the_model_cannot_be_written_the_warning_names_that(tiny_bert, mining, tmp_path):
    store = tmp_path / "store"
    embed_passages(encoder_for(tiny_bert, "--embeddings_dir", str(store), "--dtype", "float32"), TEXTS[:200])
    (folder,) = store.iterdir()
    result = run_with(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}", *mining)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("warning: --embeddings_dir")] == [
        f"warning: --embeddings_dir {folder}: cannot be written (Read-only file system): what is there is read, "
        "nothing new is kept"
    ]
    assert "200 of 300 passage texts were in --embeddings_dir" in result.stderr


def test_a_folder_that_cannot_be_made_on_such_a_disk_is_one_line(mining, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mining[mining.index(str(tmp_path / "store"))] = str(disk / "store")
    result = run_with(f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}", *mining)
    assert result.returncode == 2
    assert result.stderr.endswith(f"error: --embeddings_dir {disk}/store: {disk} is not writable\n")


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_loses_one_interval_and_one_batch_at_most(tiny_bert, tmp_path):
    """A batch is a text here and takes 0.02 s or more, and an interval is 0.2 s: 10 texts, and the one in the works."""
    draw, before = random.Random(5), 0
    command = [*quick_python(), "-c", SLOW.format(repository=str(REPOSITORY)), str(tiny_bert), str(tmp_path)]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
            encoded = sum(int(run.stdout.readline()) for _ in range(draw.randint(15, 80)))
            run.send_signal(signal.SIGKILL)
            encoded += sum(int(line) for line in run.stdout.read().split())
        encoder = encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path))
        now = int(encoder.passages.stores["passage"].get(TEXTS)[1].sum())
        assert before + encoded - 11 <= now <= before + encoded + 1
        before = now
    last = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sum(map(int, last.stdout.split())) == 300 - before
    embeddings, found = encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path)).passages.stores["passage"].get(TEXTS)
    assert found.all()
    assert np.array_equal(embeddings, embed_passages(encoder_for(tiny_bert), TEXTS))
    assert list(tmp_path.rglob("*.segment")) != []


def test_a_folder_that_cannot_be_created_is_refused_before_a_model_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--embeddings_dir .*/file/store: cannot be created: Not a directory"):
        encoder_for(tmp_path / "no model", "--embeddings_dir", str(tmp_path / "file" / "store"))


def test_a_folder_that_cannot_be_listed_is_an_error(tiny_bert, tmp_path, monkeypatch):
    embed_passages(encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path)), TEXTS[:3])

    def scandir(path):  # root may list all folders
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"--embeddings_dir: .* cannot be listed: Permission denied"):
        encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path))
