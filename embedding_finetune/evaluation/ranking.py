"""Ranking a corpus with a model and measuring the ranking, for evaluate.py and for evaluation during training.

Under torchrun the processes share the encoding and the search, and all get the result.

Shapes: Q queries, K ranks.
"""

from collections.abc import Callable, Sequence

import numpy as np

from embedding_finetune.data.corpus import Corpus, Documents
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.data.texts import TextsOnDisk
from embedding_finetune.distributed import gather_objects
from embedding_finetune.evaluation.metrics import judged_of, per_query, relevance_of
from embedding_finetune.retrieval.encoder import Encoder
from embedding_finetune.retrieval.shared_search import (
    encode_own_passages,
    encode_queries,
    index_words,
    merge_rankings,
    rank_by_words,
)
from embedding_finetune.retrieval.top_k import Ranking, TopK, fuse

FUSION_DEPTH = 100
"""Ranks of a ranking that a fusion looks at."""


def rank_corpus(
    encoder: Encoder,
    task: RetrievalTask,
    top_k: int,
    *,
    gpus: Sequence[int] = (),
    keep: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Ranking:
    """The top_k best passages for each query with their scores, or all passages where the corpus is smaller.

    Ties are broken as trec_eval does: the passage that comes last in the corpus ranks first. A text that several
    documents have is encoded once. keep: takes the embeddings of the queries and of all distinct texts, if given.
    """

    def rank(texts: TextsOnDisk, most: int) -> Ranking:
        queries = encode_queries(encoder, task.queries, task.instructions)
        top = TopK(queries, most, ties="last", device=encoder.device, gpus=gpus)
        blocks = []
        for start, block in encode_own_passages(encoder, texts):
            top.add(start, block)
            if keep is not None:
                blocks.append(block)
        if keep is not None:
            keep(queries, np.concatenate([block for part in gather_objects(blocks) for block in part]))
        merge_rankings(top)
        return top.ranking()

    return _rank_distinct(rank, task, top_k)


def rank_corpus_by_words(task: RetrievalTask, top_k: int) -> Ranking:
    """What rank_corpus gives, by BM25. Passages that share no word with a query are in no ranking of it."""

    def rank(texts: TextsOnDisk, most: int) -> Ranking:
        return rank_by_words(index_words(texts), task.queries, most, ties="last", among=len(texts))

    return _rank_distinct(rank, task, top_k)


def _rank_distinct(rank: Callable[[TextsOnDisk, int], Ranking], task: RetrievalTask, top_k: int) -> Ranking:
    """The ranking of a corpus by `rank`, which takes distinct texts and how many are wanted for each query."""
    corpus = task.corpus
    repeating = corpus if isinstance(corpus, Documents) and corpus.duplicates else None
    texts = corpus.texts if repeating is None else corpus.texts.at(repeating.distinct)
    return as_documents(rank(texts, min(top_k, len(texts))), corpus, top_k)


def as_documents(ranking: Ranking, corpus: Corpus | Documents, top_k: int) -> Ranking:
    """The ranking of a corpus, of that of its distinct texts."""
    if not isinstance(corpus, Documents) or not corpus.duplicates:
        return ranking
    return rank_documents(ranking, corpus, min(top_k, len(corpus)))


def fuse_rankings(rankings: Sequence[Ranking]) -> Ranking:
    """The reciprocal-rank fusion of rankings, each to a depth of FUSION_DEPTH whatever is to be measured."""
    parts = [ranking.positions[:, :FUSION_DEPTH] for ranking in rankings]
    return fuse(parts, sum(part.shape[1] for part in parts), ties="last")


def rank_documents(ranking: Ranking, documents: Documents, top_k: int) -> Ranking:
    """The top_k best documents, of a ranking of at least that many of their distinct texts, or of all.

    A document that is among the best has a text that is: texts are ranked as their last documents are.
    """
    counts = np.bincount(documents.text_numbers)
    by_text = np.argsort(documents.text_numbers, kind="stable")
    starts = counts.cumsum() - counts
    result = Ranking(
        np.full((len(ranking.positions), top_k), -1, dtype=np.int64),
        np.full((len(ranking.positions), top_k), -np.inf, dtype=np.float32),
    )
    for row, (texts, text_scores) in enumerate(zip(*ranking)):
        texts = texts[texts >= 0]
        if not len(texts):
            continue
        own = np.concatenate([by_text[starts[text] : starts[text] + counts[text]] for text in texts])
        scores = np.repeat(text_scores[: len(texts)], counts[texts])
        best = np.lexsort((-own, -scores))[:top_k]
        result.positions[row, : len(best)], result.scores[row, : len(best)] = own[best], scores[best]
    return result


def values_per_query(
    ranking: Ranking, task: RetrievalTask, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """`{"MRR@1": (Q,), "Hit@1": (Q,), ...}`."""
    relevance = relevance_of(ranking.positions, task.relevant)
    return per_query(relevance, judged_of(task.relevant), measures, cutoffs)


def judged_shares(ranking: Ranking, task: RetrievalTask, cutoffs: Sequence[int]) -> dict[str, float]:
    """`{"Judged@1": 0.9, ...}`: the share of the first k that is known to answer its query, or known not to.

    A model whose first passages were judged has found answers that others were not asked for. Where shares differ much,
    measures favour the model with the larger one. The measure is Judged@k of trec_eval's users, as in ir_measures.
    """
    first = ranking.positions[:, : max(cutoffs)]
    known = np.array(
        [
            [position in relevant or position in task.not_relevant.get(number, ()) for position in positions]
            for number, (positions, relevant) in enumerate(zip(first.tolist(), task.relevant))
        ],
        dtype=bool,
    ).reshape(first.shape)  # (Q, K)
    there = first >= 0
    return {f"Judged@{k}": float(known[:, :k].sum() / max(there[:, :k].sum(), 1)) for k in cutoffs}


def measure(
    encoder: Encoder, task: RetrievalTask, *, measures: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """Rank, and return `{"MRR@1": (Q,), "Hit@1": (Q,), ...}`."""
    return values_per_query(rank_corpus(encoder, task, max(cutoffs)), task, measures, cutoffs)
