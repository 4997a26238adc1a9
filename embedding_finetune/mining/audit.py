"""The audit of a mining run: what was chosen, what was left out and why, as JSON and as text.

Shapes: P pairs of a row and one of its positives; n negatives.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from embedding_finetune.data.jsonl import Record
from embedding_finetune.mining.choice import Selection
from embedding_finetune.retrieval.arguments import BM25

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SHARE_ABOVE_TO_WARN = 0.1
"""The audit warns when a larger share of negatives scores above their positive."""
_SHARE_AT_RANDOM_TO_WARN = 0.1
"""The audit warns when a larger share of negatives was drawn at random."""
_SHOWN_CHARACTERS = 160


def mining_audit(
    selections: Sequence[Selection], positive_scores: np.ndarray, lowest_positive: np.ndarray, *, wanted: int
) -> Record:
    """Counts and score quantiles of a run; negatives whose score is unknown do not count in the quantiles.

    positive_scores: (P,). lowest_positive: (Q,), the score of each row's lowest-scoring positive.
    """
    dropped: Counter[str] = Counter()
    for selection in selections:
        dropped.update(selection.dropped)
    scores = np.fromiter((score for selection in selections for score in selection.scores), dtype=np.float32)
    above = np.repeat(lowest_positive, [len(selection.negatives) for selection in selections]) - scores
    known = ~np.isnan(scores)
    # What was judged is known to answer nothing, however high it scores.
    doubtful = known & np.fromiter(
        (place >= one.confirmed for one in selections for place in range(len(one.negatives))), dtype=bool
    )
    return {
        "rows": len(selections),
        "negatives": len(scores),
        "negatives_confirmed": sum(selection.confirmed for selection in selections),
        "negatives_kept": sum(selection.kept for selection in selections),
        "negatives_drawn_at_random": sum(selection.random_fills for selection in selections),
        "rows_short_of_negatives": sum(len(selection.negatives) < wanted for selection in selections),
        "rows_without_negatives": sum(not selection.negatives for selection in selections),
        "left_out": dict(sorted(dropped.items())),
        "scores": {
            "positives": quantiles(positive_scores),
            "negatives": quantiles(scores[known]),
            "positive - negative": quantiles(above[known]),
        },
        "negatives_above_their_positive": float((above[doubtful] < 0).mean()) if doubtful.any() else None,
    }


def quantiles(scores: np.ndarray) -> dict[str, float]:
    """`{"p05": ..., "p25": ..., "p50": ..., "p75": ..., "p95": ...}`, empty when there are no scores."""
    if not len(scores):
        return {}
    return {f"p{int(100 * q):02d}": float(value) for q, value in zip(QUANTILES, np.quantile(scores, QUANTILES))}


def audit_text(audit: Record, *, wanted: int) -> str:
    """The audit as lines to read, warnings last: the result of `mining_audit`, and what the script adds to it."""
    share = audit["negatives_above_their_positive"]
    rows = [
        ("rows", audit["rows"]),
        ("candidates", audit["candidates"]),
        ("negatives", audit["negatives"]),
        *([("of them judged", audit["negatives_confirmed"])] if audit["negatives_confirmed"] else []),
        ("of them kept from the input", audit["negatives_kept"]),
        ("of them drawn at random", audit["negatives_drawn_at_random"]),
        (f"rows with fewer than {wanted}", audit["rows_short_of_negatives"]),
        ("rows dropped", audit["rows_dropped"]),
        *((f"left out: {reason}", count) for reason, count in audit["left_out"].items()),
        *((f"scores: {name}", _quantile_line(values)) for name, values in audit["scores"].items()),
        ("negatives above their positive", "unknown" if share is None else f"{share:.1%}"),
        ("seconds", "  ".join(f"{name} {value:.1f}" for name, value in audit["seconds"].items())),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name.ljust(width)}  {value}" for name, value in rows), *_warnings(audit, wanted)])


def _quantile_line(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items()) or "none"


def _warnings(audit: Record, wanted: int) -> list[str]:
    warnings = []
    if short := audit["rows_short_of_negatives"]:
        start = audit["settings"]["range_for_sampling"][0]
        if start >= audit["candidates"]:
            why = f"--range_for_sampling starts at rank {start} of {audit['candidates']} candidates; start it lower"
        elif any(reason.startswith("--") for reason in audit["left_out"]):
            why = (
                "filters refuse many, and too few candidates are outside the retrieved ranks; relax the filters, lower "
                "--range_for_sampling or give a larger --candidate_pool"
            )
        elif start:
            why = (
                "too few candidates are outside the retrieved ranks; lower --range_for_sampling or give a larger "
                "--candidate_pool"
            )
        else:
            why = "there are too few candidates; give a larger --candidate_pool, or a smaller --negative_number"
        none = "" if audit["negatives"] else ", and none has any"
        warnings.append(f"warning: {short} rows have fewer than {wanted} negatives{none}: {why}")
    if audit["negatives_drawn_at_random"] > _SHARE_AT_RANDOM_TO_WARN * audit["negatives"]:
        share = audit["negatives_drawn_at_random"] / audit["negatives"]
        warnings.append(
            f"warning: {share:.0%} of the negatives were drawn at random, and random negatives are easy: the ranks to "
            "sample from gave too few; widen --range_for_sampling, lower --negative_number or relax the filters"
        )
    return [*warnings, *_told_of_high_scores(audit)]


def _told_of_high_scores(audit: Record) -> list[str]:
    """A line where many negatives score above their positive: a warning, unless the flags ask for the very top."""
    share = audit["negatives_above_their_positive"]
    if share is None or share <= _SHARE_ABOVE_TO_WARN:
        return []
    settings = audit["settings"]
    margin = "--relative_margin 0.05"
    if settings.get("model_name_or_path") == [BM25] and settings.get("reranker_name_or_path") is None:
        margin += f" with a model beside {BM25}"
    if settings["sampling_strategy"] == "top" and settings["range_for_sampling"][0] == 0:
        return [
            f"{share:.0%} of the negatives score above their positive, as the very top does: right for "
            "--neighbours_in_batch, which only draws rows together; as a row's own negatives many may be answers that "
            f"nobody labelled, and {margin} leaves out what scores too high"
        ]
    return [
        f"warning: {share:.0%} of the negatives score above their positive: many may be answers that nobody "
        f"labelled; {margin} leaves out what scores too high, and so does a later --range_for_sampling"
    ]


def examples(rows: Mapping[int, Record]) -> str:
    """Mined rows as text to read. rows: number, from 0 -> row."""
    blocks = []
    for number, row in rows.items():
        lines = [f"row {number + 1}  {_cut(row['query'])}"]
        for sign, field in (("+", "pos"), ("-", "neg")):
            scores = row.get(f"{field}_scores") or [None] * len(row[field])
            lines += [
                f"  {sign} {'' if score is None else f'{score:.3f}  '}{_cut(text)}"
                for text, score in zip(row[field], scores)
            ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
