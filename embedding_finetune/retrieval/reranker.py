"""Scores of query/passage pairs by a cross-encoder, which reads both texts together.

Shapes: P pairs, T tokens of a batch's longest pair.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from embedding_finetune.command_line import UserError
from embedding_finetune.model.checks import TRIED_TEXT, check_scores
from embedding_finetune.model.encoding_kernels import (
    choose_dtype,
    prepare_for_encoding,
    working_device,
)
from embedding_finetune.model.limits import length_limit
from embedding_finetune.model.padding import batches_of_one_length, padded_length
from embedding_finetune.model.pretrained import errors_name_the_model, load_config, load_pretrained, weights_digest
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
_TRIED_TOKENS = 17
"""Of the pair that a model is tried on. They get the most padding that a pair has, 7 tokens: see LENGTH_STEP."""

Pair = Mapping[str, list[int]]
"""input_ids, attention_mask and what else the tokenizer gives, each as long as the pair has tokens."""


class Reranker:
    """A sequence classifier with one logit, which is the score of a pair of texts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        padding: "PairPadding",
        max_length: int,
        tokens_per_batch: int | None,
        weights_digest: str,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.budget = TokenBudget(tokens_per_batch, model.device)
        self.weights_digest = weights_digest
        self._pad = padding

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
        pairs = tokenized_pairs(self.tokenizer, queries, passages, self.max_length)
        lengths = [len(pair["input_ids"]) for pair in pairs]
        scores = np.empty(len(lengths), dtype=np.float32)
        # Batches of one padded length: a pair's score does not depend on its neighbours.
        for rows in batches_of_one_length(lengths, self.budget.tokens, limit=self.max_length):
            length = padded_length(lengths[rows[0]], self.max_length)
            parts = self.budget.within(
                [pairs[row] for row in rows],
                lambda part, length=length: len(part) * length,  # type: ignore[misc]
                lambda part, length=length: self._logits(part, length),  # type: ignore[misc]
            )
            scores[rows] = np.concatenate(list(parts))
            progress.update(len(rows))
        return scores

    def _logits(self, pairs: Sequence[Pair], length: int) -> np.ndarray:
        """Logits of pairs padded to this length: (n,)."""
        batch = {name: tensor.to(self.model.device) for name, tensor in self._pad(pairs, length).items()}  # (n, T) each
        with torch.no_grad():
            logits: np.ndarray = self.model(**batch).logits[:, 0].float().cpu().numpy()
        return logits


class PairPadding:
    """Pads tokenized pairs for a classifier, on the tokenizer's own side. The tokenizer needs no padding token.

    A decoder's score is that of a pair's last token. Its classifier looks for the last token that is not the config's
    padding id, and not at the mask. Where the config has no such id, it is told one that no pair of the batch ends
    with, the tokenizer's if possible: so each pair has the score that it has alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = model.config.get_text_config()
        own = getattr(self._config, "pad_token_id", None)
        self._own_id = own if own is not None and own >= 0 else None
        self._tokenizer = tokenizer

    def __call__(self, pairs: Sequence[Pair], length: int) -> dict[str, Tensor]:
        """All fields of the pairs, (n, T) int64 each, with T = length, which no pair exceeds."""
        filling = {"input_ids": self._padding_id(pairs), "token_type_ids": self._tokenizer.pad_token_type_id}
        batch = {}
        for name in pairs[0]:
            rows = np.full((len(pairs), length), filling.get(name, 0), dtype=np.int64)
            for row, pair in zip(rows, pairs):
                count = len(pair[name])
                row[length - count if self._tokenizer.padding_side == "left" else 0 :][:count] = pair[name]
            batch[name] = torch.from_numpy(rows)
        return batch

    def to_try(self, limit: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A pair alone, and the same pair before a shorter one, both padded to the next multiple of 8."""
        length = max(min(_TRIED_TOKENS, limit - 1), 1)
        query, passage = TRIED_TEXT.split(",")
        pairs = tokenized_pairs(self._tokenizer, [query, "how"], [passage, "who"], length)
        longest = max(len(pair["input_ids"]) for pair in pairs)
        return self(pairs[:1], len(pairs[0]["input_ids"])), self(pairs, padded_length(longest, limit))

    def _padding_id(self, pairs: Sequence[Pair]) -> int:
        if self._own_id is not None:
            return self._own_id
        last = {pair["input_ids"][-1] for pair in pairs}
        ids = (number for number in (self._tokenizer.pad_token_id, *range(len(last) + 1)) if number is not None)
        self._config.pad_token_id = next(number for number in ids if number not in last)
        return int(self._config.pad_token_id)


def tokenized_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], passages: Sequence[str], max_length: int
) -> list[Pair]:
    """The pairs as the model takes them, not padded. Of a pair that is too long, the longer text is cut."""
    fields = tokenizer(
        list(queries), list(passages), truncation="longest_first", max_length=max_length, padding=False, verbose=False
    )
    return [{name: fields[name][row] for name in fields} for row in range(len(queries))]


def check_reranker(name_or_path: str, options: EncodingOptions) -> None:
    """Raise UserError unless the model's config says that it has one logit. No weights are read."""
    hub: dict[str, Any] = {"cache_dir": options.cache_dir, "trust_remote_code": options.trust_remote_code}
    with errors_name_the_model(name_or_path, flag=_FLAG, **hub):
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
    padding = PairPadding(model, tokenizer)
    check_scores(model, tokenizer, partial(padding.to_try, limit), what=f"{_FLAG} {name_or_path}")
    digest = weights_digest(model)
    device = working_device()
    dtype = choose_dtype("auto" if options.dtype == "int8" else options.dtype, device)
    logger.info("%s: rescoring in %s on %s", name_or_path, str(dtype).removeprefix("torch."), device.type)
    prepare_for_encoding(model, dtype=dtype, device=device, torch_compile=options.torch_compile)
    check_scores(model, tokenizer, partial(padding.to_try, limit), what=f"{_FLAG} {name_or_path}")
    return Reranker(
        model,
        tokenizer,
        padding=padding,
        max_length=limit,
        tokens_per_batch=options.tokens_per_batch,
        weights_digest=digest,
    )
