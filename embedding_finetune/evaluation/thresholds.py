"""At which score to answer: precision of the first passage, and share of the questions answered, as the score moves.

A question is answered where its best passage scores at least a threshold. Precision is the share of right passages
among those answers. A question without an answer in the corpus is answered wrongly, or refused rightly.

Shapes: Q questions, R rounds of the bootstrap.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.metrics import relevance_of
from embedding_finetune.evaluation.rankings import Rankings

TARGETS = (0.8, 0.9, 0.95)
"""The precisions that thresholds are found for."""
_ROUNDS = 1000
_POINTS = 60
"""Of a curve, spread over the questions."""


class FirstPassages(NamedTuple):
    """What a model puts first. scores: (Q,). right: (Q,) bool. answerable: (Q,) bool, whether there is an answer."""

    scores: np.ndarray
    right: np.ndarray
    answerable: np.ndarray


def all_thresholds(ranked: Rankings, task: RetrievalTask, options: EvaluationOptions) -> Record:
    """What metrics.json says under "thresholds": for each model that embeds texts, and from the first to the last."""
    firsts = {name: first_passages(ranked, task, name) for name in options.dense_alone}
    found = {name: thresholds_of(first, seed=options.seed) for name, first in firsts.items()}
    base, last = options.dense_alone[0], options.dense_alone[-1]
    return {
        "models": found,
        "moved": None
        if base == last
        else {"from": base, "to": last, "targets": moved(found[base], found[last], firsts[last])},
    }


def first_passages(ranked: Rankings, task: RetrievalTask, name: str) -> FirstPassages:
    """What a model puts first for each question; some have no answer in the corpus."""
    of_answered, of_others = ranked.by_name[name], ranked.of_unanswered[name]
    right = relevance_of(of_answered.positions[:, :1], task.relevant)[:, 0] > 0
    others = np.zeros(len(of_others.scores), dtype=bool)
    scores = np.concatenate([of_answered.scores[:, 0], of_others.scores[:, 0]])
    answerable = np.array([bool(task.findable(number)) for number in range(len(right))], dtype=bool)
    return FirstPassages(scores, np.concatenate([right, others]), np.concatenate([answerable, others]))


class _Sorted:
    """First passages from the highest score to the lowest, and what stands above each distinct score."""

    def __init__(self, first: FirstPassages) -> None:
        order = np.argsort(-first.scores, kind="stable")
        scores = first.scores[order]
        self.right, self.answerable = first.right[order], first.answerable[order]
        self.ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # the last of each distinct score
        self.thresholds = scores[self.ends]

    def answered(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many answers there are at each threshold, and how many of them are right.

        weights: (Q,), how often each question counts, in the order of the scores.
        """
        return np.cumsum(weights)[self.ends], np.cumsum(weights * self.right)[self.ends]

    def share_answered(self, which: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The share of some questions, (Q,) bool in the order of the scores, that is answered at each threshold."""
        of_them = np.cumsum(weights * which)
        return of_them[self.ends] / max(of_them[-1], 1e-12)

    def area(self, weights: np.ndarray) -> float | None:
        """The area under the ROC curve: how often a question with an answer has a higher score than one without.

        Equal scores count half (Hanley and McNeil 1982), as the trapezoids of the curve do. None where one of the two
        kinds is missing.
        """
        with_answer, without = (
            np.append(0, np.cumsum(weights * which)[self.ends]) for which in (self.answerable, ~self.answerable)
        )
        pairs = with_answer[-1] * without[-1]
        return float(np.trapezoid(with_answer, without) / pairs) if pairs else None


def lowest_threshold(right: np.ndarray, answers: np.ndarray, target: float) -> int | None:
    """The place of the lowest threshold, of descending ones, at which precision is `target`; None where none is."""
    reached = np.flatnonzero((right >= target * answers - 1e-9) & (answers > 0))
    return int(reached[-1]) if len(reached) else None


def thresholds_of(first: FirstPassages, *, seed: int) -> Record:
    """The thresholds for TARGETS, a curve of precision, and how well scores tell what has an answer.

    A threshold is chosen anew in each round of the bootstrap. On the questions that chose it its precision is too good,
    on those that the round has not drawn a little too bad. `on_new_questions` weighs the two as Efron's .632
    estimator does (JASA 1983). A round in which no threshold reaches a target counts as answering nothing.
    """
    by_score = _Sorted(first)
    once = np.ones(len(first.right))
    answers, right = by_score.answered(once)
    rounds = np.array([_round(by_score, weights) for weights in _resampled(len(once), seed)])  # (R, targets, 5)
    return {
        "targets": [_target(by_score, target, rounds[:, number]) for number, target in enumerate(TARGETS)],
        "curve": _curve(by_score, answers, right),
        **_area(by_score, seed),
    }


def _resampled(count: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(_ROUNDS):
        yield np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)


def _round(by_score: _Sorted, weights: np.ndarray) -> list[list[float]]:
    """For each target: the threshold, the shares answered and refused, answers and right ones of questions not drawn.

    The share refused is NaN where no question without an answer was drawn.
    """
    answers, right = by_score.answered(weights)
    of_answerable, of_others = weights * by_score.answerable, weights * ~by_score.answerable
    all_refused = 1.0 if of_others.any() else np.nan
    is_new = weights == 0
    is_new_and_right = is_new & by_score.right
    found = []
    for target in TARGETS:
        place = lowest_threshold(right, answers, target)
        if place is None:
            found.append([np.inf, 0.0, all_refused, 0.0, 0.0])
            continue
        answered = slice(by_score.ends[place] + 1)
        share, wrongly = (part[answered].sum() / max(part.sum(), 1e-12) for part in (of_answerable, of_others))
        new = is_new[answered].sum(), is_new_and_right[answered].sum()
        found.append([by_score.thresholds[place], share, all_refused - wrongly, *new])
    return found


def _target(by_score: _Sorted, target: float, rounds: np.ndarray) -> Record:
    """The record of a target. rounds: (R, 5), as _round has them."""
    once = np.ones(len(by_score.right))
    answers, right = by_score.answered(once)
    place = lowest_threshold(right, answers, target)
    thresholds, shares, refused, new_answers, new_right = rounds.T
    low, high = np.quantile(thresholds, [0.025, 0.975], method="nearest").tolist()
    share_low, share_high = np.quantile(shares, [0.025, 0.975]).tolist()
    record: Record = {
        "precision": target,
        "threshold": None,
        "threshold_low": None if np.isinf(low) else low,
        "threshold_high": None if np.isinf(high) else high,
        "answered": 0.0,
        "answered_low": share_low,
        "answered_high": share_high,
        "on_new_questions": None,
        "refused": None,
        "refused_low": None,
        "refused_high": None,
    }
    if not by_score.answerable.all():
        refused_low, refused_high = np.nanquantile(refused, [0.025, 0.975]).tolist()
        record |= {"refused": 1.0, "refused_low": refused_low, "refused_high": refused_high}
    if place is None:
        return record
    record["threshold"] = float(by_score.thresholds[place])
    record["answered"] = float(by_score.share_answered(by_score.answerable, once)[place])
    if (has_new := new_answers > 0).any():
        on_others = (new_right[has_new] / new_answers[has_new]).mean()
        record["on_new_questions"] = float(0.368 * right[place] / answers[place] + 0.632 * on_others)
    if record["refused"] is not None:
        record["refused"] = 1 - float(by_score.share_answered(~by_score.answerable, once)[place])
    return record


def _curve(by_score: _Sorted, answers: np.ndarray, right: np.ndarray) -> list[Record]:
    """Precision, with its interval, and coverage at thresholds spread over the questions, from the highest down."""
    places = np.unique(np.linspace(0, len(by_score.thresholds) - 1, _POINTS).round().astype(int))
    share = by_score.share_answered(by_score.answerable, np.ones(len(by_score.right)))
    low, high = wilson(right[places], answers[places])
    return [
        {
            "threshold": float(by_score.thresholds[place]),
            "precision": float(right[place] / answers[place]),
            "low": float(low[number]),
            "high": float(high[number]),
            "answered": float(share[place]),
        }
        for number, place in enumerate(places.tolist())
    ]


def wilson(right: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% intervals of shares right / answers (Wilson 1927): of 3 right out of 3 from 0.44 on."""
    z, share = 1.959964, right / answers
    middle = (share + z**2 / (2 * answers)) / (1 + z**2 / answers)
    half = z / (1 + z**2 / answers) * np.sqrt(share * (1 - share) / answers + z**2 / (4 * answers**2))
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def _area(by_score: _Sorted, seed: int) -> Record:
    """The area under the ROC curve, and its interval by the rounds that the thresholds have.

    All are None where every question has an answer, or none has. A round of such questions is left out.
    """
    area = by_score.area(np.ones(len(by_score.right)))
    if area is None:
        return {"area": None, "area_low": None, "area_high": None}
    areas = [by_score.area(weights) for weights in _resampled(len(by_score.right), seed)]
    low, high = np.quantile([one for one in areas if one is not None], [0.025, 0.975]).tolist()
    return {"area": area, "area_low": low, "area_high": high}


def moved(before: Record, after: Record, first: FirstPassages) -> list[Record]:
    """What the thresholds of one model give with another's scores, and what to use instead.

    before, after: thresholds_of the two. first: the other's.
    """
    lines = []
    for old, new in zip(before["targets"], after["targets"]):
        if old["threshold"] is None:
            continue
        answered = first.scores >= old["threshold"]
        lines.append(
            {
                "precision": old["precision"],
                "threshold": old["threshold"],
                "now": float(first.right[answered].mean()) if answered.any() else None,
                "answered": float((answered & first.answerable).sum() / max(first.answerable.sum(), 1)),
                "use": new["threshold"],
            }
        )
    return lines
