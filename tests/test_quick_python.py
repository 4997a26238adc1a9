"""The tests' own quick Python ends, and is started, as any other is."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers.quick_python import quick_python

TELL = """
import os, sys, tempfile
print(sys.argv, os.getcwd(), os.environ.get("NAME"), tempfile.gettempdir(), __name__, input())
print("an error", file=sys.stderr)
"""


def run(python, *arguments, **options):
    result = subprocess.run([*python, *arguments], capture_output=True, text=True, check=False, **options)
    return result.returncode, result.stdout, result.stderr


def test_a_program_finds_its_arguments_folder_environment_and_files(tmp_path):
    (tmp_path / "program.py").write_text(TELL)
    options = {"cwd": tmp_path, "env": {"NAME": "a name", "TMPDIR": str(tmp_path)}, "input": "a line\n"}
    for arguments in (["program.py", "--flag", "x y"], ["-c", TELL, "-c"], ["-m", "program", "z"]):
        status, told, error = run(quick_python(), *arguments, **options)
        assert (status, told, error) == run([sys.executable], *arguments, **options)
        assert told


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit('said')",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.kill(os.getpid(), 15)",
        "import os; os._exit(7)",
        "import atexit; atexit.register(print, 'at the end'); 1 / 0",
        "import sys; sys.stdout.write('without an end of line')",
        "import math; print(math.nan); x",
    ],
)
def test_a_program_ends_as_it_would(program):
    status, told, error = run(quick_python(), "-c", program)
    assert (status, told) == run([sys.executable], "-c", program)[:2]
    assert error.splitlines()[-1:] == run([sys.executable], "-c", program)[2].splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_process_reaches_the_program(number):
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([*quick_python(), "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.stdout.read() == b""  # until the program has closed it too
    assert process.returncode == -number
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_closed_stdout_is_none():
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *quick_python(), "-c", "import sys; sys.exit(sys.stdout is not None)"]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("sent", [b"", b"{", json.dumps({"files": [], "length": 50}).encode().ljust(64) + b"{"])
def test_a_client_that_is_killed_while_it_starts_leaves_the_server_to_others(sent):
    command = quick_python()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"\0{command[command.index('run') + 1]}")
        client.sendall(sent)
    assert run(command, "-c", "print(1)")[:2] == (0, "1\n")
