"""Whether training made the model better, by how much, how sure that is, and what to do next.

The judges are held-out queries that chose nothing, see choosing.py, or the queries of --eval_query_file_jsonl_path.

Shapes: Q queries that judge.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embedding_finetune.data.hold_out import what_is_new
from embedding_finetune.data.texts import text_id
from embedding_finetune.evaluation.metrics import SIGNIFICANT, compare
from embedding_finetune.model.adapters import add_adapters
from embedding_finetune.model.modules import load_projection
from embedding_finetune.model.training_queries import read_training_queries
from embedding_finetune.training.all_rows import command_on_all_rows
from embedding_finetune.training.arguments import DataArguments, ModelArguments
from embedding_finetune.training.choosing import FEWEST_TO_CHOOSE, flag_by_measure
from embedding_finetune.training.learner import load_base
from embedding_finetune.training.trainer import BEFORE_TRAINING, VERDICT_MEASURE, RetrievalTrainer

logger = logging.getLogger(__name__)

BETTER, NO_DIFFERENCE, WORSE = "better", "no difference", "worse"
_WIDE_INTERVAL = 0.02
"""An interval that reaches this far from its middle hides differences that users notice."""
_FEW_QUERIES = 50
_NEARLY_PERFECT = 0.97
_MANY_ABOVE = 0.2
"""On data without many such answers 0 to 11% were left in the second round of `--recipe domain`."""
_FEW_ROWS = 500
_SHOWN_HINTS = 2


class Verdict(NamedTuple):
    """What is known about the final weights, beside those from before the first step.

    before, after: means of the measure over the queries that judge. low, high: the difference's 95% interval.
    base_kept: whether the final weights are those from before the first step. line: all of it, for people.
    """

    outcome: str
    measure: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float
    queries: int
    base_kept: bool
    line: str


def keep_base_if_better(trainer: RetrievalTrainer, model_args: ModelArguments) -> None:
    """Give the model its weights from before the first step, where the chosen ones measure worse than these.

    By the measure, and on the held-out queries, that chose. With fewer than FEWEST_TO_CHOOSE of them the trained
    weights stay. To be called when training is over, before the model is saved.
    """
    flag = flag_by_measure(trainer.args)
    if flag is None or trainer.held_out is None or len(trainer.held_out.records) < FEWEST_TO_CHOOSE:
        return
    values = _chosen_by(trainer)
    if values is None or values[1] >= values[0]:
        return
    logger.warning(
        "warning: the base is kept: %s measured %.4f before training, and %.4f after", _metric(trainer), *values
    )
    base, _, config = load_base(model_args, route=trainer.route)
    if trainer.args.lora_rank is not None:
        base = add_adapters(base, trainer.args.lora_rank, seed=trainer.args.seed)
    trainer.bi_encoder.backbone.load_state_dict(base.state_dict())
    name, cache_dir = model_args.model_name_or_path, model_args.cache_dir
    trainer.bi_encoder.projection.load_state_dict(load_projection(name, config, cache_dir=cache_dir).state_dict())
    trainer.training_queries = read_training_queries(name, cache_dir=cache_dir)
    trainer.forget_snapshot()
    trainer.base_kept = True


def _metric(trainer: RetrievalTrainer) -> str:
    return (trainer.args.metric_for_best_model or VERDICT_MEASURE).removeprefix("eval_")


def _chosen_by(trainer: RetrievalTrainer) -> tuple[float, float] | None:
    """What chose measured before the first step, and with the weights that were chosen; None if not before."""
    before, step = trainer.metrics_at(0), trainer.best_step() or trainer.state.global_step
    if trainer.metrics_at(step) is None:
        trainer.evaluate()
    after = trainer.metrics_at(step)
    return None if before is None or after is None else (before[_metric(trainer)], after[_metric(trainer)])


def judge(trainer: RetrievalTrainer, data_args: DataArguments) -> Verdict | None:
    """The verdict about the trainer's final weights, after its summary; None where no rows are held out.

    Every process has to call it.
    """
    if trainer.held_out is None:
        return None
    values = _before_and_after(trainer)
    if values is None:
        logger.warning("warning: no verdict: these queries were not measured before the run's first step")
        return None
    file = data_args.eval_query_file_jsonl_path
    what = what_is_new(data_args.hold_out_by) if file is None else f"questions of {file}"
    before, after = values
    chosen = None
    if trainer.base_kept:
        after, chosen = before, _chosen_by(trainer)
    return verdict_on(before, after, what=what, seed=trainer.args.seed, chosen_by=_metric(trainer), base_kept=chosen)


def _before_and_after(trainer: RetrievalTrainer) -> tuple[np.ndarray, np.ndarray] | None:
    """The measure of each query that judges, before the first step and with the final weights: two (Q,).

    None where a resumed run had not measured them before its first step.
    """
    task, prefix = trainer.judges()
    entries = [entry[BEFORE_TRAINING] for entry in trainer.state.log_history if BEFORE_TRAINING in entry]
    if not entries or [number for number, _ in entries[0]] != list(map(text_id, task.queries)):
        return None
    if prefix not in trainer.latest or trainer.latest[prefix][0] != trainer.state.global_step:  # resumed at its end
        trainer.measure(task, prefix)
    return np.array([value for _, value in entries[0]]), trainer.latest[prefix][1]


def verdict_on(
    before: np.ndarray,
    after: np.ndarray,
    *,
    what: str,
    seed: int,
    chosen_by: str = VERDICT_MEASURE,
    base_kept: tuple[float, float] | None = None,
) -> Verdict:
    """The verdict about two measurements (Q,) of the same queries, by the paired tests of evaluation/metrics.py.

    what: what the queries are, `questions about ...`. base_kept: what the measure `chosen_by` was before training and
    after it on the queries that choose, where the base was kept for that.
    """
    difference = compare(before, after, seed=seed)
    outcome = NO_DIFFERENCE
    if difference.p_value < SIGNIFICANT:
        outcome = BETTER if difference.mean > 0 else WORSE
    digits = 2 if max(abs(difference.low), abs(difference.high)) >= 0.05 else 4
    mean, low, high = (f"{value:+.{digits}f}" for value in difference[:3])
    means = [float(values.mean()) for values in (before, after)]
    if base_kept is not None:
        told = (
            f"the base is kept: where weights are chosen, {chosen_by} fell from {base_kept[0]:.4f} to "
            f"{base_kept[1]:.4f}; {VERDICT_MEASURE} stays {means[0]:.{digits}f}"
        )
    else:
        told = f"{VERDICT_MEASURE} {means[0]:.{digits}f} -> {means[1]:.{digits}f} ({mean}, 95% {low} .. {high}"
        # The interval is a bootstrap's, the outcome is by a permutation test: with few queries they may differ.
        differ = (difference.low <= 0 <= difference.high) == (outcome != NO_DIFFERENCE)
        told += f", but p = {difference.p_value:.2g})" if differ else ")"
    counted = f"{len(before)} {what if len(before) > 1 else what.replace('questions', 'question', 1)}"
    return Verdict(
        outcome,
        VERDICT_MEASURE,
        means[0],
        means[1],
        *difference[:4],
        queries=len(before),
        base_kept=base_kept is not None,
        line=f"{outcome}: {told} on {counted}",
    )


def hints(verdict: Verdict, *, rows: int, known_queries: int, above: float | None = None) -> list[str]:
    """At most two lines that say what to do next.

    rows: that were trained on. known_queries: seen by some training. above: the share of negatives that scored above
    their positive when they were mined last, if they were.
    """
    found = []
    if known_queries:
        found.append(
            f"{known_queries} of {verdict.queries} queries that judge were trained on, now or when the base was made: "
            "the measures are too high; judge with others"
        )
    if above is not None and above > _MANY_ABOVE:
        found.append(
            f"{above:.0%} of the negatives scored above their positive in the last round: many may be answers that "
            "nobody labelled; look at some with mine_hard_neg.py --show_examples 5"
        )
    if verdict.outcome == WORSE or verdict.base_kept:
        found.append(
            "training made it worse, so keep the base: lower --learning_rate, and look for answers among the negatives "
            "(docs/mining.md)"
        )
        return found[:_SHOWN_HINTS]
    if verdict.before >= _NEARLY_PERFECT:
        found.append("the base finds nearly every answer to these questions: judge with harder ones")
        return found[:_SHOWN_HINTS]
    half = (verdict.high - verdict.low) / 2
    undecided = verdict.outcome == NO_DIFFERENCE
    if (undecided and half >= _WIDE_INTERVAL) or verdict.queries < _FEW_QUERIES:
        found.append(
            f"{verdict.queries} queries judge, and the interval reaches {half:.2g} to either side: four times as many "
            "halve it; hold out more, or label more"
            if half
            else f"{verdict.queries} queries judge, and none tells the models apart; hold out more, or label more"
        )
    if undecided and rows < _FEW_ROWS:
        found.append(f"{rows} rows are few to learn from: add rows, or train for longer")
    return found[:_SHOWN_HINTS]


def next_steps(verdict: Verdict, trainer: RetrievalTrainer, argv: Sequence[str]) -> list[str]:
    """The hints, and the command that trains on all rows where that is worth while. argv: this run's flags."""
    known = trainer.judges()[0].count_queries_among(trainer.training_queries)
    above = None if trainer.rounds is None else trainer.rounds.audits[-1]["negatives_above_their_positive"]
    lines = hints(verdict, rows=len(trainer.train_dataset), known_queries=known, above=above)
    if verdict.outcome == WORSE or verdict.base_kept:
        return lines
    state, best = trainer.state, trainer.best_step()
    rounds = trainer.rounds_until(state.global_step if best is None else best)
    if trainer.rounds is not None and rounds == trainer.rounds.count:
        rounds = None  # as it was
    command = command_on_all_rows(
        argv,
        trainer.args,
        best_step=best,
        steps=state.global_step,
        epochs=trainer.epochs_made(),
        rounds=rounds,
    )
    return lines if command is None else [*lines, f"to train on all rows with these settings: {command}"]
