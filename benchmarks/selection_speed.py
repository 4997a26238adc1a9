"""Queries per second of choosing negatives, once the candidates are ranked.

    python benchmarks/selection_speed.py

20,000 queries with 210 ranks in a pool of 100,000, a relative margin, 15 negatives from the ranks 10-210.
"""

import statistics
import time

import numpy as np
from common import new_parser


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--pool", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    from embedding_finetune.data.corpus import Corpus
    from embedding_finetune.mining.arguments import SelectionOptions
    from embedding_finetune.mining.candidates import Candidates, Pairs
    from embedding_finetune.mining.selection import choose_negatives
    from embedding_finetune.mining.stopwatch import Stopwatch

    options = SelectionOptions(relative_margin=0.05)
    start, stop = options.range_for_sampling
    rng = np.random.default_rng(0)
    corpus = Corpus(f"text {number}" for number in range(args.pool))
    rows = [{"query": f"query {number}", "pos": [f"text {number}"]} for number in range(args.queries)]
    ranking = np.stack([rng.choice(args.pool, stop, replace=False) for _ in rows])
    scores = np.sort(rng.random((len(rows), stop - start), dtype=np.float32), axis=1)[:, ::-1]
    positive_scores = np.full(len(rows), 0.9, dtype=np.float32)
    near_duplicates = np.empty((0, 2), dtype=np.int64)

    def score(pairs: Pairs) -> np.ndarray:
        return np.zeros(len(pairs.rows), dtype=np.float32)

    candidates = Candidates(ranking, scores, positive_scores, near_duplicates, score, {}, {})
    rates = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        choose_negatives(rows, corpus, candidates, positive_scores, options, Stopwatch())
        rates.append(len(rows) / (time.perf_counter() - began))
    print(f"{statistics.median(rates):.0f} queries/s ({min(rates):.0f} - {max(rates):.0f})")


if __name__ == "__main__":
    main()
