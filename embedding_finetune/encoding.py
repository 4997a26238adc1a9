"""Texts -> embeddings, in length-sorted batches of a bounded number of tokens.

Shapes: N texts, H dimensions.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from embedding_finetune.batching import batches_by_length, pad, tokenize
from embedding_finetune.model import BiEncoder, check_max_length, length_limit, load_backbone

logger = logging.getLogger(__name__)

TEXTS_PER_BLOCK = 32_768
"""Passages that are tokenized, encoded and searched together; bounds memory, changes no result."""


class Encoder:
    """A bi-encoder ready to embed queries and passages, each with its own instruction and length."""

    def __init__(
        self,
        model: BiEncoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        query_max_len: int,
        passage_max_len: int,
        tokens_per_batch: int,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.query_max_len = query_max_len
        self.passage_max_len = passage_max_len
        self.tokens_per_batch = tokens_per_batch

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """(N, H) float32."""
        with _progress("queries", len(queries)) as progress:
            return self._encode(queries, self.model.embedding_config.query_instruction, self.query_max_len, progress)

    def encode_passages(self, passages: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position of its first passage, embeddings (n, H) float32) block by block."""
        with _progress("passages", len(passages)) as progress:
            for start in range(0, len(passages), TEXTS_PER_BLOCK):
                block = passages[start : start + TEXTS_PER_BLOCK]
                instruction = self.model.embedding_config.passage_instruction
                yield (start, self._encode(block, instruction, self.passage_max_len, progress))

    def _encode(self, texts: Sequence[str], instruction: str, max_length: int, progress: tqdm) -> np.ndarray:
        token_ids = tokenize(
            self.tokenizer,
            texts,
            instruction=instruction,
            max_length=max_length,
            lower_case=self.model.embedding_config.lower_case,
        )
        # Texts with the same tokens are encoded once, so that they tie exactly wherever they are compared.
        rows_of: dict[tuple[int, ...], int] = {}
        rows = np.array([rows_of.setdefault(tuple(ids), len(rows_of)) for ids in token_ids], dtype=np.int64)
        distinct = list(rows_of)
        copies = np.bincount(rows, minlength=len(distinct))
        embeddings = np.empty((len(distinct), self.model.backbone.config.hidden_size), dtype=np.float32)
        for batch in batches_by_length([len(ids) for ids in distinct], self.tokens_per_batch):
            embeddings[batch] = self._forward([distinct[row] for row in batch])
            progress.update(int(copies[batch].sum()))
        return embeddings[rows]

    @torch.no_grad()
    def _forward(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        device = self.model.backbone.device
        batch = {
            name: tensor.to(device)
            for name, tensor in pad(
                self.tokenizer, token_ids, limit=max(self.query_max_len, self.passage_max_len)
            ).items()
        }
        return self.model.encode(**batch).float().cpu().numpy()


def load_encoder(name_or_path: str, args: argparse.Namespace, *, flag: str) -> Encoder:
    """Load a model for encoding, with what the flags of arguments.add_encoding_arguments say."""
    backbone, tokenizer, config = load_backbone(
        name_or_path, flag=flag, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    limit = length_limit(backbone, tokenizer)
    check_max_length("--query_max_len", args.query_max_len or 0, limit)
    check_max_length("--passage_max_len", args.passage_max_len or 0, limit)
    config = config.with_flags(
        pooling=args.sentence_pooling_method,
        normalized=args.normalized,
        query_instruction=args.query_instruction_for_retrieval,
        passage_instruction=args.passage_instruction_for_retrieval,
    )
    default_length = min(config.max_seq_length or limit, limit)
    model = BiEncoder(backbone, config).eval().to(torch.accelerator.current_accelerator() or "cpu")
    return Encoder(
        model,
        tokenizer,
        query_max_len=args.query_max_len or default_length,
        passage_max_len=args.passage_max_len or default_length,
        tokens_per_batch=args.tokens_per_batch,
    )


def _progress(what: str, count: int) -> tqdm:
    return tqdm(total=count, desc=f"Encoding {what}", unit="text", disable=not count)
