"""What evaluate.py writes to --output_dir, for people and for other tools.

metrics.json       measures, differences, settings, digests of weights, counts
per_query.jsonl    for each query and model, the rank of each answer and the ten best passages
report.html        the same as a page, see page.py
run.MODEL.trec     the rankings, for trec_eval and ranx; docids are zero-padded corpus positions
qrels.trec         the answers, for the same tools
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from embedding_finetune.data.corpus import RetrievalTask
from embedding_finetune.data.jsonl import Record, write
from embedding_finetune.evaluation.arguments import run_file
from embedding_finetune.evaluation.page import html_report
from embedding_finetune.files import atomic_writer
from embedding_finetune.retrieval.top_k import Ranking

logger = logging.getLogger(__name__)

PASSAGES_PER_QUERY = 10
"""In per_query.jsonl, for each model."""


def write_evaluation(folder: Path, document: Record, task: RetrievalTask, rankings: Mapping[str, Ranking]) -> None:
    """Write all files; `document` becomes metrics.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "per_query.jsonl", per_query_records(task, rankings))
    write_lines(folder / "qrels.trec", qrels_lines(task))
    for name, ranking in rankings.items():
        write_lines(folder / run_file(name, list(rankings)), run_lines(task, ranking, name))
    with atomic_writer(folder / "report.html") as file:
        file.write(html_report(document, task, rankings).encode())
    with atomic_writer(folder / "metrics.json") as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")
    logger.info("wrote %s and other files of the evaluation", folder / "report.html")


def per_query_records(task: RetrievalTask, rankings: Mapping[str, Ranking]) -> Iterator[Record]:
    """One record per query. A rank is None where the answer is not in the ranking or not in the corpus."""
    for number, query in enumerate(task.queries):
        record: Record = {"id": task.ids[number], "query": query}
        if task.groups[number] is not None:
            record["group"] = task.groups[number]
        record["models"] = {
            name: _result(task, number, positions[number].tolist(), scores[number].tolist())
            for name, (positions, scores) in rankings.items()
        }
        yield record


def _result(task: RetrievalTask, number: int, positions: list[int], scores: list[float]) -> Record:
    rank_of = {position: rank for rank, position in enumerate(positions, start=1) if position >= 0}
    missing = task.relevant_counts[number] - len(task.relevant[number])
    return {
        "ranks": [rank_of.get(position) for position in sorted(task.relevant[number])] + [None] * missing,
        "top": [
            {"position": position, "score": score, "text": task.corpus.texts[position]}
            for position, score in zip(positions[:PASSAGES_PER_QUERY], scores)
            if position >= 0
        ],
    }


def run_lines(task: RetrievalTask, ranking: Ranking, name: str) -> Iterator[str]:
    """`query Q0 docid rank score tag`, best first. Scores have all digits, so that every tool sees the same ties."""
    tag = re.sub(r"\s+", "_", name)
    for query_id, positions, scores in zip(task.ids, *ranking):
        for rank, (position, score) in enumerate(zip(positions.tolist(), scores.tolist()), start=1):
            if position >= 0:
                yield f"{query_id} Q0 {docid(position, len(task.corpus))} {rank} {score!r} {tag}"


def qrels_lines(task: RetrievalTask) -> Iterator[str]:
    """`query 0 docid 1`. Answers that the corpus does not hold get docids of their own."""
    beyond = len(task.corpus)
    for number, query_id in enumerate(task.ids):
        for position in sorted(task.relevant[number]):
            yield f"{query_id} 0 {docid(position, len(task.corpus))} 1"
        for _ in range(task.relevant_counts[number] - len(task.relevant[number])):
            yield f"{query_id} 0 missing{beyond} 1"
            beyond += 1


def docid(position: int, corpus_size: int) -> str:
    """A corpus position, zero-padded so that docids sort as positions do."""
    return f"{position:0{len(str(corpus_size))}d}"


def write_lines(path: Path, lines: Iterator[str]) -> None:
    """Write lines as a file that appears whole or not at all."""
    with atomic_writer(path) as file:
        for line in lines:
            file.write(line.encode() + b"\n")
