"""All rankings of an evaluation: each model ranks once, BM25 too, and fusions are made of their rankings."""

import logging
from typing import NamedTuple

from embedding_finetune.data.corpus import RetrievalTask
from embedding_finetune.distributed import own_gpu
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.files import PASSAGES_PER_QUERY
from embedding_finetune.evaluation.ranking import FUSION_DEPTH, fuse_rankings, rank_corpus, rank_corpus_by_words
from embedding_finetune.model.encoding_kernels import working_device
from embedding_finetune.model.training_queries import read_training_queries
from embedding_finetune.retrieval.arguments import BM25
from embedding_finetune.retrieval.encoder import load_encoder
from embedding_finetune.retrieval.top_k import Ranking, gpus_to_search_on

logger = logging.getLogger(__name__)


class Rankings(NamedTuple):
    """By --model_name, of the task's queries and of those without an answer.

    By model that embeds texts: weights_digests, and how many of the queries it was trained on.
    """

    by_name: dict[str, Ranking]
    of_unanswered: dict[str, Ranking]
    weights_digests: dict[str, str]
    trained_queries: dict[str, int]


def rank_all(task: RetrievalTask, options: EvaluationOptions) -> Rankings:
    """Rank the corpus with everything that --model_name names."""
    gpus = gpus_to_search_on(working_device(), use_gpu_for_searching=options.use_gpu_for_searching, own_gpu=own_gpu())
    parts = {name: options.parts_of(name) for name in options.model_name}
    fused = any(len(names) > 1 for names in parts.values())
    depth = max(PASSAGES_PER_QUERY, FUSION_DEPTH if fused else 0, *options.cutoffs)
    rankings: dict[str, Ranking] = {}
    digests, trained = {}, {}
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
        rankings[name] = rank_corpus(encoder, asked, depth, gpus=gpus)
    by_name = {
        name: rankings[of[0]] if len(of) == 1 else fuse_rankings([rankings[part] for part in of])
        for name, of in parts.items()
    }
    return Rankings(
        {name: Ranking(*(part[:count_answered] for part in ranking)) for name, ranking in by_name.items()},
        {name: Ranking(*(part[count_answered:] for part in ranking)) for name, ranking in by_name.items()},
        digests,
        trained,
    )
