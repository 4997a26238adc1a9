"""How long evaluate.py takes to write the results of many queries: per_query.jsonl and run.MODEL.trec.

python benchmarks/result_files.py --queries 100000 --ranks 100
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from common import new_parser

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import write
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.files import per_query_records, run_lines, write_lines
from embedding_finetune.retrieval.top_k import Ranking


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=100)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    corpus = Corpus(f"passage {number}" for number in range(10_000))
    answers = rng.integers(0, len(corpus), args.queries)
    task = RetrievalTask(
        queries=[f"question {number}" for number in range(args.queries)],
        corpus=corpus,
        relevant=[{answer: 1} for answer in answers.tolist()],
        ids=[f"{number:06d}" for number in range(args.queries)],
        groups=[None] * args.queries,
    )
    first = rng.integers(0, len(corpus), (args.queries, 1))
    positions = (first + np.arange(args.ranks)) % len(corpus)  # distinct within a query
    scores = np.sort(rng.random(positions.shape, dtype=np.float32))[:, ::-1]
    ranking = Ranking(positions, scores)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        write(Path(folder) / "per_query.jsonl", per_query_records(task, {"model": ranking}))
        print(f"per_query.jsonl  {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        write_lines(Path(folder) / "run.model.trec", run_lines(task, ranking, "model"))
        print(f"run.model.trec   {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
