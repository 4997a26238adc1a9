"""How runs end: broken pipes, full disks, odd encodings, outputs that are inputs, two runs at once."""

import os
import subprocess
import sys
import tempfile

import pytest
from helpers.data import REPOSITORY
from helpers.quick_python import quick_python
from helpers.running import argv_of, evaluation

import evaluate
from embedding_finetune import command_line

PYTHON = sys.executable


def run(script, argv, **options):
    return subprocess.run([PYTHON, REPOSITORY / script, *map(str, argv)], capture_output=True, check=False, **options)


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
    command = [*quick_python(), REPOSITORY / "evaluate.py", *evaluation(tiny_bert, candidates, pairs)]
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


def test_windows_is_told_what_it_cannot_do(monkeypatch, capsys):
    monkeypatch.setattr(command_line.os, "name", "nt")
    with pytest.raises(SystemExit) as stop:
        command_line.command(lambda: None)()
    monkeypatch.undo()
    assert stop.value.code == 2
    assert "Linux and macOS only" in capsys.readouterr().err


@pytest.mark.slow
def test_odd_numbers_of_threads_change_no_measure(tiny_bert, candidates, pairs):
    argv = [*evaluation(tiny_bert, candidates, pairs), "--dtype", "float32"]
    expected = run("evaluate.py", argv, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for threads in ("0", "many", "2,1"):
        result = run("evaluate.py", argv, env={**os.environ, "OMP_NUM_THREADS": threads})
        assert (result.returncode, result.stdout) == (0, expected.stdout), (threads, result.stderr)


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
import evaluate
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


def test_a_closed_stdout_is_no_failed_check(tiny_bert, candidates, pairs):
    command = [*quick_python(), str(REPOSITORY / "evaluate.py"), *evaluation(tiny_bert, candidates, pairs)]
    result = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_machine_without_room_for_temporary_files_is_told_in_one_line(
    tiny_bert, candidates, pairs, monkeypatch, capsys
):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", nowhere)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(word) for word in evaluation(tiny_bert, candidates, pairs)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("evaluate.py: error: TMPDIR: nothing can be written")
