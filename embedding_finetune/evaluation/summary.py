"""The outcome of an evaluation: one document for programs, and tables, as text, for people.

Shapes: Q queries.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from embedding_finetune import __version__
from embedding_finetune.data.corpus import RetrievalTask
from embedding_finetune.data.jsonl import Record
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.metrics import compare, means


def summarize(
    values: Mapping[str, Mapping[str, np.ndarray]],
    task: RetrievalTask,
    options: EvaluationOptions,
    weights: Mapping[str, str],
    seen: Mapping[str, int],
) -> Record:
    """The whole outcome as one JSON document: what metrics.json holds.

    values: model -> measure -> (Q,). weights: model -> digest. seen: model -> how many queries it was trained on.
    """
    base = options.model_name[0]
    groups = sorted({group for group in task.groups if group is not None})
    members = {group: [number for number, own in enumerate(task.groups) if own == group] for group in groups}
    return {
        "metrics": {name: means(scores) for name, scores in values.items()},
        "differences": {
            name: {
                measure: compare(values[base][measure], scores, seed=options.seed)._asdict()
                for measure, scores in values[name].items()
            }
            for name in options.model_name[1:]
        },
        "groups": {
            group: {
                "queries": len(rows),
                "metrics": {
                    name: means({measure: scores[rows] for measure, scores in own.items()})
                    for name, own in values.items()
                },
            }
            for group, rows in members.items()
        },
        "queries": len(task.queries),
        "passages": len(task.corpus),
        "duplicate_passages": task.corpus.duplicates,
        "positives_not_in_corpus": task.missing,
        "queries_without_findable_positive": task.unanswerable,
        "queries_in_training_data": dict(seen),
        "weights_sha256": dict(weights),
        "version": __version__,
        "settings": {name: value for name, value in vars(options).items() if name != "model_name"},
    }


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
