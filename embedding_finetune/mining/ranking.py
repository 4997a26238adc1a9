"""What mining chooses from: each row's ranked candidates with their scores, from one model or several.

Under torchrun all processes call each function here together, and get the same result.

Shapes: Q rows, each with one query; k ranks, of which the last W are the sampling window; P pairs of a row and a text.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from embedding_finetune.command_line import scratch_folder
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.texts import Instructions
from embedding_finetune.distributed import gather_objects, own_gpu, own_share
from embedding_finetune.mining.arguments import RankingOptions
from embedding_finetune.mining.candidates import Candidates, Pairs, window_scores
from embedding_finetune.mining.stopwatch import Stopwatch
from embedding_finetune.model.encoding_kernels import working_device
from embedding_finetune.retrieval.arguments import BM25
from embedding_finetune.retrieval.doubts import Witness
from embedding_finetune.retrieval.encoder import Encoder, load_encoder
from embedding_finetune.retrieval.keywords import KeywordIndex
from embedding_finetune.retrieval.reranker import Reranker, load_reranker
from embedding_finetune.retrieval.shared_search import (
    encode_own_passages,
    encode_passages,
    encode_queries,
    index_words,
    merge_near_duplicates,
    merge_rankings,
    merge_scores,
    rank_by_words,
)
from embedding_finetune.retrieval.top_k import NearDuplicates, PairScores, Ranking, TopK, fuse, gpus_to_search_on

_FLAG = "--model_name_or_path"
_RANKS_OF_WITNESS = 20


def rank_candidates(
    queries: Sequence[str],
    corpus: Corpus,
    pairs: Pairs,
    positives: np.ndarray,
    options: RankingOptions,
    stopwatch: Stopwatch,
    instructions: Instructions = None,
    *,
    scratch: str | None = None,
) -> Candidates:
    """Rank the corpus for every query and score `pairs`, as mine_hard_neg.py's flags say.

    positives: positions of the texts whose near-duplicates are wanted. instructions: those of queries for the models;
    BM25 and a reranker read the query alone. With several models the ranking is their reciprocal-rank fusion; scores
    and near-duplicates come from the first that is not BM25. A reranker scores the window and the pairs again, and
    sorts the window by its scores. A ranking is at most as long as the corpus. scratch: a temporary folder that may
    hold embeddings of the first model, and may keep more; None where there is none.
    Laps of the stopwatch are "load", "encode", "search" and "rescore".
    """
    start, stop = options.range_for_sampling
    options = replace(options, range_for_sampling=(min(start, len(corpus)), min(stop, len(corpus))))
    gpus = gpus_to_search_on(working_device(), use_gpu_for_searching=options.use_gpu_for_searching, own_gpu=own_gpu())
    scratch = scratch or _scratch(options)
    # Loaded and tried first: a reranker that does not work is told before an hour of encoding, not after it.
    reranker = None
    if options.reranker_name_or_path is not None:
        reranker = load_reranker(options.reranker_name_or_path, options)
        stopwatch.lap("load")
    if options.dense_models:
        candidates = _rank_with_first_model(
            queries, instructions, corpus, pairs, positives, options, gpus, stopwatch, scratch
        )
    else:
        candidates = _rank_by_words(queries, corpus, pairs, options, stopwatch)
    if len(options.model_name_or_path) > 1:
        candidates = _fuse_with_others(candidates, queries, instructions, corpus, options, gpus, stopwatch)
    if reranker is not None:
        candidates = _rerank(candidates, reranker, queries, corpus, pairs, stopwatch)
        name, reranked = str(options.reranker_name_or_path), candidates.ranking[:, candidates.window[0] :]
        witness = _witness(Ranking(reranked, candidates.window_scores), candidates.pair_scores)
        candidates = candidates._replace(
            weights_digests={**candidates.weights_digests, name: reranker.weights_digest},
            witnesses={**candidates.witnesses, name: witness},
        )
    return candidates


def _rank_with_first_model(
    queries: Sequence[str],
    instructions: Instructions,
    corpus: Corpus,
    pairs: Pairs,
    positives: np.ndarray,
    options: RankingOptions,
    gpus: Sequence[int],
    stopwatch: Stopwatch,
    scratch: str | None,
) -> Candidates:
    name = options.dense_models[0]
    encoder = load_encoder(name, options, flag=_FLAG, scratch=scratch)
    stopwatch.lap("load")
    embedded = encode_queries(encoder, queries, instructions)
    top = TopK(embedded, options.range_for_sampling[1], device=encoder.device, gpus=gpus)
    pair_scores = PairScores(top.queries, *pairs)
    near_duplicates = np.empty((0, 2), dtype=np.int64)
    if options.near_duplicate_threshold is not None:
        embeddings = encode_passages(encoder, corpus.texts.at(positives), _own_part(positives, corpus))
        search = NearDuplicates(embeddings, options.near_duplicate_threshold, device=encoder.device)
        _search(encoder, corpus, top, [pair_scores, search], stopwatch)
        merge_near_duplicates(search)
        near_duplicates = np.stack([positives[search.pairs[:, 0]], search.pairs[:, 1]], axis=1)
    else:
        _search(encoder, corpus, top, [pair_scores], stopwatch)
    merge_scores(pair_scores)
    stopwatch.lap("search")
    ranking = top.ranking()
    return Candidates(
        ranking=ranking.positions,
        window_scores=ranking.scores[:, options.range_for_sampling[0] :],
        pair_scores=pair_scores.scores,
        near_duplicates=near_duplicates,
        score=partial(_encoder_scores, encoder, top.queries, corpus, stopwatch),
        weights_digests={name: encoder.weights_digest},
        witnesses={name: _witness(ranking, pair_scores.scores)},
    )


def _witness(ranking: Ranking, pair_scores: np.ndarray) -> Witness:
    return Witness(Ranking(*(part[:, :_RANKS_OF_WITNESS].copy() for part in ranking)), pair_scores)


def _scratch(options: RankingOptions) -> str | None:
    """A temporary folder for embeddings, where the first model needs some texts twice: it encodes them only once."""
    filters_use_scores = options.reranker_name_or_path is None and options.score_filters.given
    if options.near_duplicate_threshold is None and len(options.model_name_or_path) == 1 and not filters_use_scores:
        return None
    return tempfile.mkdtemp(dir=scratch_folder())


def _rank_by_words(
    queries: Sequence[str], corpus: Corpus, pairs: Pairs, options: RankingOptions, stopwatch: Stopwatch
) -> Candidates:
    """The candidates by BM25 alone, with its scores."""
    index = index_words(corpus.texts)
    start, stop = options.range_for_sampling
    ranking = rank_by_words(index, queries, stop, ties="first", among=len(corpus))
    score = partial(_keyword_scores, index, queries)
    pair_scores = score(pairs)
    candidates = Candidates(
        ranking=ranking.positions,
        window_scores=ranking.scores[:, start:],
        pair_scores=pair_scores,
        near_duplicates=np.empty((0, 2), dtype=np.int64),
        score=score,
        weights_digests={},
        witnesses={BM25: _witness(ranking, pair_scores)},
    )
    stopwatch.lap("search")
    return candidates


def _keyword_scores(index: KeywordIndex, queries: Sequence[str], pairs: Pairs) -> np.ndarray:
    share = own_share(len(pairs.rows))
    return np.concatenate(gather_objects(index.pair_scores(queries, pairs.rows[share], pairs.positions[share])))


def _fuse_with_others(
    candidates: Candidates,
    queries: Sequence[str],
    instructions: Instructions,
    corpus: Corpus,
    options: RankingOptions,
    gpus: Sequence[int],
    stopwatch: Stopwatch,
) -> Candidates:
    """The candidates by the fused ranking of all models, BM25 among them where it is named."""
    rankings, digests = [candidates.ranking], dict(candidates.weights_digests)
    witnesses, unknown = dict(candidates.witnesses), np.full(len(candidates.pair_scores), np.nan)
    stop = options.range_for_sampling[1]

    def add(name: str, ranking: Ranking) -> None:
        rankings.append(ranking.positions)
        witnesses[name] = _witness(ranking, unknown)

    if BM25 in options.model_name_or_path:
        index = index_words(corpus.texts)
        add(BM25, rank_by_words(index, queries, stop, ties="first", among=len(corpus)))
    for name in options.dense_models[1:]:
        encoder = load_encoder(name, options, flag=_FLAG)
        stopwatch.lap("load")
        embedded = encode_queries(encoder, queries, instructions)
        top = TopK(embedded, stop, device=encoder.device, gpus=gpus)
        _search(encoder, corpus, top, [], stopwatch)
        add(name, top.ranking())
        digests[name] = encoder.weights_digest
    candidates = candidates._replace(
        ranking=fuse(rankings, stop).positions, weights_digests=digests, witnesses=witnesses
    )
    stopwatch.lap("search")
    return candidates._replace(window_scores=window_scores(candidates, options.range_for_sampling[0]))


def _search(
    encoder: Encoder,
    corpus: Corpus,
    top: TopK,
    listeners: Sequence[PairScores | NearDuplicates],
    stopwatch: Stopwatch,
) -> None:
    """One pass over the texts: `top` takes those of the corpus, the listeners also those beyond it."""
    for first, block in encode_own_passages(encoder, corpus.texts):
        stopwatch.lap("encode")  # the first such lap includes the queries
        retrievable = block[: max(len(corpus) - first, 0)]
        top.add(first, retrievable)
        for listener in listeners:
            listener.add(first, block)
        stopwatch.lap("search")
    stopwatch.lap("encode")
    merge_rankings(top)


def _encoder_scores(
    encoder: Encoder, queries: np.ndarray, corpus: Corpus, stopwatch: Stopwatch, pairs: Pairs
) -> np.ndarray:
    """Inner products of the pairs' embeddings: (P,). queries: (Q, H)."""
    distinct, places = np.unique(pairs.positions, return_inverse=True)
    pair_scores = PairScores(queries, pairs.rows, places)
    stopwatch.lap("search")
    for first, block in encoder.encode_passages(corpus.texts.at(distinct), _own_part(distinct, corpus), quiet=True):
        stopwatch.lap("encode")
        pair_scores.add(first, block)
        stopwatch.lap("search")
    merge_scores(pair_scores)
    stopwatch.lap("search")
    return pair_scores.scores


def _own_part(positions: np.ndarray, corpus: Corpus) -> slice:
    """The part of ascending positions whose texts this process encodes in a search, and so may have stored."""
    share = own_share(len(corpus.texts))
    return slice(*np.searchsorted(positions, [share.start, share.stop]).tolist())


def _reranker_scores(
    reranker: Reranker, queries: Sequence[str], corpus: Corpus, stopwatch: Stopwatch, pairs: Pairs
) -> np.ndarray:
    share = own_share(len(pairs.rows))
    own_queries = [queries[row] for row in pairs.rows[share].tolist()]
    scores = gather_objects(reranker.scores(own_queries, corpus.texts.at(pairs.positions[share])))
    stopwatch.lap("rescore")
    return np.concatenate(scores)


def _rerank(
    candidates: Candidates,
    reranker: Reranker,
    queries: Sequence[str],
    corpus: Corpus,
    pairs: Pairs,
    stopwatch: Stopwatch,
) -> Candidates:
    """The candidates with a cross-encoder's scores, and the window sorted by them."""
    start = candidates.window[0]
    candidates = candidates._replace(score=partial(_reranker_scores, reranker, queries, corpus, stopwatch))
    scores = window_scores(candidates, start)
    order = np.argsort(-scores, axis=1, kind="stable")  # -inf, past the end of the corpus, stays last
    ranking = candidates.ranking.copy()
    ranking[:, start:] = np.take_along_axis(ranking[:, start:], order, axis=1)
    pair_scores = candidates.score(pairs)
    stopwatch.lap("rescore")
    return candidates._replace(
        ranking=ranking, window_scores=np.take_along_axis(scores, order, axis=1), pair_scores=pair_scores
    )
