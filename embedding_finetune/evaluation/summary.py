"""The results of an evaluation: one document for programs, and text tables for people.

Shapes: Q queries.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from embedding_finetune import __version__
from embedding_finetune.data.hold_out import what_is_new
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.metrics import compare, holm, means


def summarize(
    values: Mapping[str, Mapping[str, np.ndarray]],
    task: RetrievalTask,
    options: EvaluationOptions,
    weights_digests: Mapping[str, str],
    trained_queries: Mapping[str, int],
) -> Record:
    """All results as one JSON document, the content of metrics.json.

    values: model -> measure -> (Q,). weights_digests: by model. trained_queries: model -> how many of the queries it
    was trained on.
    """
    base = options.base
    members: dict[str, list[int]] = {
        group: [] for group in sorted({group for group in task.groups if group is not None})
    }
    for number, group in enumerate(task.groups):
        if group is not None:
            members[group].append(number)
    return {
        "base": base,
        "judged": None,
        "thresholds": None,
        "sizes": {},
        "index_unchanged": {},
        "precision": None,
        "metrics": {name: means(scores) for name, scores in values.items()},
        "differences": {
            name: compared(values[base], values[name], seed=options.seed) for name in options.model_name if name != base
        },
        "groups": {
            group: {
                "queries": len(numbers),
                "metrics": {
                    name: means({measure: scores[numbers] for measure, scores in by_measure.items()})
                    for name, by_measure in values.items()
                },
            }
            for group, numbers in members.items()
        },
        "queries": len(task.queries),
        "held_out_by": task.held_out_by,
        "passages": len(task.corpus),
        "duplicate_passages": task.corpus.duplicates,
        "positives_not_in_corpus": task.missing,
        "queries_without_findable_positive": task.unanswerable,
        "queries_in_training_data": dict(trained_queries),
        "weights_sha256": dict(weights_digests),
        "version": __version__,
        "settings": {name: value for name, value in vars(options).items() if name != "model_name"},
    }


def compared(base: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], *, seed: int) -> Record:
    """Measure -> how much better the other model is; p_holm is the p-value corrected for the number of measures.

    Measures that are the same for every query, as MRR@1 and Hit@1 are, count as one.
    """
    found = {measure: compare(base[measure], scores, seed=seed) for measure, scores in other.items()}
    same_as = {measure: (base[measure].tobytes(), scores.tobytes()) for measure, scores in other.items()}
    distinct = {key: found[measure].p_value for measure, key in reversed(same_as.items())}
    corrected = dict(zip(distinct, holm(list(distinct.values()))))
    return {name: {**found[name]._asdict(), "p_holm": corrected[key]} for name, key in same_as.items()}


def evaluation_tables(document: Record) -> str:
    """Text tables: measures by model, the differences of other models to the base, measures by group of queries.

    Before them stands what the queries are, where finetune.py held them out.
    """
    metrics = document["metrics"]
    names, measures = list(metrics), list(next(iter(metrics.values())))
    by = document["held_out_by"]
    parts = [] if by is None else [f"{document['queries']} queries, held out by {by}: {what_is_new(by)}"]
    parts += [table([["model", *measures], *([name, *_scores(metrics[name])] for name in names)])]
    if document["index_unchanged"]:
        parts.append("\n".join(index_lines(document)))
    if document["judged"]:
        parts.append(table(judged_rows(document["judged"])))
    for name, differences in document["differences"].items():
        rows = [[f"{name} - {document['base']}", "difference", "95% interval", "p"]]
        rows += [[measure, *difference_cells(difference)] for measure, difference in differences.items()]
        parts.append(table(rows))
    parts += threshold_tables(document["thresholds"])
    parts += [table([size_head(name, records), *size_rows(records)]) for name, records in document["sizes"].items()]
    if document["groups"]:
        rows = [["group", "queries", "model", *measures]]
        for group, outcome in document["groups"].items():
            for name in names:
                rows.append([group, str(outcome["queries"]), name, *_scores(outcome["metrics"][name])])
        parts.append(table(rows))
    return "\n\n".join(parts)


def index_lines(document: Record) -> list[str]:
    """A line for each model that embeds passages as the first one does."""
    return [
        f"{name} searches the index of {first}: passages have the same embeddings"
        for name, first in document["index_unchanged"].items()
    ]


def judged_rows(judged: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A table of the share of each model's first passages that are judged or labelled."""
    head = ["judged or labelled", *next(iter(judged.values()))]
    return [head, *([name, *(f"{share:.1%}" for share in shares.values())] for name, shares in judged.items())]


def threshold_tables(thresholds: Record | None) -> list[str]:
    """Where to answer, for each model, and what becomes of the first one's thresholds with the last one's scores."""
    if thresholds is None:
        return []
    found = thresholds["models"].items()
    parts = [table([threshold_head(name, one), *threshold_rows(one)]) for name, one in found]
    return [*parts, "\n".join(moved_lines(thresholds))] if thresholds["moved"] else parts


def threshold_head(name: str, found: Record) -> list[str]:
    """The head of the table of a model's thresholds."""
    head = [f"{name}: first passage right", "answer from", "range", "answered", "range", "right on new questions"]
    return head if found["targets"][0]["refused"] is None else [*head, "refused", "range"]


def threshold_rows(found: Record) -> list[list[str]]:
    """A row for each precision: the score to answer from, the share of questions answered, and what to expect."""
    rows = []
    for target in found["targets"]:
        low, high = (_score(target[f"threshold_{end}"]) for end in ("low", "high"))
        cells = [_score(target["threshold"]), f"{low} .. {high}", f"{target['answered']:.1%}"]
        cells.append(f"{target['answered_low']:.1%} .. {target['answered_high']:.1%}")
        cells.append("" if target["on_new_questions"] is None else f"{target['on_new_questions']:.1%}")
        if target["refused"] is not None:
            cells.append(f"{target['refused']:.1%}")
            cells.append(f"{target['refused_low']:.1%} .. {target['refused_high']:.1%}")
        rows.append([f"{target['precision']:.0%}", *cells])
    return rows


def _score(threshold: float | None) -> str:
    return "never" if threshold is None else f"{threshold:.4f}"


def moved_lines(thresholds: Record) -> list[str]:
    """A line for each threshold of the first model: what it gives with the last one's scores, and what to use."""
    change, lines = thresholds["moved"], []
    for target in change["targets"]:
        now = "answers nothing"
        if target["now"] is not None:
            now = f"answers {target['answered']:.1%}, {target['now']:.1%} of it right,"
        use = "no score does" if target["use"] is None else f"use {target['use']:.4f}"
        lines.append(
            f"{change['from']}'s threshold {target['threshold']:.4f} for {target['precision']:.0%} {now} with "
            f"{change['to']}; {use}"
        )
    return lines


def size_head(name: str, records: Sequence[Record]) -> list[str]:
    """The head of the table of a model's smaller indices."""
    first = records[0]
    return [f"{name}: dimensions", "precision", "bytes", *first["metrics"], "difference", "95% interval"]


def size_rows(records: Sequence[Record]) -> list[list[str]]:
    """A row for each index: what a passage takes, measures, and the difference to the whole one in float32."""
    return [
        [
            str(record["dimensions"]),
            record["precision"],
            f"{record['bytes']:g}",
            *_scores(record["metrics"]),
            *difference_cells({**record["difference"], "p_holm": 1})[:2],
        ]
        for record in records
    ]


def difference_cells(difference: Mapping[str, float]) -> list[str]:
    """A difference, as metrics.json has it, as three cells of a table: mean, 95% interval, corrected p-value."""
    interval = f"{difference['low']:+.4f} .. {difference['high']:+.4f}"
    return [f"{difference['mean']:+.4f}", interval, f"{difference['p_holm']:.4f}"]


def _scores(metrics: Mapping[str, float]) -> list[str]:
    return [f"{value:.4f}" for value in metrics.values()]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text: the first row underlined, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
