"""A Python that starts in 50 ms: a fork of a process that has imported torch, transformers and all of the suite.

Started anew these take 4 to 5 s, most of the time of a test that needs a process of its own. Use sys.executable where
the start is what a test is about, or an environment variable that is read while something is imported, as HF_HOME is.

quick_python() begins a command line as sys.executable does. Its process, the client, hands its files, folder,
environment and arguments to the server, which forks. The client passes signals on to the fork and ends as that does;
where the client is killed, so is the fork. What else a process inherits, such as limits and its hash seed, is the
server's: tests/test_distributed.py runs all three scripts with other processes too, started by accelerate.
"""

import contextlib
import gc
import json
import os
import runpy
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import types

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PRELOADED = (
    "faiss datasets peft torch.distributed.launcher.api embedding_finetune.evaluation.rankings "
    "embedding_finetune.evaluation.files embedding_finetune.mining.negatives embedding_finetune.training.trainer "
    "embedding_finetune.training.setup embedding_finetune.training.verdict"
).split()
_HEAD_BYTES, _NUMBER_BYTES = 64, 20
_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_ENVIRONMENT = dict(os.environ)  # before any test changes it

_server: list[tuple[subprocess.Popen[bytes], str]] = []


def quick_python() -> list[str]:
    """The beginning of a command line. The first call starts the server, which ends with this process."""
    if not hasattr(os, "pidfd_open"):  # Linux has it
        return [sys.executable]
    if not _server:
        name = f"quick_python-{secrets.token_hex(8)}"
        command = [sys.executable, __file__, "serve", name]
        # Its stdin ends when this process does, in whatever way.
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_REPOSITORY, env=_ENVIRONMENT
        )
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        _server.append((server, name))
    return [sys.executable, "-S", "-E", __file__, "run", _server[0][1]]


def quick_torchrun(processes: int) -> list[str]:
    """The beginning of a command line that torchrun starts so many processes with; a script's path follows."""
    torchrun = [*quick_python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "--no-python", *quick_python()]


def _run(name: str, argv: list[str]) -> None:
    """The client."""
    files = [number for number in range(3) if _is_open(number)]  # before the socket takes the number of a closed one
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"\0{name}")  # which is no file
        body = json.dumps({"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        head = json.dumps({"files": files, "length": len(body)}).encode().ljust(_HEAD_BYTES)
        socket.send_fds(server, [head], files)
        server.sendall(body)
        pid = int(server.recv(_NUMBER_BYTES))
        for number in _PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(server.recv(_NUMBER_BYTES))
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _is_open(number: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(number)
        return True
    return False


def _serve(name: str) -> None:
    """The server. It returns in the forks alone, which are then as their clients were started."""
    for module in _PRELOADED:
        __import__(module)
    gc.freeze()  # else each fork looks at all that was imported when it ends
    forks: dict[int, socket.socket] = {}  # by their process numbers
    with socket.socket(socket.AF_UNIX) as listening, selectors.DefaultSelector() as selector:
        listening.bind(f"\0{name}")
        listening.listen()
        selector.register(listening, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    os._exit(0)
                if key.fileobj is listening:
                    if _is_fork(listening.accept()[0], selector, forks):
                        return
                elif key.fileobj is forks.get(key.data):  # a client says no more: it was killed
                    os.kill(key.data, signal.SIGKILL)
                    selector.unregister(key.fileobj)
                elif isinstance(key.fileobj, int):
                    selector.unregister(key.fileobj)
                    os.close(key.fileobj)
                    _tell_status(key.data, forks.pop(key.data), selector)


def _is_fork(client: socket.socket, selector: selectors.BaseSelector, forks: dict[int, socket.socket]) -> bool:
    """Fork for a client. Gives True in the fork, which has become what the client asked for."""
    try:
        files, started = _received(client)
    except EOFError:
        client.close()
        return False
    pid = os.fork()
    if pid == 0:
        _become(files, started)
        return True
    for number in files.values():
        os.close(number)
    with contextlib.suppress(OSError):  # it was killed
        client.sendall(str(pid).encode().ljust(_NUMBER_BYTES))
    forks[pid] = client
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
    selector.register(client, selectors.EVENT_READ, pid)
    return False


def _tell_status(pid: int, client: socket.socket, selector: selectors.BaseSelector) -> None:
    """Tell a client how its fork has ended."""
    status = str(os.waitpid(pid, 0)[1]).encode()
    with contextlib.suppress(KeyError, OSError):  # it was killed
        selector.unregister(client)
        client.sendall(status.ljust(_NUMBER_BYTES))
    client.close()


def _received(client: socket.socket) -> tuple[dict[int, int], dict]:
    """The client's number of each of its files with the server's, and the rest of what it sent.

    Raises EOFError where it was killed before it had sent all.
    """
    head, numbers, _, _ = socket.recv_fds(client, _HEAD_BYTES, 3)
    if len(head) < _HEAD_BYTES:
        raise EOFError
    described, body = json.loads(head), b""
    while len(body) < described["length"]:
        part = client.recv(described["length"])
        if not part:
            for number in numbers:
                os.close(number)
            raise EOFError
        body += part
    return dict(zip(described["files"], numbers, strict=True)), json.loads(body)


def _become(files: dict[int, int], started: dict) -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in files:
            os.dup2(files[number], number)
            os.close(files[number])
        else:
            os.close(number)
            setattr(sys, name, None)
    os.chdir(started["folder"])
    os.environ.clear()
    os.environ.update(started["environment"])
    tempfile.tempdir = None  # TMPDIR may be another
    sys.argv = started["argv"]


def _execute() -> None:
    """What sys.argv says, as python does it."""
    first = sys.argv.pop(0) if sys.argv[0] in ("-c", "-m") else None
    if first == "-c":
        program, sys.argv[0] = sys.argv[0], "-c"
        sys.path[0] = ""
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), module.__dict__)
    elif first == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        _run(sys.argv[2], sys.argv[3:])
    sys.path[0] = _REPOSITORY
    _serve(sys.argv[2])
    _execute()
