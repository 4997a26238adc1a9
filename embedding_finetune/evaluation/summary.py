"""What evaluate.py tells people: tables, as text."""

from collections.abc import Mapping, Sequence

from embedding_finetune.data.jsonl import Record


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
