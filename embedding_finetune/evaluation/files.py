"""What evaluate.py writes to --output_dir, for people and for other tools.

metrics.json       measures, differences, settings, digests of weights, counts
per_query.jsonl    for each query and model, the rank of each answer and the ten best passages; questions without an
                   answer come last, and are in no TREC file
report.html        the same as a page, see page.py
run.MODEL.trec     the rankings, for trec_eval and ranx; docids are those of a BEIR folder, else corpus positions
qrels.trec         the answers, for the same tools
"""

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from embedding_finetune.data.corpus import Documents
from embedding_finetune.data.jsonl import Record, write
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.arguments import run_file
from embedding_finetune.evaluation.page import html_report
from embedding_finetune.files import atomic_writer
from embedding_finetune.retrieval.top_k import Ranking

logger = logging.getLogger(__name__)

PASSAGES_PER_QUERY = 10
"""In per_query.jsonl, for each model."""
_LINES_AT_ONCE = 1000


def write_evaluation(
    folder: Path,
    document: Record,
    task: RetrievalTask,
    rankings: Mapping[str, Ranking],
    of_unanswered: Mapping[str, Ranking] | None = None,
) -> None:
    """Write all files; `document` becomes metrics.json. of_unanswered: the rankings of task.unanswered, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    records = per_query_records(task, rankings)
    if task.unanswered is not None and of_unanswered is not None:
        records = itertools.chain(records, per_query_records(task.unanswered, of_unanswered, answerable=False))
    write(folder / "per_query.jsonl", records)
    write_lines(folder / "qrels.trec", qrels_lines(task))
    for name, ranking in rankings.items():
        write_lines(folder / run_file(name, list(rankings)), run_lines(task, ranking, name))
    with atomic_writer(folder / "report.html") as file:
        file.write(html_report(document, task, rankings).encode())
    with atomic_writer(folder / "metrics.json") as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")
    logger.info("wrote %s and other files of the evaluation", folder / "report.html")


def per_query_records(
    task: RetrievalTask, rankings: Mapping[str, Ranking], *, answerable: bool = True
) -> Iterator[Record]:
    """One record per query. A rank is None where the answer is not in the ranking or not in the corpus.

    In a BEIR folder, documents have their ids beside them, and `answers` has the ids and grades of the answers.
    answerable: False for the task of questions without an answer, whose records say so.
    """
    for number, query in enumerate(task.queries):
        record: Record = {"id": task.ids[number], "query": query}
        if task.groups[number] is not None:
            record["group"] = task.groups[number]
        if not answerable:
            record["answerable"] = False
        if isinstance(task.corpus, Documents):
            answers = sorted(task.relevant[number].items())
            record["answers"] = {task.corpus.docid(position): grade for position, grade in answers}
        record["models"] = {
            name: _result(task, number, positions[number].tolist(), scores[number].tolist())
            for name, (positions, scores) in rankings.items()
        }
        yield record


def _result(task: RetrievalTask, number: int, positions: list[int], scores: list[float]) -> Record:
    rank_of = {position: rank for rank, position in enumerate(positions, start=1) if position >= 0}
    return {
        "ranks": [rank_of.get(position) for position in sorted(task.relevant[number])],
        "top": [
            {**_place(task, position), "score": score, "text": task.corpus.texts[position]}
            for position, score in zip(positions[:PASSAGES_PER_QUERY], scores)
            if position >= 0
        ],
    }


def _place(task: RetrievalTask, position: int) -> Record:
    named = {"id": task.corpus.docid(position)} if isinstance(task.corpus, Documents) else {}
    return {**named, "position": position}


def run_lines(task: RetrievalTask, ranking: Ranking, name: str) -> Iterator[str]:
    """`query Q0 docid rank score tag`, best first. Scores have all digits, so that every tool sees the same ties."""
    tag = re.sub(r"\s+", "_", name)
    for query_id, positions, scores in zip(task.ids, *ranking):
        for rank, (position, score) in enumerate(zip(positions.tolist(), scores.tolist()), start=1):
            if position >= 0:
                yield f"{query_id} Q0 {task.corpus.docid(position)} {rank} {score!r} {tag}"


def qrels_lines(task: RetrievalTask) -> Iterator[str]:
    """`query 0 docid grade`. Answers that the corpus does not hold have docids of their own."""
    for query_id, relevant in zip(task.ids, task.relevant):
        for position, grade in sorted(relevant.items()):
            yield f"{query_id} 0 {task.corpus.docid(position)} {grade}"


def write_lines(path: Path, lines: Iterator[str]) -> None:
    """Write lines as a file that appears whole or not at all."""
    with atomic_writer(path) as file:
        while batch := list(islice(lines, _LINES_AT_ONCE)):
            file.write("\n".join([*batch, ""]).encode())
