"""A stand-in for the hub: a server on this machine that answers what an upload asks, and keeps what it is given."""

import base64
import json
import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def put_into_cache(cache, name, folders):
    """Lay models out as the hub's cache does. folders: commit -> (folder, branch or tag)."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    for commit, (folder, reference) in folders.items():
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs" / reference).parent.mkdir(exist_ok=True)
        (place / "refs" / reference).write_text(commit)


class Hub:
    """calls: `METHOD path` of each request, in order. bodies: what came with the latest request to a path.

    files: path -> content, of the repository after the commits. commits: how many there were. fails: a part of the
    paths of requests that are refused.
    """

    def __init__(self):
        self.calls, self.bodies, self.files, self.commits = [], {}, {".gitattributes": b""}, 0
        self.fails = None
        self.url = None

    def answer(self, method, path, body):
        """Status and JSON."""
        if path == "/api/agent-harnesses":
            return 404, {}  # huggingface_hub asks once in each process; an answer would be kept in the user's cache
        self.calls.append(f"{method} {path}")
        self.bodies[path] = body
        if self.fails is not None and self.fails in path:
            return 403, {"error": "You may not do this"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            return 200, {"url": f"{self.url}/{asked.get('organization') or 'me'}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/branch/" in path:
            return 200, {}
        if "/tree/" in path:
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.files]
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        if "/commit/" in path:
            return 200, self.commit(body)
        return 404, {"error": "not found"}

    def commit(self, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits += 1
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/me/tuned/commit/{'0' * 40}"}


@contextmanager
def running_hub():
    """A Hub whose url answers for the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self.chunk, b""))
            status, document = hub.answer(self.command, re.sub(r"\?.*", "", self.path), body)
            content = json.dumps(document).encode()
            self.send_response(status)
            if "/resolve/" in self.path:
                self.send_header("X-Error-Code", "EntryNotFound")  # it has no files but those in the cache
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def chunk(self):
            size = int(self.rfile.readline(), 16)
            part = self.rfile.read(size)
            self.rfile.readline()
            return part

        do_GET = do_POST = do_HEAD = reply

        def log_message(self, *_):
            """No lines on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
