"""What evaluate.py takes beside encoding and search for many queries: seconds of each stage, and peak memory.

    python benchmarks/evaluation_scale.py
    python benchmarks/evaluation_scale.py --measures MRR Hit Recall nDCG MAP Precision
    python benchmarks/evaluation_scale.py --queries 10000 --passages 10000 --ranks 50

Passages are 75 made-up words, about 100 tokens. A query has one right passage or two, and one of five groups. All of
evaluate.py runs, in a process of its own, with --thresholds and --output_dir, for two models. Only their encoder and
the search are replaced: rankings are made up. A right passage is put at rank 1 for 60 and 70% of the queries, by
model, and other right ones at ranks spread by logarithm, from 1 to beyond the last. The peak is VmHWM of the whole
process, with its imports.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from common import new_parser

WORDS_IN_PASSAGE, WORDS_IN_QUERY = 75, 10
RIGHT_AT_ONCE = {"base": 0.6, "tuned": 0.7}
"""By model, the share of queries that have a right passage put at rank 1. Other ranks are spread by logarithm."""
MADE_UP = "made-up rankings, not counted"
_MEASURED = "import sys; sys.path.insert(0, {folder!r}); import evaluation_scale; evaluation_scale.run({flags!r})"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=100, help="the last cutoff (default: 100)")
    parser.add_argument("--measures", nargs="+", default=["MRR", "Hit"])
    parser.add_argument("--folder", type=Path, help="keep data and results there (default: a temporary folder)")
    args = parser.parse_args()
    if args.passages < 4 * args.ranks + 2:
        parser.error("--passages: must be more than four times --ranks")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        write_data(folder, args)
        flags = ["--model_name", *(str(folder / name) for name in RIGHT_AT_ONCE), "--thresholds"]
        flags += ["--index_file_jsonl_path", str(folder / "passages.jsonl")]
        flags += ["--query_file_jsonl_path", str(folder / "queries.jsonl"), "--output_dir", str(folder / "results")]
        flags += ["--measures", *args.measures, "--cutoffs"]
        flags += [str(cutoff) for cutoff in sorted({1, 5, 10, args.ranks}) if cutoff <= args.ranks]
        program = _MEASURED.format(folder=str(Path(__file__).parent), flags=flags)
        print(f"{args.queries} queries, {args.passages} passages, {args.ranks} ranks, {args.measures}", flush=True)
        subprocess.run([sys.executable, "-c", program], check=True)


def write_data(folder: Path, args: argparse.Namespace) -> None:
    """Write passages, queries, and for each model a folder with nothing but a record of training queries."""
    from embedding_finetune.model.training_queries import write_training_queries

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 12))) for _ in range(20_000)])

    def text(count: int) -> str:
        return " ".join(words[rng.integers(0, len(words), count)].tolist())

    for name in RIGHT_AT_ONCE:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text("{}")
        write_training_queries(folder / name, rng.integers(0, 2**63, args.queries))
    passages = [f"{number} {text(WORDS_IN_PASSAGE)}." for number in range(args.passages)]
    with (folder / "passages.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": passage}) + "\n" for passage in passages)
    with (folder / "queries.jsonl").open("w") as file:
        for number, first in enumerate(rng.integers(0, len(passages), args.queries).tolist()):
            pos = [passages[first], passages[(first + 1) % len(passages)]][: 1 + number % 2]
            row = {"id": f"question-{number}", "query": f"{text(WORDS_IN_QUERY)}?", "pos": pos}
            file.write(json.dumps({**row, "group": f"topic {number % 5}"}) + "\n")


def made_up_ranking(relevant: list[dict[int, int]], count: int, ranks: int, right_at_once: float, seed: int) -> Any:
    """A Ranking of distinct passages, the right ones at ranks that are drawn.

    count: passages. The row of a query steps through them, so that it meets its first right one at the rank drawn for
    it. Neighbours, as the right passages of a query are, are never both met: a step is 2 at least, and a row is too
    short to come around.
    """
    from embedding_finetune.retrieval.top_k import Ranking

    rng = np.random.default_rng(seed)
    queries = len(relevant)
    first = np.array([min(answers) for answers in relevant])
    place = np.floor((2 * ranks) ** rng.random((2, queries))).astype(np.int64) - 1  # (2, queries), from 0
    place[0, rng.random(queries) < right_at_once] = 0
    place[1] += place[0] == place[1]
    steps = rng.integers(2, max(3, (count - 2) // (2 * ranks)), queries)
    positions = (first[:, None] + (np.arange(ranks) - place[0][:, None]) * steps[:, None]) % count
    second = np.array([max(answers) for answers in relevant])
    rows = np.flatnonzero((second != first) & (place[1] < ranks))
    positions[rows, place[1][rows]] = second[rows]
    scores = rng.standard_exponential((queries, ranks), dtype=np.float32)
    np.cumsum(scores, axis=1, out=scores)
    scores *= np.float32(-0.002)
    scores += (rng.normal(0.7, 0.08, queries) + 0.06 * (place[0] == 0)).astype(np.float32)[:, None]
    return Ranking(positions, scores)


def run(flags: list[str]) -> None:
    """Run evaluate.py in this process with made-up rankings, and print what each stage took."""
    stages = Stages()
    with stages.stage("imports"):
        import evaluate
        from embedding_finetune.data.task import RetrievalTask
        from embedding_finetune.evaluation import files, ranking, rankings, summary, thresholds

    def rank_corpus(encoder: Any, task: RetrievalTask, top_k: int, **_: object) -> Any:
        name = Path(encoder.weights_digest).name
        seed = list(RIGHT_AT_ONCE).index(name)
        return made_up_ranking(task.relevant, len(task.corpus), top_k, RIGHT_AT_ONCE[name], seed)

    rankings.is_routed = lambda *_, **__: False
    rankings.load_encoder = lambda name, *_, **__: SimpleNamespace(
        weights_digest=name, passages=SimpleNamespace(index_digest=name)
    )
    rankings.rank_corpus = rank_corpus
    stages.watch(rankings, "rank_corpus", MADE_UP)
    stages.watch(evaluate, "read_corpus", "read passages")
    stages.watch(evaluate, "load_task", "read queries")
    stages.watch(ranking, "values_per_query", "measures")
    stages.watch(thresholds, "all_thresholds", "thresholds")
    stages.watch(summary, "summarize", "summary, comparison of the models")
    stages.watch(summary, "evaluation_tables", "tables")
    stages.watch(files, "write", "")
    stages.watch(files, "write_lines", "")
    stages.watch(files, "html_report", "report.html")
    with redirect_stdout(io.StringIO()):
        evaluate.main(flags)
    stages.tell()


class Stages:
    """Seconds and CPU seconds of functions that follow one another, and the process's peak memory after each."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)
        self.used: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the block takes for a stage."""
        began, used = time.monotonic(), time.process_time()
        yield
        self.seconds[name] += time.monotonic() - began
        self.used[name] += time.process_time() - used
        self.peaks[name] = peak_memory_here()

    def watch(self, module: ModuleType, function: str, name: str) -> None:
        """Count all calls of a module's function for a stage, by default that of the file that it writes."""
        original: Callable[..., Any] = getattr(module, function)

        def watched(*args: Any, **options: Any) -> Any:
            with self.stage(name or args[0].name):
                return original(*args, **options)

        setattr(module, function, watched)

    def tell(self) -> None:
        """Print a table of all stages, with what is left for others, and the sum without the made-up rankings."""
        seconds, used = time.monotonic() - self.began, time.process_time()
        rest = (seconds - sum(self.seconds.values()), used - sum(self.used.values()))
        print("| | s | CPU s | peak MiB |\n|---|---|---|---|")
        for name, peak in self.peaks.items():
            print(f"| {name} | {self.seconds[name]:.1f} | {self.used[name]:.1f} | {peak} |")
        print(f"| all else | {rest[0]:.1f} | {rest[1]:.1f} | {peak_memory_here()} |")
        seconds, used = seconds - self.seconds[MADE_UP], used - self.used[MADE_UP]
        print(f"| sum | {seconds:.1f} | {used:.1f} | {peak_memory_here()} |")


def peak_memory_here() -> int:
    """VmHWM of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


if __name__ == "__main__":
    main()
