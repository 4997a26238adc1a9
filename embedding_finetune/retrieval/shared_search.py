"""Encoding and searching, shared among the processes of a torchrun run.

Every process encodes its share of the queries and of the passages, and searches its passages for all queries. All get
the merged result, which is the same as that of a single process.

Shapes: N passages, n of them in a block, Q queries, H dimensions.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from embedding_finetune.data.texts import Instructions, TextsOnDisk
from embedding_finetune.distributed import gather_objects, own_share
from embedding_finetune.model.tokens import first_rows
from embedding_finetune.retrieval.encoder import Encoder
from embedding_finetune.retrieval.keywords import KeywordIndex
from embedding_finetune.retrieval.results import Ties, best_of
from embedding_finetune.retrieval.top_k import NearDuplicates, PairScores, Ranking, TopK, split

_QUERIES_PER_GATHER = 8192
_TEXTS_PER_READ = 8192


def encode_queries(encoder: Encoder, queries: Sequence[str], instructions: Instructions = None) -> np.ndarray:
    """Embeddings of all queries: (Q, H).

    Raises UserError like Encoder.encode_queries, and before anything is encoded where an instruction fills the length.
    """
    if instructions is not None:
        encoder.queries.query.check_instructions(encoder.queries.tokenizer, first_rows(instructions))
    share = own_share(len(queries))
    return np.concatenate(gather_objects(encoder.encode_queries(queries[share], instructions and instructions[share])))


def encode_own_passages(encoder: Encoder, passages: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position of the first passage, embeddings (n, H)) of this process's share, block by block."""
    return encoder.encode_passages(passages, own_share(len(passages)))


def encode_passages(encoder: Encoder, passages: Sequence[str], share: slice) -> np.ndarray:
    """Embeddings of all passages, in every process: (N, H). share: the part of them that this process encodes."""
    own_blocks = [block for _, block in encoder.encode_passages(passages, share)]
    return np.concatenate([block for blocks in gather_objects(own_blocks) for block in blocks])


def index_words(texts: TextsOnDisk) -> KeywordIndex:
    """An index of all texts by their words, in every process."""
    parts = (texts[first : first + _TEXTS_PER_READ] for first in range(0, len(texts), _TEXTS_PER_READ))
    return KeywordIndex((text for part in parts for text in part), len(texts))


def rank_by_words(index: KeywordIndex, queries: Sequence[str], top_k: int, *, ties: Ties, among: int) -> Ranking:
    """The top_k best of the first `among` texts for every query; -1 past those that share a word with it.

    Each process ranks for its share of the queries.
    """
    results = index.results(queries[own_share(len(queries))], top_k, ties=ties, among=among)
    return split(np.concatenate(gather_objects(results)), ties)


def merge_rankings(ranking: TopK) -> None:
    """Merge the results of the other processes into this one's; afterwards all have the same ranking."""
    for first in range(0, len(ranking.queries), _QUERIES_PER_GATHER):
        part = slice(first, first + _QUERIES_PER_GATHER)
        ranking.replace(part, best_of(gather_objects(ranking.results(part)), ranking.top_k))


def merge_near_duplicates(near: NearDuplicates) -> None:
    """Add the pairs that the other processes found."""
    near.pairs = np.concatenate(gather_objects(near.pairs))


def merge_scores(pairs: PairScores) -> None:
    """Add the scores of the pairs that the other processes scored."""
    for scores in gather_objects(pairs.scores):
        scored = ~np.isnan(scores)
        pairs.scores[scored] = scores[scored]
