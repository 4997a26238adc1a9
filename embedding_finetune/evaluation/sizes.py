"""How small may the index be? Measures of one model with fewer dimensions, and with fewer bits for each.

The passages are encoded once. int8 and int4 are faiss's scalar quantisers. binary keeps the sign of each dimension and
ranks by Hamming distance. "binary, rescored" takes four times as many of its candidates and ranks them by the product
of the query's floats with the passage's signs.

Shapes: Q queries, N passages, H dimensions, k ranks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.metrics import compare, means
from embedding_finetune.evaluation.ranking import as_ranked, depth_of, values_per_query
from embedding_finetune.retrieval.faiss_search import import_faiss
from embedding_finetune.retrieval.top_k import Ranking, TopK

_HALVINGS, _FEWEST_DIMENSIONS = 4, 32
_CANDIDATES = 4
"""Times k: how many of a binary index are rescored."""
_SPARE = 8
_PAIRS_PER_CHUNK = 2**16


class Embedded(NamedTuple):
    """queries: (Q, H), passages: (N, H), of the distinct texts of a corpus; unit: whether the model normalises."""

    queries: np.ndarray
    passages: np.ndarray
    unit: bool


def sizes_of(embedded: Embedded, task: RetrievalTask, options: EvaluationOptions) -> list[Record]:
    """A record for each number of dimensions and each precision, the largest first.

    Measures are at the largest of --cutoffs. The difference is of the first measure, to float32 with the most
    dimensions.
    """
    top_k = max(options.cutoffs)
    judged = options.measures[0]
    name = f"{judged}@{top_k}"
    records, whole = [], None
    for part in _parts(embedded, options.smaller_dimensions):
        for precision, size, ranking in _rankings(part, min(depth_of(task, top_k), len(part.passages))):
            ranking = as_ranked(ranking, task, top_k)
            values = values_per_query(ranking, task, options.measures, [top_k])
            whole = values[name] if whole is None else whole
            records.append(
                {
                    "dimensions": part.queries.shape[1],
                    "precision": precision,
                    "bytes": size,
                    "metrics": means(values),
                    "measure": name,
                    "difference": compare(whole, values[name], seed=options.seed)._asdict(),
                }
            )
    return records


def _parts(embedded: Embedded, smaller: Sequence[int]) -> Iterator[Embedded]:
    """The embeddings with all dimensions, and with the first ones alone: half of them, a fourth, an eighth.

    smaller: other numbers of dimensions than these, if any.
    """
    dimensions = embedded.queries.shape[1]
    halves = [dimensions >> halving for halving in range(1, _HALVINGS)]
    for kept in [dimensions, *(smaller or [half for half in halves if half >= _FEWEST_DIMENSIONS])]:
        queries, passages = embedded.queries[:, :kept], embedded.passages[:, :kept]
        if embedded.unit:
            queries, passages = _unit(queries), _unit(passages)
        yield Embedded(queries, passages, embedded.unit)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _rankings(part: Embedded, top_k: int) -> Iterator[tuple[str, int, Ranking]]:
    """Each precision, the bytes of a passage, which are whole ones, and the ranking that it gives."""
    dimensions = part.queries.shape[1]
    exact = TopK(part.queries, top_k, ties="last")
    exact.add(0, part.passages)
    yield "float32", 4 * dimensions, exact.ranking()
    faiss = import_faiss()
    kinds = faiss.ScalarQuantizer
    yield "int8", dimensions, _quantised(faiss, part, kinds.QT_8bit, top_k)
    yield "int4", math.ceil(dimensions / 2), _quantised(faiss, part, kinds.QT_4bit, top_k)
    candidates = _by_hamming_distance(faiss, part, min(_CANDIDATES * top_k, len(part.passages)))
    yield "binary", math.ceil(dimensions / 8), Ranking(*(array[:, :top_k] for array in candidates))
    yield "binary, rescored", math.ceil(dimensions / 8), _rescored(part, candidates.positions, top_k)


def _quantised(faiss: Any, part: Embedded, kind: int, top_k: int) -> Ranking:
    index = faiss.IndexScalarQuantizer(part.passages.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    passages = np.ascontiguousarray(part.passages, dtype=np.float32)
    index.train(passages)
    index.add(passages)
    queries = np.ascontiguousarray(part.queries, dtype=np.float32)
    scores, positions = index.search(queries, min(top_k + _SPARE, len(passages)))
    return _best(scores, positions, top_k)


def _by_hamming_distance(faiss: Any, part: Embedded, top_k: int) -> Ranking:
    """The passages whose signs differ from the query's in the fewest dimensions; scores are the negative distances."""
    queries, passages = (np.packbits(array > 0, axis=1) for array in part[:2])
    index = faiss.IndexBinaryFlat(8 * passages.shape[1])
    index.add(passages)
    found = np.full((len(queries), top_k), -1, dtype=np.int64)
    scores = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
    pending, width = np.arange(len(queries)), min(top_k + _SPARE, len(passages))
    while len(pending):  # until all that tie with the last are among what was found
        distances, positions = index.search(queries[pending], width)
        best = _best(-distances.astype(np.float32), positions, top_k)
        found[pending], scores[pending] = best
        ties = -distances[:, -1] >= best.scores[:, -1]
        pending = pending[ties & (width < len(passages))]
        width = min(4 * width, len(passages))
    return Ranking(found, scores)


def _rescored(part: Embedded, candidates: np.ndarray, top_k: int) -> Ranking:
    """The best of candidates (Q, any) by the query's floats times the passage's signs."""
    scores = np.empty(candidates.shape, dtype=np.float32)
    step = max(_PAIRS_PER_CHUNK // candidates.shape[1], 1)
    for first in range(0, len(candidates), step):
        rows = slice(first, first + step)
        signs = np.where(part.passages[candidates[rows]] > 0, np.float32(1), np.float32(-1))
        scores[rows] = np.einsum("qh,qkh->qk", part.queries[rows].astype(np.float64), signs)
    return _best(scores, candidates, top_k)


def _best(scores: np.ndarray, positions: np.ndarray, top_k: int) -> Ranking:
    """The top_k best of scores and positions (Q, any); of equal scores the passage that comes last."""
    order = np.lexsort((-positions, -scores), axis=1)[:, :top_k]
    return Ranking(np.take_along_axis(positions, order, axis=1), np.take_along_axis(scores, order, axis=1))
