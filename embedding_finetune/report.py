"""What the runs tell people: tables and accounts, as text."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from embedding_finetune.jsonl import Record
from embedding_finetune.mining import Selection
from embedding_finetune.retrieval import TopK

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def evaluation_tables(document: Record) -> str:
    """Models by measures; every other model's differences to the first; measures by group of queries."""
    metrics = document["metrics"]
    names, measures = list(metrics), list(next(iter(metrics.values())))
    parts = [table([["model", *measures], *([name, *_scores(metrics[name])] for name in names)])]
    for name, differences in document["differences"].items():
        rows = [[f"{name} - {names[0]}", "difference", "95% interval", "p"]]
        for measure, d in differences.items():
            rows.append([measure, f"{d['mean']:+.4f}", f"{d['low']:+.4f} .. {d['high']:+.4f}", f"{d['p_value']:.4f}"])
        parts.append(table(rows))
    if document["groups"]:
        rows = [["group", "queries", "model", *measures]]
        for group, outcome in document["groups"].items():
            for name in names:
                rows.append([group, str(outcome["queries"]), name, *_scores(outcome["metrics"][name])])
        parts.append(table(rows))
    return "\n\n".join(parts)


def _scores(metrics: Mapping[str, float]) -> list[str]:
    return [f"{value:.4f}" for value in metrics.values()]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, the first one underlined; first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def quantiles(scores: np.ndarray) -> dict[str, float]:
    """`{"p05": ..., "p25": ..., "p50": ..., "p75": ..., "p95": ...}`, empty when there are no scores."""
    if not len(scores):
        return {}
    return {f"p{int(100 * q):02d}": float(value) for q, value in zip(QUANTILES, np.quantile(scores, QUANTILES))}


def quantile_line(scores: np.ndarray) -> str:
    """The quantiles of scores in one readable line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in quantiles(scores).items()) or "none"


def mining_account(selections: Sequence[Selection], wanted: int, ranking: TopK, positive_scores: np.ndarray) -> str:
    """What mining did: rows, negatives, random fills, shortfalls, drops by reason, score quantiles."""
    dropped: Counter[str] = Counter()
    negative_scores: list[float] = []
    for selection, positions, scores in zip(selections, ranking.positions, ranking.scores):
        dropped.update(selection.dropped)
        score_of = dict(zip(positions.tolist(), scores.tolist()))
        negative_scores += [score_of[p] for p in selection.negatives if p in score_of]
    short = sum(len(selection.negatives) < wanted for selection in selections)
    rows = [
        ("rows", len(selections)),
        ("negatives", sum(len(selection.negatives) for selection in selections)),
        ("of them drawn at random", sum(selection.random_fills for selection in selections)),
        (f"rows with fewer than {wanted}", short),
        *((f"left out: {reason}", count) for reason, count in sorted(dropped.items())),
        ("scores of positives", quantile_line(positive_scores)),
        ("scores of negatives in range", quantile_line(np.array(negative_scores))),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    if short:
        lines.append(
            f"warning: {short} rows have fewer than {wanted} negatives: too few candidates are outside the "
            "retrieved ranks; lower --range_for_sampling or give a larger --candidate_pool"
        )
    return "\n".join(lines)
