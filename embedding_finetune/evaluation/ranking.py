"""Ranking a corpus with a model and measuring the ranking, for evaluate.py and for evaluation during training.

Under torchrun the processes share the encoding and the search, and all get the result.

Shapes: Q queries, K ranks.
"""

from collections.abc import Callable, Mapping, Sequence, Set

import numpy as np

from embedding_finetune.data.corpus import Documents
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
    return as_ranked(rank(texts, min(depth_of(task, top_k), len(texts))), task, top_k)


def depth_of(task: RetrievalTask, top_k: int) -> int:
    """How deep the distinct texts are to be ranked, so that top_k remain without what the task leaves out."""
    return top_k + max(map(len, task.left_out.values()), default=0)


def as_ranked(ranking: Ranking, task: RetrievalTask, top_k: int) -> Ranking:
    """The ranking of a task's corpus, of that of its distinct texts to depth_of. Every ranking passes through here.

    Documents with one text all get its rank. What the task leaves out of a query's ranking is taken out, and what ranks
    below moves up.
    """
    corpus = task.corpus
    if isinstance(corpus, Documents) and corpus.duplicates:
        ranking = rank_documents(ranking, corpus, min(depth_of(task, top_k), len(corpus)))
    positions, scores = (part[:, :top_k] for part in _without(ranking, task.left_out))
    return Ranking(positions, scores)


def _without(ranking: Ranking, left_out: Mapping[int, Set[int]]) -> Ranking:
    """The ranking without these positions, by numbers of queries; -1 past the end."""
    if not left_out:
        return ranking
    positions, scores = (part.copy() for part in ranking)
    for number, own in left_out.items():
        gone = np.isin(positions[number], list(own))
        positions[number][gone], scores[number][gone] = -1, -np.inf
        order = np.argsort(gone, kind="stable")
        positions[number], scores[number] = positions[number][order], scores[number][order]
    return Ranking(positions, scores)


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
