"""Seconds for all six measures of 100,000 queries with rankings of 100 passages.

python benchmarks/metrics_speed.py
"""

import statistics
import time

import numpy as np
from common import new_parser

from embedding_finetune.evaluation.metrics import MEASURES, judged_of, per_query, relevance_of

QUERIES, RANKS, PASSAGES = 100_000, 100, 1_000_000


def main() -> None:
    new_parser(__doc__).parse_args()
    rng = np.random.default_rng(0)
    positions = rng.integers(0, PASSAGES, (QUERIES, RANKS))
    ranked_answers = positions[np.arange(QUERIES), rng.integers(0, RANKS, QUERIES)]
    relevant = [{int(one): 1, int(other): 1} for one, other in zip(ranked_answers, rng.integers(0, PASSAGES, QUERIES))]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        relevance = relevance_of(positions, relevant)
        per_query(relevance, judged_of(relevant), list(MEASURES), [1, 5, 10, 100])
        seconds.append(time.perf_counter() - began)
    print(f"{QUERIES} queries, {RANKS} ranks: {statistics.median(seconds):.2f} s (median of {len(seconds)})")


if __name__ == "__main__":
    main()
