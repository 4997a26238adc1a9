"""At which score to answer: precision of the first passage, and share of the questions answered, as the score moves.

A question is answered where its best passage scores at least a threshold. Precision is the share of right passages
among those answers. A question without an answer in the corpus is answered wrongly, or refused rightly.

Shapes: Q questions, R rounds of the bootstrap.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from embedding_finetune.data.corpus import RetrievalTask
from embedding_finetune.data.jsonl import Record
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.metrics import relevance_of

if TYPE_CHECKING:
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


def all_thresholds(ranked: "Rankings", task: RetrievalTask, options: EvaluationOptions) -> Record:
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


def first_passages(ranked: "Rankings", task: RetrievalTask, name: str) -> FirstPassages:
    """What a model puts first for each question, those without an answer last."""
    of_answered, of_others = ranked.by_name[name], ranked.of_unanswered[name]
    right = relevance_of(of_answered.positions[:, :1], task.relevant)[:, 0] > 0
    others = np.zeros(len(of_others.scores), dtype=bool)
    scores = np.concatenate([of_answered.scores[:, 0], of_others.scores[:, 0]])
    return FirstPassages(scores, np.concatenate([right, others]), np.concatenate([np.ones_like(right), others]))


class _Sorted:
    """First passages from the highest score to the lowest, and what stands above each distinct score."""

    def __init__(self, first: FirstPassages) -> None:
        self.order = np.argsort(-first.scores, kind="stable")
        scores = first.scores[self.order]
        self.right, self.answerable = first.right[self.order], first.answerable[self.order]
        self.ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # the last of each distinct score
        self.thresholds = scores[self.ends]

    def at_all(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, share of the answerable questions answered, share of the others refused, at each threshold.

        weights: (Q,), how often each question counts, in the order of the scores; by default once.
        """
        w = np.ones(len(self.right)) if weights is None else weights
        answered = np.cumsum(w)[self.ends]
        none = np.where(answered > 0, answered, np.nan)  # where nothing is answered, nothing is right or wrong
        precision = np.cumsum(w * self.right)[self.ends] / none
        of_answerable = np.cumsum(w * self.answerable)
        others = np.cumsum(w * ~self.answerable)
        coverage = of_answerable[self.ends] / max(of_answerable[-1], 1e-12)
        refused = 1 - others[self.ends] / max(others[-1], 1e-12)
        return precision, coverage, refused


def lowest_threshold(precision: np.ndarray, target: float) -> int | None:
    """The place of the lowest threshold, of descending ones, at which precision is `target`; None where none is."""
    reached = np.flatnonzero(precision >= target - 1e-12)
    return int(reached[-1]) if len(reached) else None


def thresholds_of(first: FirstPassages, *, seed: int) -> Record:
    """The thresholds for TARGETS with bootstrap intervals, a curve, and how well scores tell what has an answer.

    A threshold is chosen anew in each round of the bootstrap, so that the intervals hold for choosing it. A round in
    which no threshold reaches a target counts as answering nothing.
    """
    by_score = _Sorted(first)
    found = by_score.at_all()
    places = np.unique(np.linspace(0, len(by_score.thresholds) - 1, _POINTS).round().astype(int))
    chosen, answered, precisions = [], [], []  # (R, targets), (R, targets), (R, points)
    for precision, coverage, _ in _resampled(by_score, seed):
        own = [lowest_threshold(precision, target) for target in TARGETS]
        chosen.append([np.nan if place is None else by_score.thresholds[place] for place in own])
        answered.append([0.0 if place is None else coverage[place] for place in own])
        precisions.append(precision[places])
    return {
        "targets": _targets(by_score, found, np.array(chosen), np.array(answered)),
        "curve": _curve(by_score, found, places, np.array(precisions)),
        "area": None if first.answerable.all() else area(first),
    }


def _resampled(by_score: _Sorted, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng, count = np.random.default_rng(seed), len(by_score.right)
    for _ in range(_ROUNDS):
        yield by_score.at_all(np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64))


def _targets(
    by_score: _Sorted, found: tuple[np.ndarray, ...], chosen: np.ndarray, answered: np.ndarray
) -> list[Record]:
    precision, coverage, refused = found
    targets = []
    for number, target in enumerate(TARGETS):
        place, found_in_rounds = lowest_threshold(precision, target), chosen[:, number]
        found_in_rounds = found_in_rounds[~np.isnan(found_in_rounds)]
        low, high = np.quantile(found_in_rounds, [0.025, 0.975]).tolist() if len(found_in_rounds) else (None, None)
        answered_low, answered_high = np.quantile(answered[:, number], [0.025, 0.975]).tolist()
        targets.append(
            {
                "precision": target,
                "threshold": None if place is None else float(by_score.thresholds[place]),
                "threshold_low": low,
                "threshold_high": high,
                "answered": 0.0 if place is None else float(coverage[place]),
                "answered_low": answered_low,
                "answered_high": answered_high,
                "refused": None if by_score.answerable.all() else 1.0 if place is None else float(refused[place]),
            }
        )
    return targets


def _curve(
    by_score: _Sorted, found: tuple[np.ndarray, ...], places: np.ndarray, precisions: np.ndarray
) -> list[Record]:
    """Precision, with its interval, and coverage at thresholds spread over the questions, from the highest down."""
    low, high = np.nanquantile(precisions, [0.025, 0.975], axis=0)
    return [
        {
            "threshold": float(by_score.thresholds[place]),
            "precision": float(found[0][place]),
            "low": float(low[number]),
            "high": float(high[number]),
            "answered": float(found[1][place]),
        }
        for number, place in enumerate(places.tolist())
    ]


def area(first: FirstPassages) -> float:
    """The area under the ROC curve: how often a question with an answer has a higher score than one without.

    Equal scores count half (Hanley and McNeil 1982).
    """
    with_answer, without = first.scores[first.answerable], np.sort(first.scores[~first.answerable])
    below = np.searchsorted(without, with_answer, side="left")
    not_above = np.searchsorted(without, with_answer, side="right")
    return float((below + not_above).sum() / (2 * len(with_answer) * len(without)))


def precision_at(first: FirstPassages, threshold: float) -> float | None:
    """The precision of the answers at a threshold; None where there is none."""
    answered = first.scores >= threshold
    return float(first.right[answered].mean()) if answered.any() else None


def moved(before: Record, after: Record, first: FirstPassages) -> list[Record]:
    """What the thresholds of one model give with another's scores, and what to use instead.

    before, after: thresholds_of the two. first: the other's.
    """
    return [
        {
            "precision": old["precision"],
            "threshold": old["threshold"],
            "now": precision_at(first, old["threshold"]),
            "use": new["threshold"],
        }
        for old, new in zip(before["targets"], after["targets"])
        if old["threshold"] is not None
    ]
