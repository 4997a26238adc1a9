"""Files that appear whole or not at all; outputs that are inputs; paths that nothing can be written to."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers.data import REPOSITORY, read_jsonl, write_jsonl
from helpers.running import argv_of, evaluation

import evaluate
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.data import jsonl, records
from embedding_finetune.files import (
    atomic_writer,
    is_model_file,
    require_apart,
    require_data,
    require_folder,
    require_outside_models,
    require_writable,
)

PYTHON = sys.executable


def test_a_gzip_output_has_the_same_bytes_every_time(tmp_path):
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    for path in (first, second):
        jsonl.write(path, [{"query": "q", "pos": ["p"]}])
    assert first.read_bytes() == second.read_bytes()
    assert list(records.read_training_rows(first)) == [{"query": "q", "pos": ["p"]}]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")

    def records():
        yield {"a": 1}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        jsonl.write(path, records())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_kill_9_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    program = f"""
import time
from embedding_finetune.data import formats, jsonl, records
def records():
    for number in range(10**9):
        if number == 50_000:
            print("written", flush=True)
        yield {{"number": number}}
jsonl.write({str(path)!r}, records())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"


def test_output_through_a_symbolic_link_keeps_the_link(tmp_path):
    (tmp_path / "real.jsonl").write_text("old")
    link = tmp_path / "link.jsonl"
    link.symlink_to("real.jsonl")
    jsonl.write(link, [{"a": 1}])
    assert link.is_symlink()
    assert json.loads((tmp_path / "real.jsonl").read_text()) == {"a": 1}


def test_a_path_too_long_for_a_file_name_is_told_before_anything_is_done(tmp_path):
    long = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match=r"--output_file: .* too long"):
        require_writable("--output_file", long)
    with pytest.raises(UserError, match=r"--output_dir .* too long"):
        require_folder("--output_dir", long)


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    require_writable("--output_file", path)
    with atomic_writer(path) as file:
        file.write(b"rows")
    assert path.read_bytes() == b"rows"
    assert os.listdir(tmp_path) == [path.name]


def test_a_disk_that_is_full_at_the_last_moment_leaves_no_file(tmp_path):
    """What does not fit is often told by close() alone, after every write() was taken."""
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    program = f"""
import resource
from embedding_finetune import command_line, files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
@command_line.command
def main():
    with files.atomic_writer({str(path)!r}) as file:
        file.write(b"x" * 1001)
main()
"""
    result = subprocess.run([PYTHON, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"__main__: error: {path}: cannot be written: File too large\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]
    assert path.read_text() == "old"


def test_two_runs_with_the_same_process_number_share_a_folder_of_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with atomic_writer(tmp_path / "settings.json") as one, atomic_writer(tmp_path / "settings.json") as other:
        one.write(json.dumps({"of": "one"}).encode())
        other.write(json.dumps({"of": "other"}).encode())
    assert json.loads((tmp_path / "settings.json").read_text()) in ({"of": "one"}, {"of": "other"})
    assert os.listdir(tmp_path) == ["settings.json"]


SPELLINGS = {
    "the same": "{folder}/pairs.jsonl",
    "relative": "pairs.jsonl",
    "with dots": "{folder}/sub/../pairs.jsonl",
    "a symbolic link": "link.jsonl",
    "a hard link": "hard.jsonl",
    "through a linked folder": "linked_folder/pairs.jsonl",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("flag", ["report_file", "candidate_pool"])
def test_no_output_of_mining_may_be_an_input(pairs, tmp_path, monkeypatch, capsys, spelling, flag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to("pairs.jsonl")
    os.link(pairs, tmp_path / "hard.jsonl")
    (tmp_path / "linked_folder").symlink_to(tmp_path)
    path = spelling.format(folder=tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(pairs))
    flags = {"model_name_or_path": "no/such-model", "input_file": pairs, "output_file": "out.jsonl", flag: path}
    if flag == "candidate_pool":
        flags |= {"input_file": rows, "output_file": pairs}
    before = pairs.read_bytes()
    with pytest.raises(SystemExit) as stop:
        mine_hard_neg.main(argv_of(**flags))
    assert stop.value.code == 2
    assert "and would replace it; give another one" in capsys.readouterr().err.splitlines()[-1]
    assert pairs.read_bytes() == before


@pytest.mark.parametrize(("one", "other"), [("new.json", "./new.json"), ("new.json", "New.json"), ("old", "old")])
def test_two_outputs_may_not_be_one_file(tmp_path, monkeypatch, one, other):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").touch()
    with pytest.raises(UserError, match=r"--report_file .* is also the file of --output_file"):
        require_apart({}, {"--output_file": one, "--report_file": other, "--embeddings_dir": None})
    require_apart({"--input_file": "old"}, {"--output_file": "Old", "--report_file": "new.json"})


def test_no_output_lies_in_a_folder_of_data(tmp_path):
    folder, link = tmp_path / "data", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for place in (folder, link):
        with pytest.raises(
            UserError, match=r"^--output_file .* is in the folder of --input_file, whose files are data"
        ):
            require_apart({"--input_file": str(folder)}, {"--output_file": str(place / "new.jsonl")})
    require_apart({"--input_file": str(folder)}, {"--output_file": str(folder / "sub" / "new.jsonl")})
    require_apart({"--input_file": str(folder)}, {"--output_file": str(tmp_path / "new.jsonl")})


def test_rows_of_a_folder_are_not_written_into_it(pairs, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    pairs.rename(folder / "a.jsonl")
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(SystemExit) as stop:
            mine_hard_neg.main(argv_of(model_name_or_path="no/model", input_file=folder, output_file=folder / name))
        assert stop.value.code == 2
        assert "is in the folder of --input_file" in capsys.readouterr().err


def test_the_output_of_mining_may_be_its_input(tiny_bert, pairs):
    before = len(read_jsonl(pairs))
    flags = {"model_name_or_path": tiny_bert, "range_for_sampling": "0-5", "negative_number": 2}
    mine_hard_neg.main(argv_of(input_file=pairs, output_file=pairs, **flags))
    assert [len(row["neg"]) for row in read_jsonl(pairs)] == [2] * before


def test_evaluation_does_not_replace_what_it_reads(tiny_bert, candidates, pairs, tmp_path, capsys):
    queries = pairs.rename(tmp_path / "per_query.jsonl")
    before = queries.read_bytes()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*evaluation(tiny_bert, candidates, queries), "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "per_query.jsonl" in capsys.readouterr().err
    assert queries.read_bytes() == before


def test_mining_does_not_replace_a_file_of_the_model(tiny_bert, pairs, tmp_path, capsys):
    config = shutil.copytree(tiny_bert, tmp_path / "bert") / "config.json"
    before = config.read_bytes()
    for flag in ("output_file", "report_file"):
        flags = {"model_name_or_path": config.parent, "input_file": pairs, "output_file": tmp_path / "out.jsonl"}
        with pytest.raises(SystemExit) as stop:
            mine_hard_neg.main(argv_of(**flags | {flag: config}))
        assert stop.value.code == 2
        assert f"--{flag} {config} is a file of the model" in capsys.readouterr().err
    assert config.read_bytes() == before


def test_what_is_no_file_is_not_replaced_by_one():
    with pytest.raises(UserError, match=r"/dev/null is not a regular file, and would be replaced by one"):
        require_writable("--report_file", "/dev/null")


@pytest.mark.parametrize("name", ["train.json", "notes.txt", "my_model.safetensors", "report.html", "metrics.json"])
def test_other_files_are_not_taken_for_a_models(name):
    assert not is_model_file(name)


def test_a_path_that_cannot_be_used_is_told_with_its_flag_and_why(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    refusals = [
        (require_data, tmp_path / "no", f"--flag: {tmp_path}/no does not exist"),
        (require_writable, tmp_path, f"--flag: {tmp_path} is a folder; give a file name"),
        (require_writable, tmp_path / "no" / "a", f"--flag: the folder {tmp_path}/no does not exist; create it first"),
        (require_folder, file, f"--flag {file}: {file} is a file; give a folder"),
        (require_folder, file / "a" / "b", f"--flag {file}/a/b: {file} is a file; give a folder"),
    ]
    for require, path, line in refusals:
        with pytest.raises(UserError) as refusal:
            require("--flag", path)
        assert str(refusal.value) == line
    require_data("--flag", file)
    require_data("--flag", tmp_path)
    require_writable("--flag", tmp_path / "new")
    require_folder("--flag", tmp_path / "many" / "new" / "folders")
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(UserError, match=f"--flag: the folder {tmp_path} is not writable"):
        require_writable("--flag", tmp_path / "new")
    with pytest.raises(UserError, match=f"--flag {tmp_path}/new/folder: {tmp_path} is not writable"):
        require_folder("--flag", tmp_path / "new" / "folder")
    require_folder("--flag", tmp_path, may_be_read_only=True)
    with pytest.raises(UserError, match=f"--flag {tmp_path}/new: {tmp_path} is not writable"):
        require_folder("--flag", tmp_path / "new", may_be_read_only=True)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.X_OK)
    with pytest.raises(UserError, match=f"--flag {tmp_path}: {tmp_path} cannot be read"):
        require_folder("--flag", tmp_path, may_be_read_only=True)


def test_only_files_of_a_models_own_that_are_there_are_kept_from_being_replaced(tmp_path):
    model, notes = tmp_path / "model", tmp_path / "model" / "notes.jsonl"
    model.mkdir()
    (model / "config.json").touch()
    notes.touch()
    (tmp_path / "config.json").touch()
    free = {"--a": notes, "--b": tmp_path / "config.json", "--c": model / "modules.json", "--d": None}
    require_outside_models(free, [str(model), "a/hub-name", None])
    with pytest.raises(UserError, match=f"^--e {model}/config.json is a file of the model and would be replaced"):
        require_outside_models({**free, "--e": model / "config.json"}, [str(model)])


@pytest.mark.parametrize(
    "name",
    """config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model.bin
    adapter_model.safetensors adapter_config.json modules.json sentence_bert_config.json tokenizer.json vocab.txt
    sentencepiece.bpe.model training_queries.npy training_run.json""".split(),
)
def test_files_of_a_model_are_known_by_their_names(name):
    assert is_model_file(name)
