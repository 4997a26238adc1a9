"""Ranking a corpus under a model and measuring it: what evaluate.py and evaluation during training share.

Shapes: Q queries, K ranks. Where a process group is up, as in training under torchrun,
its processes share the encoding and the search, and all get the result.
"""

from collections.abc import Sequence

import numpy as np

from embedding_finetune.corpus import RetrievalTask
from embedding_finetune.distributed import gather_objects, own_share
from embedding_finetune.encoding import Encoder
from embedding_finetune.metrics import means, per_query, relevance_of
from embedding_finetune.retrieval import TopK


def rank_corpus(encoder: Encoder, task: RetrievalTask, top_k: int, *, use_gpu: bool = False) -> TopK:
    """The best passages for each query, with their scores.

    Ties go as trec_eval breaks them, the passage that comes last in the corpus first.
    """
    own_queries = encoder.encode_queries(task.queries[own_share(len(task.queries))])
    ranking = TopK(np.concatenate(gather_objects(own_queries)), top_k, ties="last", use_gpu=use_gpu)
    share = own_share(len(task.corpus))
    for start, block in encoder.encode_passages(task.corpus.texts[share]):
        ranking.add(share.start + start, block)
    own_results = (ranking.scores, ranking.positions)
    ranking = TopK(ranking.queries, top_k, ties="last")
    for scores, positions in gather_objects(own_results):
        ranking.merge(scores, positions)
    return ranking


def values_per_query(
    ranking: TopK, task: RetrievalTask, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """`{"MRR@1": (Q,), "Hit@1": (Q,), ...}`."""
    relevance = relevance_of(ranking.positions, task.relevant)
    return per_query(relevance, np.array(task.relevant_counts), measures, cutoffs)


def measure(
    encoder: Encoder, task: RetrievalTask, *, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, float]:
    """`{"MRR@1": ..., "Hit@1": ..., ...}`, means over all queries of the task."""
    return means(values_per_query(rank_corpus(encoder, task, max(cutoffs)), task, measures, cutoffs))
