"""The report's section about thresholds: a curve of precision and coverage, and tables."""

from collections.abc import Sequence
from html import escape

from embedding_finetune.data.jsonl import Record
from embedding_finetune.evaluation.markup import COLOURS, table
from embedding_finetune.evaluation.summary import moved_lines, threshold_head, threshold_rows

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 700, 260, 40, 34
_LOWEST = 0.5
"""Of the axis of precision, unless a curve goes below."""


def threshold_section(thresholds: Record | None, names: Sequence[str]) -> str:
    """The section, empty without thresholds. names: all models, whose colours are theirs everywhere on the page."""
    if thresholds is None:
        return ""
    parts = [_curves(thresholds["models"], names)]
    for name, found in thresholds["models"].items():
        parts.append(table(threshold_head(name, found), threshold_rows(found)))
        if found["area"] is not None:
            parts.append(
                f'<p class="soft">{escape(name)}: a question with an answer scores above one without in '
                f"{found['area']:.1%} of all pairs (area under the ROC curve; 95% interval "
                f"{found['area_low']:.1%} .. {found['area_high']:.1%}).</p>"
            )
    if thresholds["moved"]:
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in moved_lines(thresholds)) + "</ul>")
    return f'<section id="thresholds"><h2>Where to answer</h2>{"".join(parts)}</section>'


def _curves(models: Record, names: Sequence[str]) -> str:
    """Precision over the share of questions answered, with its 95% interval; each dot tells its threshold."""
    points = [point for found in models.values() for point in found["curve"]]
    lowest = min(_LOWEST, min(point["low"] for point in points))

    def x(answered: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 24) * answered

    def y(precision: float) -> float:
        return 10 + (_HEIGHT - _BOTTOM - 10) * (1 - precision) / (1 - lowest)

    marks = [
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0%}</text>'
        for value in (0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
        if value >= lowest
    ]
    marks += [
        f'<text x="{x(share):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{share:.0%}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    axis = "of the questions that have an answer"
    marks.append(f'<text x="{x(0.5):.1f}" y="{_HEIGHT - 1}" text-anchor="middle">{axis}</text>')
    for name, found in models.items():
        curve, colour = found["curve"], f"m{list(names).index(name) % COLOURS}"
        band = [(p["answered"], p["high"]) for p in curve] + [(p["answered"], p["low"]) for p in reversed(curve)]
        outline = " ".join(f"{x(share):.1f},{y(value):.1f}" for share, value in band)
        path = " ".join(f"{x(p['answered']):.1f},{y(p['precision']):.1f}" for p in curve)
        marks.append(f'<polygon class="{colour}" points="{outline}"/><polyline class="{colour}" points="{path}"/>')
        marks += [
            f'<circle class="{colour}" cx="{x(p["answered"]):.1f}" cy="{y(p["precision"]):.1f}" r="3">'
            f"<title>{escape(name)}: from {p['threshold']:.4f} on {p['precision']:.1%} right, "
            f"{p['answered']:.1%} answered</title></circle>"
            for p in curve
        ]
    label = "Share of first passages that are right, over the share of answerable questions answered"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'
        f"<figcaption>{label}; each dot is a threshold, bands are 95% intervals</figcaption></figure>"
    )
