"""Examples -> batches of queries alone, for passages that stay as they are: each is a number in a pool.

Shapes: B queries, N passages of the pool.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.texts import text_id
from embedding_finetune.model.sub_batches import Layout
from embedding_finetune.model.tokens import TextKind, distinct
from embedding_finetune.training.batches import TrainExample
from embedding_finetune.training.pool_loss import Pairs

_TEXTS_PER_READ = 8192


class Numbers:
    """The place in a pool of each text that has one, by text_id."""

    def __init__(self, pool: Corpus) -> None:
        parts = (pool.texts[first : first + _TEXTS_PER_READ] for first in range(0, len(pool), _TEXTS_PER_READ))
        ids = np.fromiter((text_id(text) for part in parts for text in part), dtype=np.int64, count=len(pool))
        self._places = np.argsort(ids, kind="stable")  # (N,)
        self._ids = ids[self._places]  # (N,)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The places of texts with these ids, -1 for a text that is not there: (any,) int64."""
        found = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[found] == ids, self._places[found], -1)


class QueryCollator:
    """Examples -> the arguments of PoolLoss.forward, and the `rows` and `cut_texts` of EmbedCollator.

    Each example's passages are its positive and all negatives of its row. What numbers passages is numpy's: it stays on
    the host. layout: how texts are laid out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: TextKind,
        passage: TextKind,
        numbers: Numbers,
        *,
        layout: Layout,
    ) -> None:
        self.tokenizer = tokenizer
        self.query, self.passage = query, passage
        self.numbers = numbers
        self.layout = layout

    def __call__(self, items: Sequence[TrainExample | None]) -> dict[str, Any]:
        """Tokenize the distinct queries of the examples, and number their passages."""
        if torch.utils.data.get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the Rust tokenizer warns of forks, and does the same
        examples = [item for item in items if item is not None]
        queries, cut = self.query.tokenize(
            self.tokenizer, [example.query for example in examples], [example.instruction for example in examples]
        )
        texts, numbers = distinct(queries)
        places, laid_out = self.layout(texts)
        targets = self.numbers.of(np.array([example.passage_ids[0] for example in examples]))
        return {
            "texts": laid_out,
            "query_index": torch.from_numpy(places[numbers]),  # (B,)
            "targets": targets,  # (B,)
            "known": self._pairs(example.known_ids for example in examples),
            "negatives": self._pairs(example.passage_ids[1:] for example in examples),
            "rows": np.array([example.row for example in examples]),  # (B,)
            "cut_texts": np.array([[cut, len(queries)], [0, 0]]),  # (2, 2)
        }

    def _pairs(self, ids: Iterable[Sequence[int] | np.ndarray]) -> Pairs:
        """The pairs of each query with the texts of these ids that the pool has."""
        lists = [np.asarray(of_query, dtype=np.int64) for of_query in ids]
        rows = np.repeat(np.arange(len(lists)), [len(of_query) for of_query in lists])
        return Pairs.of(self.numbers.of(np.concatenate(lists)), rows)
