"""Ranking a corpus with a model and measuring the ranking, for evaluate.py and for evaluation during training.

Under torchrun the processes share the encoding and the search, and all get the result.

Shapes: Q queries, K ranks.
"""

from collections.abc import Sequence

import numpy as np

from embedding_finetune.data.corpus import RetrievalTask
from embedding_finetune.evaluation.metrics import means, per_query, relevance_of
from embedding_finetune.retrieval.encoder import Encoder
from embedding_finetune.retrieval.shared_search import encode_own_passages, encode_queries, merge_rankings
from embedding_finetune.retrieval.top_k import Ranking, TopK


def rank_corpus(encoder: Encoder, task: RetrievalTask, top_k: int, *, gpus: Sequence[int] = ()) -> Ranking:
    """The top_k best passages for each query with their scores, or all passages where the corpus is smaller.

    Ties are broken as trec_eval does: the passage that comes last in the corpus ranks first.
    """
    top_k = min(top_k, len(task.corpus))
    top = TopK(encode_queries(encoder, task.queries, task.instructions), top_k, ties="last", gpus=gpus)
    for start, block in encode_own_passages(encoder, task.corpus.texts):
        top.add(start, block)
    merge_rankings(top)
    return top.ranking()


def values_per_query(
    ranking: Ranking, task: RetrievalTask, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """`{"MRR@1": (Q,), "Hit@1": (Q,), ...}`."""
    relevance = relevance_of(ranking.positions, task.relevant)
    return per_query(relevance, np.array(task.relevant_counts), measures, cutoffs)


def measure(
    encoder: Encoder, task: RetrievalTask, *, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, float]:
    """Rank, and return `{"MRR@1": ..., "Hit@1": ..., ...}`, means over all queries of the task."""
    return means(values_per_query(rank_corpus(encoder, task, max(cutoffs)), task, measures, cutoffs))
