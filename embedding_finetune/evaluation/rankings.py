"""All rankings of an evaluation: each model ranks once, BM25 too, and fusions are made of their rankings."""

import logging
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embedding_finetune.command_line import scratch_folder
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.distributed import once_per_machine, own_gpu
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.doubts import DEPTH_FOR_DOUBTS
from embedding_finetune.evaluation.files import PASSAGES_PER_QUERY
from embedding_finetune.evaluation.ranking import FUSION_DEPTH, fuse_rankings, rank_corpus, rank_corpus_by_words
from embedding_finetune.evaluation.sizes import Embedded, sizes_of
from embedding_finetune.model.encoding_kernels import working_device
from embedding_finetune.model.training_queries import read_training_queries
from embedding_finetune.retrieval.arguments import BM25
from embedding_finetune.retrieval.encoder import is_routed, load_encoder
from embedding_finetune.retrieval.faiss_search import import_faiss
from embedding_finetune.retrieval.top_k import Ranking, gpus_to_search_on

logger = logging.getLogger(__name__)


class Rankings(NamedTuple):
    """By --model_name, of the task's queries and of those without an answer.

    By model that embeds texts: weights_digests, Tower.index_digest of its passages, how many of the queries it was
    trained on, and sizes_of, if wanted.
    """

    by_name: dict[str, Ranking]
    of_unanswered: dict[str, Ranking]
    weights_digests: dict[str, str]
    index_digests: dict[str, str]
    trained_queries: dict[str, int]
    sizes: dict[str, list[Record]]


def rank_all(task: RetrievalTask, options: EvaluationOptions) -> Rankings:
    """Rank the corpus with everything that --model_name names."""
    gpus = gpus_to_search_on(working_device(), use_gpu_for_searching=options.use_gpu_for_searching, own_gpu=own_gpu())
    if options.sizes:
        import_faiss()  # it is needed after everything is encoded
    parts = {name: options.parts_of(name) for name in options.model_name}
    depth = _depth(options, fused=any(len(names) > 1 for names in parts.values()))
    scratch = _scratch(options)
    rankings: dict[str, Ranking] = {}
    dense: dict[str, _Dense] = {}
    for name in options.rankings:
        if name == BM25:
            rankings[name] = rank_corpus_by_words(task.asked(), depth)
        else:
            dense[name] = _rank_dense(name, task, depth, options, gpus, scratch)
            rankings[name] = dense[name].ranking
    by_name = {
        name: rankings[of[0]] if len(of) == 1 else fuse_rankings([rankings[part] for part in of])
        for name, of in parts.items()
    }
    answered = len(task.queries)
    return Rankings(
        {name: Ranking(*(part[:answered] for part in ranking)) for name, ranking in by_name.items()},
        {name: Ranking(*(part[answered:] for part in ranking)) for name, ranking in by_name.items()},
        {name: one.weights_digest for name, one in dense.items()},
        {name: one.index_digest for name, one in dense.items()},
        {name: one.trained_queries for name, one in dense.items()},
        {name: one.sizes for name, one in dense.items() if one.sizes is not None},
    )


def _depth(options: EvaluationOptions, *, fused: bool) -> int:
    """How many ranks the flags need of each ranking."""
    if fused and max(options.cutoffs) > FUSION_DEPTH:
        logger.warning(
            "warning: fusions look at %d ranks of each model: beyond, their measures are below what they could be",
            FUSION_DEPTH,
        )
    for_doubts = 0 if options.doubts_file is None else DEPTH_FOR_DOUBTS
    return max(PASSAGES_PER_QUERY, FUSION_DEPTH if fused else 0, for_doubts, *options.cutoffs)


class _Dense(NamedTuple):
    """What Rankings has of a model that embeds texts. sizes: None where they are not wanted."""

    ranking: Ranking
    weights_digest: str
    index_digest: str
    trained_queries: int
    sizes: list[Record] | None


def _scratch(options: EvaluationOptions) -> str | None:
    """A temporary folder for embeddings, where models may share those of passages: these are computed once then."""
    if len(options.dense_models) == 1 or options.embeddings_dir is not None:
        return None
    if not any(is_routed(name, options, flag="--model_name") for name in options.dense_models):
        return None
    return once_per_machine(lambda: tempfile.mkdtemp(dir=scratch_folder()))


def _rank_dense(
    name: str, task: RetrievalTask, depth: int, options: EvaluationOptions, gpus: Sequence[int], scratch: str | None
) -> _Dense:
    encoder = load_encoder(name, options, flag="--model_name", scratch=scratch)
    count = task.count_queries_among(read_training_queries(name, cache_dir=options.cache_dir))
    if count:
        logger.warning("warning: %d of %d queries are in the training data of %s", count, len(task.queries), name)
    kept: list[Embedded] = []

    def keep(queries: np.ndarray, passages: np.ndarray) -> None:
        kept.append(Embedded(queries[: len(task.queries)], passages, encoder.queries.model.embedding_config.normalized))

    wanted = options.sizes and name in options.dense_alone
    ranking = rank_corpus(encoder, task.asked(), depth, gpus=gpus, keep=keep if wanted else None)
    sizes = sizes_of(kept[0], task, options) if wanted else None
    return _Dense(ranking, encoder.weights_digest, encoder.passages.index_digest, count, sizes)
