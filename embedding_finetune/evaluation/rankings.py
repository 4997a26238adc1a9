"""All rankings of an evaluation: each model ranks once, BM25 too, and fusions are made of their rankings."""

import logging
from typing import NamedTuple

import numpy as np

from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.distributed import own_gpu
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.doubts import DEPTH_FOR_DOUBTS
from embedding_finetune.evaluation.files import PASSAGES_PER_QUERY
from embedding_finetune.evaluation.ranking import FUSION_DEPTH, fuse_rankings, rank_corpus, rank_corpus_by_words
from embedding_finetune.evaluation.sizes import Embedded, sizes_of
from embedding_finetune.model.encoding_kernels import working_device
from embedding_finetune.model.training_queries import read_training_queries
from embedding_finetune.retrieval.arguments import BM25
from embedding_finetune.retrieval.encoder import load_encoder
from embedding_finetune.retrieval.faiss_search import import_faiss
from embedding_finetune.retrieval.top_k import Ranking, gpus_to_search_on

logger = logging.getLogger(__name__)


class Rankings(NamedTuple):
    """By --model_name, of the task's queries and of those without an answer.

    By model that embeds texts: weights_digests, how many of the queries it was trained on, and sizes_of, if wanted.
    """

    by_name: dict[str, Ranking]
    of_unanswered: dict[str, Ranking]
    weights_digests: dict[str, str]
    trained_queries: dict[str, int]
    sizes: dict[str, list[Record]]


def rank_all(task: RetrievalTask, options: EvaluationOptions) -> Rankings:
    """Rank the corpus with everything that --model_name names."""
    gpus = gpus_to_search_on(working_device(), use_gpu_for_searching=options.use_gpu_for_searching, own_gpu=own_gpu())
    if options.sizes:
        import_faiss()  # it is needed after everything is encoded
    parts = {name: options.parts_of(name) for name in options.model_name}
    fused = any(len(names) > 1 for names in parts.values())
    for_doubts = 0 if options.doubts_file is None else DEPTH_FOR_DOUBTS
    depth = max(PASSAGES_PER_QUERY, FUSION_DEPTH if fused else 0, for_doubts, *options.cutoffs)
    if fused and max(options.cutoffs) > FUSION_DEPTH:
        logger.warning(
            "warning: fusions look at %d ranks of each model: beyond, their measures are below what they could be",
            FUSION_DEPTH,
        )
    rankings: dict[str, Ranking] = {}
    digests, trained, sizes = {}, {}, {}
    asked, count_answered = task.asked(), len(task.queries)
    for name in options.rankings:
        if name == BM25:
            rankings[name] = rank_corpus_by_words(asked, depth)
            continue
        encoder = load_encoder(name, options, flag="--model_name")
        digests[name] = encoder.weights_digest
        count = task.count_queries_among(read_training_queries(name, cache_dir=options.cache_dir))
        if count:
            logger.warning("warning: %d of %d queries are in the training data of %s", count, len(task.queries), name)
        trained[name] = count
        kept: list[Embedded] = []
        unit = encoder.model.embedding_config.normalized

        def keep(queries: np.ndarray, passages: np.ndarray, kept: list[Embedded] = kept, unit: bool = unit) -> None:
            kept.append(Embedded(queries[:count_answered], passages, unit))

        wanted = options.sizes and name in options.dense_alone
        rankings[name] = rank_corpus(encoder, asked, depth, gpus=gpus, keep=keep if wanted else None)
        if wanted:
            sizes[name] = sizes_of(kept[0], task, options)
    by_name = {
        name: rankings[of[0]] if len(of) == 1 else fuse_rankings([rankings[part] for part in of])
        for name, of in parts.items()
    }
    return Rankings(
        {name: Ranking(*(part[:count_answered] for part in ranking)) for name, ranking in by_name.items()},
        {name: Ranking(*(part[count_answered:] for part in ranking)) for name, ranking in by_name.items()},
        digests,
        trained,
        sizes,
    )
