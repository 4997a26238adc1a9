"""Corpora that hold the queries themselves, as those of duplicate questions do: each query finds itself first.

A passage is the query itself where it has the query's text, in canonical form. In a BEIR folder so is the document with
the query's id, as for MTEB and BEIR, which leave out nothing else.
"""

import logging
from collections.abc import Iterator

from embedding_finetune.command_line import UserError
from embedding_finetune.data.corpus import Documents
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.data.texts import canonical

logger = logging.getLogger(__name__)

_FLAG = "--ignore_query_itself"
_WORTH_A_WARNING = 0.01
"""The share of queries that are passages too."""


def leave_out_queries(task: RetrievalTask) -> RetrievalTask:
    """The task in which no query finds itself, unless it is labelled as its own answer; a log line counts the queries.

    Raises UserError where a query would have nothing to find.
    """
    parts = [part._replace(left_out=_of_itself(part, by_id=True)) for part in _parts(task)]
    for part in parts:
        for number, positions in part.left_out.items():
            if len(positions) == len(task.corpus):
                raise UserError(f"{_FLAG}: the corpus holds nothing but the query {part.queries[number][:60]!r}")
    count, of = sum(len(part.left_out) for part in parts), sum(len(part.queries) for part in parts)
    logger.info("%s: %d of %d queries are passages too, and each is left out of its own ranking", _FLAG, count, of)
    return parts[0]._replace(unanswered=parts[1] if len(parts) > 1 else None)


def warn_of_queries_among_passages(task: RetrievalTask) -> None:
    """Log a warning where so many queries are passages too, and no answers to themselves, that measures suffer."""
    count = sum(len(_of_itself(part, by_id=False)) for part in _parts(task))
    of = sum(len(part.queries) for part in _parts(task))
    if count >= _WORTH_A_WARNING * of and count:
        logger.warning(
            "warning: %d of %d queries are passages too, and rank first for themselves without being their answers: "
            "%s leaves them out",
            count,
            of,
            _FLAG,
        )


def _parts(task: RetrievalTask) -> Iterator[RetrievalTask]:
    """The questions with an answer, and those without, if there are any."""
    yield task
    if task.unanswered is not None:
        yield task.unanswered


def _of_itself(task: RetrievalTask, *, by_id: bool) -> dict[int, set[int]]:
    """Number of a query -> the positions of the passages that are the query itself and not labelled as its answers.

    Queries without such passages are not in it. by_id: whether the document of a query's id is the query too.
    """
    with_text = task.corpus.positions_of_all(task.queries)
    found = {number: set(with_text.get(canonical(query), ())) for number, query in enumerate(task.queries)}
    if by_id and isinstance(task.corpus, Documents):
        numbers = {name: number for number, name in enumerate(task.ids)}
        for position, name in enumerate(task.corpus.ids[: len(task.corpus)]):
            if name in numbers:
                found[numbers[name]].add(position)
    others = {number: positions - task.relevant[number].keys() for number, positions in found.items()}
    return {number: positions for number, positions in others.items() if positions}
