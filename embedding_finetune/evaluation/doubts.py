"""Which unlabelled passages may be right answers, by the rankings of an evaluation.

Shapes: Q queries.
"""

from collections.abc import Mapping

import numpy as np

from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.data.texts import canonical
from embedding_finetune.retrieval.doubts import Doubt, Witness, find_doubts
from embedding_finetune.retrieval.top_k import Ranking

DEPTH_FOR_DOUBTS = 100
"""Ranks among which the right passage is looked for."""


def doubts_of(rankings: Mapping[str, Ranking], task: RetrievalTask) -> list[Doubt]:
    """The doubts of all queries that have an answer in the corpus.

    Of several answers that which the last model ranks best stands beside a doubt.
    """
    unknown = np.full(len(task.queries), np.nan)
    itself = task.corpus.positions_of_all(task.queries)

    def settled(number: int) -> set[int]:
        own = itself.get(canonical(task.queries[number]), ())
        return {*task.relevant[number], *task.not_relevant.get(number, ()), *own}

    positives = [_best_answer(rankings, task, number) for number in range(len(task.queries))]
    return find_doubts({name: Witness(ranking, unknown) for name, ranking in rankings.items()}, positives, settled)


def _best_answer(rankings: Mapping[str, Ranking], task: RetrievalTask, number: int) -> int:
    """The position of the answer that the last model ranks best, else another model, else the first; -1 for none."""
    answers = task.findable(number)
    if len(answers) > 1:
        for ranking in reversed(list(rankings.values())):
            for position in ranking.positions[number].tolist():
                if position in answers:
                    return position
    return answers[0] if answers else -1
