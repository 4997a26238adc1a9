"""Size of report.html for 10,000 queries, and how long Chromium takes to open it.

    python benchmarks/report_page.py

Queries and passages are those of make_debian.py. The ranks are drawn at random, two thirds of them 1, so that a
third of the queries have passages to show. It needs chromium and chromedriver, like the tests of the page.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import new_parser, records


def main() -> None:
    parser = new_parser(__doc__, data=True)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    from helpers import browser

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        began = time.perf_counter()
        page.write_text(report(args.data, args.queries, args.depth), encoding="utf-8")
        print(f"{args.queries} queries, {args.depth} ranks, 2 models: written in {time.perf_counter() - began:.1f} s")
        seconds = []
        with browser.open_browser() as driver:
            for _ in range(args.rounds):
                began = time.perf_counter()
                driver.get(page.as_uri())  # returns when the page has loaded, its script included
                seconds.append(time.perf_counter() - began)
                rows = driver.execute_script("return document.querySelectorAll('#queries tbody tr').length")
        size = page.stat().st_size / 1e6
    print(f"{size:.2f} MB, opens in {statistics.median(seconds):.2f} s ({max(seconds):.2f} at most), {rows} rows drawn")


def report(data: Path, count: int, depth: int) -> str:
    import evaluate
    from embedding_finetune.data.corpus import Corpus
    from embedding_finetune.data.task import RetrievalTask
    from embedding_finetune.evaluation.page import html_report
    from embedding_finetune.evaluation.ranking import values_per_query
    from embedding_finetune.evaluation.summary import summarize
    from embedding_finetune.retrieval.top_k import Ranking

    rows = [row for _, row in zip(range(count), records(data, "train"))]
    corpus = Corpus(record["text"] for record in records(data, "pool"))
    answers = [corpus.positions(row["pos"]) for row in rows]
    task = RetrievalTask(
        [row["query"] for row in rows],
        corpus,
        [dict.fromkeys(positions.tolist(), 1) for positions in answers],
        [f"{number:05d}" for number in range(count)],
        [None] * count,
    )
    rng = np.random.default_rng(0)
    rankings = {}
    for name in ("base", "tuned"):
        positions = np.array([rng.choice(len(corpus), depth, replace=False) for _ in rows])
        ranks = np.where(rng.random(count) < 2 / 3, 0, rng.integers(0, 2 * depth, count))
        inside = np.flatnonzero(ranks < depth)
        positions[inside, ranks[inside]] = [answers[row][0] for row in inside]
        scores = np.linspace(0.9, 0.5, depth, dtype=np.float32)[None].repeat(count, axis=0)
        rankings[name] = Ranking(positions, scores)
    args = evaluate.parse_arguments(
        ["--model_name", *rankings, "--index_file_jsonl_path", __file__, "--query_file_jsonl_path", __file__]
    )
    values = {name: values_per_query(ranking, task, args.measures, args.cutoffs) for name, ranking in rankings.items()}
    return html_report(summarize(values, task, args, weights_digests={}, trained_queries={}), task, rankings)


if __name__ == "__main__":
    main()
