"""Scores of query/passage pairs by a cross-encoder, which reads both texts together.

Shapes: P pairs, T tokens of a batch's longest pair.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from embedding_finetune.command_line import UserError
from embedding_finetune.model.checks import check_scores
from embedding_finetune.model.encoding_kernels import (
    choose_dtype,
    prepare_for_encoding,
    working_device,
)
from embedding_finetune.model.limits import length_limit
from embedding_finetune.model.loading import errors_name_the_model, load_config, load_pretrained, weights_digest
from embedding_finetune.model.padding import batches_of_one_length, padded_length
from embedding_finetune.model.tokens import pair_beginnings
from embedding_finetune.progress import Progress
from embedding_finetune.retrieval.arguments import EncodingOptions
from embedding_finetune.retrieval.budget import TokenBudget

logger = logging.getLogger(__name__)

_FLAG = "--reranker_name_or_path"
_REMEDY = "give a cross-encoder such as BAAI/bge-reranker-base"
_TOKENS_PER_PAIR = 512
"""Longer pairs are cut: rerankers are trained on no more, and longer pairs take more time."""
_PAIRS_PER_BLOCK = 8192
"""Pairs that are tokenized and sorted by length together. It bounds memory, and changes no score."""


class Reranker:
    """A sequence classifier with one logit, which is the score of a pair of texts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        tokens_per_batch: int | None,
        weights_digest: str,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.budget = TokenBudget(tokens_per_batch, model.device)
        self.weights_digest = weights_digest

    def scores(self, queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
        """The logit of each pair, without a sigmoid: (P,) float32. In a pair that is too long, the longer text is cut.

        Raises UserError when a score is not a finite number.
        """
        scores = np.empty(len(queries), dtype=np.float32)
        with Progress(len(scores), "Rescoring", "pair") as progress:
            for first in range(0, len(scores), _PAIRS_PER_BLOCK):
                part = slice(first, first + _PAIRS_PER_BLOCK)
                scores[part] = self._scores_of_block(queries[part], passages[part], progress)
        if not np.isfinite(scores).all():
            pair = int(np.argmin(np.isfinite(scores)))
            raise UserError(
                f"{_FLAG}: the score of {queries[pair][:60]!r} and {passages[pair][:60]!r} is {scores[pair]}; "
                "the model's weights are damaged, or they need --dtype float32"
            )
        return scores

    def _scores_of_block(self, queries: Sequence[str], passages: Sequence[str], progress: Progress) -> np.ndarray:
        queries, passages = pair_beginnings(self.tokenizer, queries, passages, self.max_length)
        pairs = self.tokenizer(queries, passages, truncation="longest_first", max_length=self.max_length, padding=False)
        lengths = [len(ids) for ids in pairs["input_ids"]]
        scores = np.empty(len(lengths), dtype=np.float32)
        # Batches of one padded length: a pair's score does not depend on its neighbours.
        for rows in batches_of_one_length(lengths, self.budget.tokens, limit=self.max_length):
            length = padded_length(lengths[rows[0]], self.max_length)
            batch = [{name: pairs[name][row] for name in pairs} for row in rows]
            parts = self.budget.within(
                batch,
                lambda part, length=length: len(part) * length,  # type: ignore[misc]
                lambda part, length=length: self._logits(part, length),  # type: ignore[misc]
            )
            scores[rows] = np.concatenate(list(parts))
            progress.update(len(rows))
        return scores

    def _logits(self, pairs: Sequence[Mapping[str, list[int]]], length: int) -> np.ndarray:
        """Logits of pairs padded to this length: (n,)."""
        batch = self.tokenizer.pad(pairs, padding="max_length", max_length=length, return_tensors="pt")  # (n, T)
        with torch.no_grad():
            logits: np.ndarray = self.model(**batch.to(self.model.device)).logits[:, 0].float().cpu().numpy()
        return logits


def check_reranker(name_or_path: str, options: EncodingOptions) -> None:
    """Raise UserError unless the model's config says that it has one logit. No weights are read."""
    hub: dict[str, Any] = {"cache_dir": options.cache_dir, "trust_remote_code": options.trust_remote_code}
    with errors_name_the_model(AutoModelForSequenceClassification, name_or_path, flag=_FLAG, **hub):
        config = load_config(name_or_path, **hub)
    if config.num_labels != 1:
        raise UserError(
            f"{_FLAG} {name_or_path}: its config says {config.num_labels} logits, but a reranker has one; {_REMEDY}"
        )


def load_reranker(name_or_path: str, options: EncodingOptions) -> Reranker:
    """Load a cross-encoder, with dtype and batches as the flags of arguments.add_encoding_arguments say."""
    model, tokenizer = load_pretrained(
        AutoModelForSequenceClassification,
        name_or_path,
        flag=_FLAG,
        remedy=_REMEDY,
        cache_dir=options.cache_dir,
        trust_remote_code=options.trust_remote_code,
    )
    limit = min(length_limit(model.base_model, tokenizer), _TOKENS_PER_PAIR)
    check_scores(model, tokenizer, limit=limit, what=f"{_FLAG} {name_or_path}")
    digest = weights_digest(model)
    device = working_device()
    dtype = choose_dtype(options.dtype, device)
    logger.info("%s: rescoring in %s on %s", name_or_path, str(dtype).removeprefix("torch."), device.type)
    prepare_for_encoding(model, dtype=dtype, device=device, torch_compile=options.torch_compile)
    check_scores(model, tokenizer, limit=limit, what=f"{_FLAG} {name_or_path}")
    return Reranker(
        model,
        tokenizer,
        max_length=limit,
        tokens_per_batch=options.tokens_per_batch,
        weights_digest=digest,
    )
