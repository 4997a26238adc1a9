"""How runs end: broken pipes, full disks, odd encodings, outputs that are inputs, two runs at once."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.data import REPOSITORY, read_jsonl, write_jsonl

import evaluate
import mine_hard_neg
from embedding_finetune import command_line
from embedding_finetune.command_line import UserError
from embedding_finetune.files import atomic_writer, require_apart, require_folder, require_writable

PYTHON = sys.executable


def argv_of(**flags):
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def run(script, argv, **options):
    return subprocess.run([PYTHON, REPOSITORY / script, *map(str, argv)], capture_output=True, check=False, **options)


def evaluation(model, candidates, pairs):
    return argv_of(model_name=model, index_file_jsonl_path=candidates, query_file_jsonl_path=pairs)


@pytest.mark.parametrize("script", ["mine_hard_neg.py", "evaluate.py"])
def test_help_into_a_closed_pipe_ends_as_the_shell_says_it(script):
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([PYTHON, REPOSITORY / script, "--help"], stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_results_into_a_closed_pipe_are_no_failed_check(tiny_bert, candidates, pairs):
    read, write = os.pipe()
    os.close(read)
    command = [PYTHON, REPOSITORY / "evaluate.py", *evaluation(tiny_bert, candidates, pairs)]
    with subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_stdout_that_takes_no_more_is_told_in_one_line():
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [PYTHON, REPOSITORY / "evaluate.py", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert b"No space left on device" in result.stderr


def test_results_of_models_with_accents_reach_an_ascii_stdout(tiny_bert, candidates, pairs, tmp_path):
    (tmp_path / "modèle").symlink_to(tiny_bert)
    other = [*evaluation(tmp_path / "modèle", candidates, pairs)]
    other[2:2] = [str(tiny_bert)]
    result = run("evaluate.py", other, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert b"mod\\xe8le" in result.stdout
    assert result.stdout.isascii()


def test_stdout_is_given_back_as_it_was(tmp_path, capfd, monkeypatch):
    with open(tmp_path / "out.txt", "w", encoding="ascii", errors="strict") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        command_line.command(lambda: print("é"))()
        assert stdout.errors == "strict"
    assert (tmp_path / "out.txt").read_text() == "\\xe9\n"


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


def test_a_model_in_a_deep_folder_gets_a_run_file(tiny_bert, candidates, pairs, tmp_path):
    deep = tmp_path
    for number in range(6):
        deep = deep / (f"{number}" * 100)
    deep.parent.mkdir(parents=True)
    deep.symlink_to(tiny_bert)
    evaluate.main([*evaluation(deep, candidates, pairs), "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").glob("run.*")] == [f"run.{'5' * 50}.trec"]


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


def test_a_full_temporary_folder_is_told_in_one_line(tiny_bert, pairs, tmp_path):
    program = f"""
import resource
import mine_hard_neg
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
mine_hard_neg.main({argv_of(model_name_or_path=tiny_bert, input_file=pairs, output_file=tmp_path / "out.jsonl")!r})
"""
    result = subprocess.run([PYTHON, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]


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


def test_what_is_no_file_is_not_replaced_by_one():
    with pytest.raises(UserError, match=r"/dev/null is not a regular file, and would be replaced by one"):
        require_writable("--report_file", "/dev/null")


def test_two_runs_with_the_same_process_number_share_a_folder_of_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with atomic_writer(tmp_path / "settings.json") as one, atomic_writer(tmp_path / "settings.json") as other:
        one.write(json.dumps({"of": "one"}).encode())
        other.write(json.dumps({"of": "other"}).encode())
    assert json.loads((tmp_path / "settings.json").read_text()) in ({"of": "one"}, {"of": "other"})
    assert os.listdir(tmp_path) == ["settings.json"]


def test_windows_is_told_what_it_cannot_do(monkeypatch, capsys):
    monkeypatch.setattr(command_line.os, "name", "nt")
    with pytest.raises(SystemExit) as stop:
        command_line.command(lambda: None)()
    monkeypatch.undo()
    assert stop.value.code == 2
    assert "Linux and macOS only" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"OMP_NUM_THREADS": ""}, {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "many"}, {"OMP_NUM_THREADS": "2,1"}],
    ids=str,
)
def test_odd_numbers_of_threads_change_no_measure(tiny_bert, candidates, pairs, environment):
    argv = [*evaluation(tiny_bert, candidates, pairs), "--dtype", "float32"]
    expected = run("evaluate.py", argv, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = run("evaluate.py", argv, env={**os.environ, **environment})
    assert (result.returncode, result.stdout) == (0, expected.stdout), result.stderr


@pytest.mark.slow
def test_a_home_that_cannot_be_written_and_few_open_files_are_enough(tiny_bert, candidates, pairs, tmp_path):
    home = tmp_path / "home"
    home.touch()  # not even a folder: no cache can be made in it
    program = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
import finetune, mine_hard_neg, evaluate
model, mined, tuned = {str(tiny_bert)!r}, {str(tmp_path / "mined.jsonl")!r}, {str(tmp_path / "tuned")!r}
mine_hard_neg.main(["--model_name_or_path", model, "--input_file", {str(pairs)!r}, "--output_file", mined,
                    "--range_for_sampling", "0-5", "--embeddings_dir", {str(tmp_path / "embeddings")!r}])
finetune.main(["--model_name_or_path", model, "--train_data", mined, "--output_dir", tuned, "--max_steps", "1"])
evaluate.main(["--model_name", tuned, *{evaluation(tiny_bert, candidates, pairs)[2:]!r}])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HOME", "XDG"))}
    result = subprocess.run(
        [PYTHON, "-c", program],
        cwd=REPOSITORY,
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_scratch_outlives_a_worker_and_goes_with_its_owner(tmp_path):
    """From Python 3.13 on, a forked worker forgets its owner's exit functions, which took a folder's object along."""
    program = """
import multiprocessing, os
from embedding_finetune.command_line import scratch_folder
folder = scratch_folder()
worker = multiprocessing.get_context("fork").Process(target=print)
worker.start()
worker.join()
assert os.path.isdir(folder)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([PYTHON, "-c", program], cwd=REPOSITORY, env=environment, check=True)
    assert os.listdir(tmp_path) == []


def test_a_signal_that_python_drops_ends_the_run_all_the_same_and_lets_it_clean_up():
    """As in the hooks of a fork, or where an object is deleted."""
    program = """
import os, signal, sys, time
from embedding_finetune import command_line

class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

@command_line.command
def main():
    Dropping()
    try:
        time.sleep(60)
    finally:
        time.sleep(2.5)
        print("cleaned up")

main()
"""
    result = subprocess.run([PYTHON, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (143, "cleaned up\n"), result.stderr
    assert result.stderr.endswith(": terminated\n")
    assert "Traceback" not in result.stderr


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


def test_a_closed_stdout_is_no_failed_check(tiny_bert, candidates, pairs):
    command = [PYTHON, str(REPOSITORY / "evaluate.py"), *evaluation(tiny_bert, candidates, pairs)]
    result = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
