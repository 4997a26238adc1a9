"""The evaluation as one HTML page that needs no network and no server.

Tables and charts are written here. The table of queries is made in the browser from the JSON of query_table.py, by the
script in report_template.html. Charts are plain SVG, so that they follow the page's light or dark colours. A plotting
library's script alone would take nearly the 5 MB that 10,000 queries may take.

Shapes: Q queries, K ranks.
"""

import math
import re
from collections.abc import Iterator, Mapping
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

from embedding_finetune.data.hold_out import what_is_new
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.markup import COLOURS, table
from embedding_finetune.evaluation.metrics import relevance_of
from embedding_finetune.evaluation.query_table import beyond_all, embedded, query_table
from embedding_finetune.evaluation.summary import difference_cells, index_lines, judged_rows, size_head, size_rows
from embedding_finetune.evaluation.threshold_page import threshold_section
from embedding_finetune.retrieval.top_k import Ranking

_TEMPLATE = Path(__file__).with_name("report_template.html")
_ROUND_RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def html_report(document: Record, task: RetrievalTask, rankings: Mapping[str, Ranking]) -> str:
    """The page for the document of summary.summarize, the task and each model's ranking (at least one model)."""
    depth = min(ranking.positions.shape[1] for ranking in rankings.values())
    ranks = {name: first_ranks(ranking, task, depth) for name, ranking in rankings.items()}
    parts = {
        "title": "Retrieval: " + escape(" and ".join(rankings)),
        "facts": _facts(task, document["precision"]),
        "legend": "".join(f'<li class="m{i % COLOURS}">{escape(name)}</li>' for i, name in enumerate(rankings)),
        "warnings": "".join(f"<li>{escape(text)}</li>" for text in warnings(document)),
        "measures": _measures(document),
        "judged": _judged(document["judged"]),
        "charts": "".join(_chart(measure, document, ranks, depth) for measure in ("MRR", "Hit")),
        "distribution": _distribution(ranks, depth),
        "outcomes": "".join(_outcomes(name, document["base"], ranks) for name in ranks if name != document["base"]),
        "thresholds": threshold_section(document["thresholds"], list(rankings)),
        "sizes": _sizes(document["sizes"]),
        "groups": _groups(document),
        "data": embedded(query_table(task, rankings, ranks, depth, document["base"])),
    }
    # One pass, so that text within a part is never taken for a placeholder.
    return re.sub(r"<!--(\w+)-->", lambda place: parts[place[1]], _TEMPLATE.read_text(encoding="utf-8"))


def _facts(task: RetrievalTask, precision: str | None) -> str:
    by = task.held_out_by
    kind = "" if by is None else f", held out by {by}: {what_is_new(by)}"
    embedded_in = "" if precision is None else f"; embedded in {precision}"
    return escape(f"{len(task.queries):,} queries, {len(task.corpus):,} passages{kind}{embedded_in}")


def first_ranks(ranking: Ranking, task: RetrievalTask, depth: int) -> np.ndarray:
    """The rank, from 1, of each query's best relevant passage, 0 where none is among the first `depth`: (Q,)."""
    relevance = relevance_of(ranking.positions[:, :depth], task.relevant) > 0  # (Q, depth)
    return np.where(relevance.any(axis=1), relevance.argmax(axis=1) + 1, 0)


def warnings(document: Record) -> Iterator[str]:
    """What a reader must know to judge the numbers."""
    for name, count in document["queries_in_training_data"].items():
        if count:
            yield (
                f"{count:,} of {document['queries']:,} queries are in the training data of {name}: "
                "it was trained on their answers, and will do worse on new queries"
            )
    if document["positives_not_in_corpus"]:
        yield (
            f"{document['positives_not_in_corpus']:,} right passages are not in the corpus and cannot be found; "
            f"{document['queries_without_findable_positive']:,} queries have no other and count as misses"
        )


def _measures(document: Record) -> str:
    """A table of one model's measures, or for each further model a table beside the first."""
    metrics, differences = document["metrics"], document["differences"]
    base = document["base"]
    if not differences:
        rows = [[name, _number(value)] for name, value in metrics[base].items()]
        return table(["", base], rows)
    tables = []
    for model, by_measure in differences.items():
        rows = [
            [name, _number(metrics[base][name]), _number(metrics[model][name]), *difference_cells(difference)]
            for name, difference in by_measure.items()
        ]
        tables.append(table(["", base, model, "difference", "95% interval", "p"], rows))
    lines = [f'<p class="soft">{escape(line)}</p>' for line in index_lines(document)]
    return "".join([*tables, *lines])


def _judged(judged: Mapping[str, Mapping[str, float]] | None) -> str:
    if not judged:
        return ""
    told = (
        "The share of each model's first passages that is judged or labelled. Answers that one model alone puts first "
        "were found only there: where shares differ, measures favour the model with the larger one."
    )
    head, *rows = judged_rows(judged)
    return f'<section id="judged">{table(head, rows)}<p class="soft">{told}</p></section>'


def _sizes(sizes: Record) -> str:
    if not sizes:
        return ""
    tables = [table(size_head(name, records), size_rows(records)) for name, records in sizes.items()]
    measure = next(iter(sizes.values()))[0]["measure"]
    told = f"Bytes of a passage. The difference is that of {measure} to float32 with the most dimensions."
    return f'<section id="sizes"><h2>Smaller indices</h2>{"".join(tables)}<p class="soft">{told}</p></section>'


def _groups(document: Record) -> str:
    if not document["groups"]:
        return ""
    measures = list(next(iter(document["metrics"].values())))
    rows = [
        [group, f"{outcome['queries']:,}", model, *(_number(values[name]) for name in measures)]
        for group, outcome in document["groups"].items()
        for model, values in outcome["metrics"].items()
    ]
    return "<section><h2>By group</h2>" + table(["group", "queries", "model", *measures], rows) + "</section>"


def _chart(measure: str, document: Record, ranks: Mapping[str, np.ndarray], depth: int) -> str:
    """MRR or Hit at every cutoff up to `depth`, a line per model, with dots at the cutoffs of metrics.json."""
    width, height, left, bottom = 340, 220, 34, 24

    def x(cutoff: int) -> float:
        return left + (width - left - 10) * (math.log(cutoff) / math.log(depth) if depth > 1 else 0.5)

    def y(value: float) -> float:
        return 10 + (height - bottom - 10) * (1 - value)

    marks = [
        f'<line x1="{left}" x2="{width}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in (0, 0.25, 0.5, 0.75, 1)
    ]
    marks += [
        f'<text x="{x(cutoff):.1f}" y="{height - 6}" text-anchor="middle">{cutoff}</text>'
        for cutoff in _ROUND_RANKS
        if cutoff <= depth
    ]
    cutoffs = np.arange(1, depth + 1)
    for number, (name, model_ranks) in enumerate(ranks.items()):
        share_at_rank = np.bincount(model_ranks, minlength=depth + 1)[1:] / len(model_ranks)  # (K,), of the queries
        values = np.cumsum(share_at_rank / cutoffs if measure == "MRR" else share_at_rank)  # (K,)
        path = " ".join(f"{x(k):.1f},{y(value):.1f}" for k, value in zip(cutoffs.tolist(), values.tolist()))
        marks.append(f'<polyline class="m{number % COLOURS}" points="{path}"/>')
        measured = {k: document["metrics"][name].get(f"{measure}@{k}") for k in document["settings"]["cutoffs"]}
        marks += [
            f'<circle class="m{number % COLOURS}" cx="{x(min(k, depth)):.1f}" cy="{y(value):.1f}" r="3.5">'
            f"<title>{escape(name)}: {measure}@{k} {_number(value)}</title></circle>"
            for k, value in measured.items()
            if value is not None
        ]
    label = f"{measure} at cutoffs from 1 to {depth}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(marks)}</svg>'
        f"<figcaption>{measure} by cutoff</figcaption></figure>"
    )


def _distribution(ranks: Mapping[str, np.ndarray], depth: int) -> str:
    """How many queries have their best right passage in each range of ranks, a bar per model."""
    ends = [0, *(end for end in _ROUND_RANKS if end < depth), depth]
    rows = []
    for low, high in [*pairwise(ends), (depth, None)]:
        cells = []
        for number, best in enumerate(ranks.values()):
            count = int((best == 0).sum() if high is None else ((best > low) & (best <= high)).sum())
            cells.append(
                f'<div class="bar m{number % COLOURS}"><i style="width:{85 * count / max(len(best), 1):.2f}%"></i>'
                f"<span>{count:,}</span></div>"
            )
        label = f"beyond {low}" if high is None else str(high) if high == low + 1 else f"{low + 1}-{high}"
        rows.append(f'<tr><th scope="row">{label}</th><td>{"".join(cells)}</td></tr>')
    return f'<table class="bars"><tr><th>rank</th><th>queries</th></tr>{"".join(rows)}</table>'


def _outcomes(model: str, base: str, ranks: Mapping[str, np.ndarray]) -> str:
    """How many queries a model made better, left the same and made worse, by the rank of the best right passage."""
    change = beyond_all(ranks[model]) - beyond_all(ranks[base])
    counts = {"better": int((change < 0).sum()), "same": int((change == 0).sum()), "worse": int((change > 0).sum())}
    segments = "".join(f'<i class="{name}" style="flex-grow:{count}"></i>' for name, count in counts.items())
    words = ", ".join(f'<b class="{name}">{count:,}</b> {name}' for name, count in counts.items())
    return f'<p>{escape(model)} against {escape(base)}: {words}</p><div class="outcome">{segments}</div>'


def _number(value: float) -> str:
    return f"{value:.4f}"
