"""What a kill -9 costs with --embeddings_dir: runs that encode are killed at random moments, and what is kept counted.

    python benchmarks/kill_encoding.py --kills 10

Each run encodes the same passages into a folder of its own. The last one is not killed: it tells what keeping takes.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time

from common import REPOSITORY, new_parser, passages

_PYTHON = [sys.executable]
_RUN = """
import json, sys, time
sys.path[:0] = [{repository!r}, {repository!r} + "/tests"]
from helpers.running import embed_passages, encoder_for
from embedding_finetune.retrieval import store, token_encoder
put, keep, seconds, kept = token_encoder._put, store.EmbeddingStore.keep, [0.0], []
def telling_put(embeddings, rows, *rest):
    put(embeddings, rows, *rest)
    print(json.dumps([time.monotonic(), len(rows)]), flush=True)
def timed_keep(self, *what):
    began = time.monotonic()
    path = keep(self, *what)
    kept.append(time.monotonic() - began)
    return path
token_encoder._put, store.EmbeddingStore.keep = telling_put, timed_keep
texts = json.load(open(sys.argv[1]))
encoder = encoder_for(sys.argv[2], "--embeddings_dir", sys.argv[3])
began = time.monotonic()
print(json.dumps([began, 0]), flush=True)
embed_passages(encoder, texts)
print(json.dumps([time.monotonic() - began, kept]))
"""
_COUNT = """
import json, sys
sys.path[:0] = [{repository!r}, {repository!r} + "/tests"]
from helpers.running import encoder_for
store = encoder_for(sys.argv[2], "--embeddings_dir", sys.argv[3]).passages.stores["passage"]
print(store.get(json.load(open(sys.argv[1])))[1].sum(), len(list(store.folder.glob("*.segment"))))
"""


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=12, help="kill within so long after encoding began")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/texts.json", "w", encoding="utf-8") as file:
            json.dump(list(dict.fromkeys(passages(args.data, args.texts))), file)
        print("killed after  encoded  kept  segments  lost: texts  seconds")
        for number in range(args.kills):
            store = f"{folder}/store{number}"
            after = (number + draw.random()) * args.seconds / args.kills  # early and late ones, as many of each
            came, at = killed_run(args.model, folder, store, after=after)
            found, segments = map(int, run_of(_COUNT, args.model, folder, store).stdout.read().split())
            done, last_kept = 0, came[0][0]
            for moment, count in came:
                done += count
                if done <= found:
                    last_kept = moment
            lost = max(done - found, 0)
            seconds = at - last_kept if lost else 0
            print(f"{at - came[0][0]:10.1f} s {done:8} {found:5} {segments:9} {lost:12} {seconds:8.1f}", flush=True)
        *_, last = run_of(_RUN, args.model, folder, f"{folder}/whole").stdout
        seconds, kept = json.loads(last)
        print(f"not killed: {seconds:.1f} s, of which {sum(kept):.3f} s in keeping {len(kept)} times")


def run_of(program: str, model: str, folder: str, store: str) -> "subprocess.Popen[str]":
    command = [*_PYTHON, "-c", program.format(repository=str(REPOSITORY)), f"{folder}/texts.json", model, store]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def killed_run(model: str, folder: str, store: str, *, after: float) -> tuple[list[list[float]], float]:
    """When each batch came and how many texts it had, the first of none; and when the run was killed."""
    run = run_of(_RUN, model, folder, store)
    began = json.loads(run.stdout.readline())
    time.sleep(max(began[0] + after - time.monotonic(), 0))
    at = time.monotonic()
    run.send_signal(signal.SIGKILL)
    came = [began, *(json.loads(line) for line in run.stdout.read().splitlines(keepends=True) if line.endswith("\n"))]
    run.wait()
    return [row for row in came if isinstance(row[1], int)], at


if __name__ == "__main__":
    main()
