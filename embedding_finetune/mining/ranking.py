"""What mining chooses from: every row's ranked candidates with their scores, by one retriever or several.

Under torchrun every process takes part in each function here, and all get the same result.

Shapes: Q rows, each with one query; k ranks, of which the last W are the sampling window; P pairs of a row and a text.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from embedding_finetune.command_line import scratch_folder
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.distributed import gather_objects, own_gpu, own_share
from embedding_finetune.mining.arguments import MiningOptions
from embedding_finetune.mining.stopwatch import Stopwatch
from embedding_finetune.retrieval.encoder import Encoder, load_encoder
from embedding_finetune.retrieval.reranker import Reranker, load_reranker
from embedding_finetune.retrieval.shared_search import (
    encode_own_passages,
    encode_passages,
    encode_queries,
    merge_near_duplicates,
    merge_rankings,
    merge_scores,
)
from embedding_finetune.retrieval.top_k import NearDuplicates, PairScores, TopK, fuse, gpus_to_search_on

_FLAG = "--model_name_or_path"


class Pairs(NamedTuple):
    """Rows and positions of texts in the corpus: (P,) int64 each."""

    rows: np.ndarray
    positions: np.ndarray


Score = Callable[[Pairs], np.ndarray]
"""Scores pairs: (P,) float32."""


class Candidates(NamedTuple):
    """Rankings and scores of all rows.

    ranking: (Q, k) positions, best first, -1 past the end. window_scores: (Q, W), of its last W places, -inf past the
    end. pair_scores: (P,), of the pairs that were asked for. near_duplicates: (n, 2), a positive's position and that of
    a passage as good as equal to it. score: scores other pairs in the same way. weights: digests of the models, by
    name.
    """

    ranking: np.ndarray
    window_scores: np.ndarray
    pair_scores: np.ndarray
    near_duplicates: np.ndarray
    score: Score
    weights: dict[str, str]

    @property
    def window(self) -> tuple[int, int]:
        """The ranks [start, stop) to sample from, as far as the corpus goes."""
        ranks = self.ranking.shape[1]
        return ranks - self.window_scores.shape[1], ranks


def rank_candidates(
    queries: Sequence[str],
    corpus: Corpus,
    pairs: Pairs,
    positives: np.ndarray,
    options: MiningOptions,
    stopwatch: Stopwatch,
) -> Candidates:
    """Rank the corpus for every query and score `pairs`, as mine_hard_neg.py's flags say.

    positives: positions, whose near-duplicates are looked for. With several models the ranking is their reciprocal-rank
    fusion, and scores and near-duplicates are the first one's. A reranker rescores the window and the pairs, and puts
    the window in the order of its scores. No ranking is wider than the corpus, whatever --range_for_sampling says.
    Laps of the stopwatch are "load", "encode", "search" and "rescore".
    """
    start, stop = options.range_for_sampling
    options = replace(options, range_for_sampling=(min(start, len(corpus)), min(stop, len(corpus))))
    gpus = gpus_to_search_on(own_gpu()) if options.use_gpu_for_searching else ()
    found = _first_retriever(queries, corpus, pairs, positives, options, gpus, stopwatch)
    if len(options.model_name_or_path) > 1:
        found = _fused(found, queries, corpus, options, gpus, stopwatch)
    if options.reranker_name_or_path is not None:
        reranker = load_reranker(options.reranker_name_or_path, options)
        stopwatch.lap("load")
        found = _reranked(found, reranker, queries, corpus, pairs, stopwatch)
        found = found._replace(weights={**found.weights, options.reranker_name_or_path: reranker.weights_digest})
    return found


def _first_retriever(
    queries: Sequence[str],
    corpus: Corpus,
    pairs: Pairs,
    positives: np.ndarray,
    options: MiningOptions,
    gpus: Sequence[int],
    stopwatch: Stopwatch,
) -> Candidates:
    name = options.model_name_or_path[0]
    encoder = load_encoder(name, options, flag=_FLAG, scratch=_scratch(options))
    stopwatch.lap("load")
    top = TopK(encode_queries(encoder, queries), options.range_for_sampling[1], gpus=gpus)
    known = PairScores(top.queries, *pairs)
    near = np.empty((0, 2), dtype=np.int64)
    if options.near_duplicate_threshold is not None:
        embeddings = encode_passages(encoder, corpus.texts.at(positives), _own_part(positives, corpus))
        duplicates = NearDuplicates(embeddings, options.near_duplicate_threshold)
        _search(encoder, corpus, top, [known, duplicates], stopwatch)
        merge_near_duplicates(duplicates)
        near = np.stack([positives[duplicates.pairs[:, 0]], duplicates.pairs[:, 1]], axis=1)
    else:
        _search(encoder, corpus, top, [known], stopwatch)
    merge_scores(known)
    stopwatch.lap("search")
    ranking = top.ranking()
    return Candidates(
        ranking=ranking.positions,
        window_scores=ranking.scores[:, options.range_for_sampling[0] :],
        pair_scores=known.scores,
        near_duplicates=near,
        score=partial(_encoder_scores, encoder, top.queries, corpus, stopwatch),
        weights={name: encoder.weights_digest},
    )


def _scratch(options: MiningOptions) -> str | None:
    """A folder for embeddings where the first model looks at some texts twice: they are encoded once all the same."""
    filters = (options.max_score, options.min_score, options.absolute_margin, options.relative_margin)
    scores_count = options.reranker_name_or_path is None and any(limit is not None for limit in filters)
    if options.near_duplicate_threshold is None and len(options.model_name_or_path) == 1 and not scores_count:
        return None
    return tempfile.mkdtemp(dir=scratch_folder())


def _fused(
    found: Candidates,
    queries: Sequence[str],
    corpus: Corpus,
    options: MiningOptions,
    gpus: Sequence[int],
    stopwatch: Stopwatch,
) -> Candidates:
    """The same candidates in the order that all models together give them."""
    rankings = [found.ranking]
    for name in options.model_name_or_path[1:]:
        encoder = load_encoder(name, options, flag=_FLAG)
        stopwatch.lap("load")
        top = TopK(encode_queries(encoder, queries), options.range_for_sampling[1], gpus=gpus)
        _search(encoder, corpus, top, [], stopwatch)
        rankings.append(top.ranking().positions)
        found = found._replace(weights={**found.weights, name: encoder.weights_digest})
    found = found._replace(ranking=fuse(rankings))
    stopwatch.lap("search")
    return found._replace(window_scores=_window_scores(found, options.range_for_sampling[0]))


def _search(
    encoder: Encoder,
    corpus: Corpus,
    top: TopK,
    listeners: Sequence[PairScores | NearDuplicates],
    stopwatch: Stopwatch,
) -> None:
    """One pass over the corpus: its texts for the ranking, those beyond it too for the listeners."""
    for first, block in encode_own_passages(encoder, corpus.texts):
        stopwatch.lap("encode")  # with the queries, before the first block
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
    """Inner products of query embeddings (Q, H) with those of the texts they are paired with."""
    distinct, places = np.unique(pairs.positions, return_inverse=True)
    scores = PairScores(queries, pairs.rows, places)
    stopwatch.lap("search")
    for first, block in encoder.encode_passages(corpus.texts.at(distinct), _own_part(distinct, corpus), quiet=True):
        stopwatch.lap("encode")
        scores.add(first, block)
        stopwatch.lap("search")
    merge_scores(scores)
    stopwatch.lap("search")
    return scores.scores


def _own_part(positions: np.ndarray, corpus: Corpus) -> slice:
    """Of positions in ascending order, those whose texts this process encodes when it searches, and may have stored."""
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


def _window_scores(found: Candidates, start: int) -> np.ndarray:
    """Scores of the window of a ranking that has none yet: (Q, W), -inf past the end."""
    window = found.ranking[:, start:]
    scores = np.full(window.shape, -np.inf, dtype=np.float32)
    rows, columns = np.nonzero(window >= 0)
    scores[rows, columns] = found.score(Pairs(rows, window[rows, columns]))
    return scores


def _reranked(
    found: Candidates,
    reranker: Reranker,
    queries: Sequence[str],
    corpus: Corpus,
    pairs: Pairs,
    stopwatch: Stopwatch,
) -> Candidates:
    """The same candidates with a cross-encoder's scores, the window in their order."""
    start = found.window[0]
    found = found._replace(score=partial(_reranker_scores, reranker, queries, corpus, stopwatch))
    scores = _window_scores(found, start)
    order = np.argsort(-scores, axis=1, kind="stable")  # what is past the end stays last
    ranking = found.ranking.copy()
    ranking[:, start:] = np.take_along_axis(ranking[:, start:], order, axis=1)
    pair_scores = found.score(pairs)
    stopwatch.lap("rescore")
    return found._replace(
        ranking=ranking, window_scores=np.take_along_axis(scores, order, axis=1), pair_scores=pair_scores
    )
