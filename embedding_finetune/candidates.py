"""What mining chooses from: every row's ranked candidates with their scores, by one retriever or several.

Under torchrun every process takes part in each function here, and all get the same result.

Shapes: Q rows, each with one query; k ranks, of which the last W are the sampling window; P pairs of a row and a text.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from embedding_finetune.command_line import scratch_folder
from embedding_finetune.corpus import Corpus
from embedding_finetune.distributed import gather_objects, own_gpu, own_share
from embedding_finetune.encoding import Encoder, load_encoder
from embedding_finetune.reranking import Reranker, load_reranker
from embedding_finetune.retrieval import NearDuplicates, PairScores, TopK, fuse, gpus_to_search_on
from embedding_finetune.search import (
    encode_own_passages,
    encode_passages,
    encode_queries,
    merge_near_duplicates,
    merge_rankings,
    merge_scores,
)

_FLAG = "--model_name_or_path"


class Pairs(NamedTuple):
    """Rows and positions of texts in the corpus: (P,) int64 each."""

    rows: np.ndarray
    positions: np.ndarray


class Score(Protocol):
    """Scores pairs: (P,) float32."""

    def __call__(self, pairs: Pairs) -> np.ndarray: ...


class Candidates(NamedTuple):
    """Rankings and scores of all rows.

    ranking: (Q, k) positions, best first, -1 past the end. window_scores: (Q, W), of its last W places, -inf past the
    end. pair_scores: (P,), of the pairs that were asked for. near_duplicates: (n, 2), a positive's position and that of
    a passage as good as equal to it. score: scores other pairs in the same way. weights: digests of the models, by
    name. seconds: what the parts took.
    """

    ranking: np.ndarray
    window_scores: np.ndarray
    pair_scores: np.ndarray
    near_duplicates: np.ndarray
    score: Score
    weights: dict[str, str]
    seconds: Counter[str]


def rank_candidates(
    queries: Sequence[str], corpus: Corpus, pairs: Pairs, positives: np.ndarray, args: argparse.Namespace
) -> Candidates:
    """Rank the corpus for every query and score `pairs`, as mine_hard_neg.py's flags say.

    positives: positions, whose near-duplicates are looked for. With several models the ranking is their reciprocal-rank
    fusion, and scores and near-duplicates are the first one's. A reranker rescores the window and the pairs, and puts
    the window in the order of its scores.
    """
    gpus = gpus_to_search_on(own_gpu()) if args.use_gpu_for_searching else ()
    found = _first_retriever(queries, corpus, pairs, positives, args, gpus)
    if len(args.model_name_or_path) > 1:
        found = _fused(found, queries, corpus, args, gpus)
    if args.reranker_name_or_path is not None:
        found = _reranked(found, queries, corpus, pairs, args)
    return found


def _first_retriever(
    queries: Sequence[str],
    corpus: Corpus,
    pairs: Pairs,
    positives: np.ndarray,
    args: argparse.Namespace,
    gpus: Sequence[int],
) -> Candidates:
    near_duplicates = args.near_duplicate_threshold is not None
    if args.embeddings_dir is None and (near_duplicates or len(args.model_name_or_path) > 1):
        # Some texts are looked at twice, but encoded once.
        args = argparse.Namespace(**{**vars(args), "embeddings_dir": scratch_folder()})
    name = args.model_name_or_path[0]
    encoder = load_encoder(name, args, flag=_FLAG)
    ranking = TopK(encode_queries(encoder, queries), args.range_for_sampling[1], gpus=gpus)
    known = PairScores(ranking.queries, *pairs)
    seconds: Counter[str] = Counter()
    near = np.empty((0, 2), dtype=np.int64)
    if near_duplicates:
        duplicates = NearDuplicates(encode_passages(encoder, corpus.texts.at(positives)), args.near_duplicate_threshold)
        _search(encoder, corpus, ranking, [known, duplicates], seconds)
        merge_near_duplicates(duplicates)
        near = np.stack([positives[duplicates.pairs[:, 0]], duplicates.pairs[:, 1]], axis=1)
    else:
        _search(encoder, corpus, ranking, [known], seconds)
    merge_scores(known)
    return Candidates(
        ranking=ranking.positions,
        window_scores=ranking.scores[:, args.range_for_sampling[0] :],
        pair_scores=known.scores,
        near_duplicates=near,
        score=partial(_encoder_scores, encoder, ranking.queries, corpus),
        weights={name: encoder.weights_digest},
        seconds=seconds,
    )


def _fused(
    found: Candidates, queries: Sequence[str], corpus: Corpus, args: argparse.Namespace, gpus: Sequence[int]
) -> Candidates:
    """The same candidates in the order that all models together give them."""
    rankings = [found.ranking]
    for name in args.model_name_or_path[1:]:
        encoder = load_encoder(name, args, flag=_FLAG)
        ranking = TopK(encode_queries(encoder, queries), args.range_for_sampling[1], gpus=gpus)
        _search(encoder, corpus, ranking, [], found.seconds)
        rankings.append(ranking.positions)
        found.weights[name] = encoder.weights_digest
    found = found._replace(ranking=fuse(rankings))
    return found._replace(window_scores=_window_scores(found, args.range_for_sampling[0]))


def _search(
    encoder: Encoder,
    corpus: Corpus,
    ranking: TopK,
    listeners: Sequence[PairScores | NearDuplicates],
    seconds: Counter[str],
) -> None:
    """One pass over the corpus: its texts for the ranking, those beyond it too for the listeners."""
    began = time.monotonic()
    for first, block in encode_own_passages(encoder, corpus.texts):
        seconds["encode"] += time.monotonic() - began
        began = time.monotonic()
        retrievable = block[: max(len(corpus) - first, 0)]
        ranking.add(first, retrievable)
        for listener in listeners:
            listener.add(first, block)
        seconds["search"] += time.monotonic() - began
        began = time.monotonic()
    merge_rankings(ranking)


def _encoder_scores(encoder: Encoder, queries: np.ndarray, corpus: Corpus, pairs: Pairs) -> np.ndarray:
    """Inner products of query embeddings (Q, H) with those of the texts they are paired with."""
    distinct, places = np.unique(pairs.positions, return_inverse=True)
    scores = PairScores(queries, pairs.rows, places)
    for first, block in encode_own_passages(encoder, corpus.texts.at(distinct)):
        scores.add(first, block)
    merge_scores(scores)
    return scores.scores


def _reranker_scores(reranker: Reranker, queries: Sequence[str], corpus: Corpus, pairs: Pairs) -> np.ndarray:
    share = own_share(len(pairs.rows))
    own_queries = [queries[row] for row in pairs.rows[share].tolist()]
    return np.concatenate(gather_objects(reranker.scores(own_queries, corpus.texts.at(pairs.positions[share]))))


def _window_scores(found: Candidates, start: int) -> np.ndarray:
    """Scores of the window of a ranking that has none yet: (Q, W), -inf past the end."""
    window = found.ranking[:, start:]
    scores = np.full(window.shape, -np.inf, dtype=np.float32)
    rows, columns = np.nonzero(window >= 0)
    scores[rows, columns] = found.score(Pairs(rows, window[rows, columns]))
    return scores


def _reranked(
    found: Candidates,
    queries: Sequence[str],
    corpus: Corpus,
    pairs: Pairs,
    args: argparse.Namespace,
) -> Candidates:
    """The same candidates with a cross-encoder's scores, the window in their order."""
    reranker = load_reranker(args.reranker_name_or_path, args)
    began = time.monotonic()
    start = args.range_for_sampling[0]
    found = found._replace(score=partial(_reranker_scores, reranker, queries, corpus))
    scores = _window_scores(found, start)
    order = np.argsort(-scores, axis=1, kind="stable")  # what is past the end stays last
    ranking = found.ranking.copy()
    ranking[:, start:] = np.take_along_axis(ranking[:, start:], order, axis=1)
    pair_scores = found.score(pairs)
    found.weights[args.reranker_name_or_path] = reranker.weights_digest
    found.seconds["rescore"] += time.monotonic() - began
    return found._replace(
        ranking=ranking, window_scores=np.take_along_axis(scores, order, axis=1), pair_scores=pair_scores
    )
