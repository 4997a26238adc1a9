"""One model: texts -> embeddings, block by block.

While a block is encoded, a thread reads and tokenizes the next one. Texts whose embeddings are in the store are not
encoded again.

Shapes: N texts, H dimensions.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError
from embedding_finetune.data.texts import Instructions, raw_digests
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.tokens import TextKind, Tokens, text_kinds
from embedding_finetune.progress import Progress
from embedding_finetune.retrieval.block_keeper import BlockKeeper, has_direction
from embedding_finetune.retrieval.store import EmbeddingStore
from embedding_finetune.retrieval.store_settings import kind_settings, model_settings
from embedding_finetune.retrieval.token_encoder import TokenEncoder

logger = logging.getLogger(__name__)

T = TypeVar("T")

TEXTS_PER_BLOCK = 8192
"""Texts that are tokenized, encoded, searched and stored together. It bounds memory, and changes no result."""
_ON_AN_ACCELERATOR = 4
"""Times as many there: of 8192 texts a batch of one length would often be too small for it."""

_SHOWN_CHARACTERS = 60


@dataclass
class Block:
    """Texts ready for the model: the embeddings from the store, and the tokens of the texts it does not hold."""

    start: int
    texts: Sequence[str]
    instructions: Instructions
    embeddings: np.ndarray  # (n, H), the rows `missing` are filled in later
    missing: np.ndarray  # (m,)
    tokens: list[Tokens]  # of the missing texts
    cut: int  # how many of the missing texts were longer than max_length


class Tower:
    """A bi-encoder ready to embed texts: queries, passages or both, each kind with its own instruction and length.

    tokens_per_batch, packed_from: as in TokenEncoder. weights_digest: pretrained.weights_digest of the weights as they
    are stored, which `settings` needs. compiled: whether torch has compiled the model.
    """

    def __init__(
        self,
        model: BiEncoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        query_max_len: int,
        passage_max_len: int,
        tokens_per_batch: int | None = None,
        packed_from: int | None = None,
        weights_digest: str = "",
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._tokens = TokenEncoder(model, tokenizer, tokens_per_batch=tokens_per_batch, packed_from=packed_from)
        self.weights_digest = weights_digest
        self._compiled = compiled
        self.query, self.passage = text_kinds(
            model.embedding_config, query_max_len=query_max_len, passage_max_len=passage_max_len
        )
        self.stores: dict[str, EmbeddingStore] = {}  # by TextKind.name

    @property
    def device(self) -> torch.device:
        """Where the model encodes."""
        return self.model.backbone.device

    def settings(self, kind: TextKind) -> dict[str, Any]:
        """What decides the embedding of a text of a kind: where two towers' are equal, so are their embeddings."""
        return {**self._settings, **kind_settings(kind)}

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        if not self.weights_digest:
            raise ValueError("embeddings are told apart by weights_digest: without it two models would share them")
        return model_settings(self.model, self.tokenizer, weights_digest=self.weights_digest, compiled=self._compiled)

    @property
    def index_digest(self) -> str:
        """What identifies its embeddings of passages: an index of a tower serves all towers where it is equal."""
        settings = json.dumps(self.settings(self.passage), sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()

    def keep_embeddings(self, kind: TextKind, root: str, *, name: str = "", is_scratch: bool = False) -> None:
        """Reuse the embeddings of a kind that earlier runs kept in the folder `root`, and keep new ones there.

        name: the model's, for people. is_scratch: the folder is temporary, and the user did not ask for it.
        """
        self.stores[kind.name] = EmbeddingStore(
            root, self.settings(kind), dimensions=self.model.dimensions, model=name, is_scratch=is_scratch
        )

    def encode_queries(self, queries: Sequence[str], instructions: Instructions = None) -> np.ndarray:
        """Embeddings (N, H) float32. Raises UserError when an embedding has no direction: NaN, infinite or zero."""
        blocks = [block for _, block in self._encode(queries, self.query, slice(None), instructions)]
        return np.concatenate(blocks) if blocks else np.empty((0, self.model.dimensions), np.float32)

    def encode_passages(
        self, passages: Sequence[str], share: slice = slice(None), *, quiet: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position of the first passage, embeddings (n, H) float32) block by block, for passages[share].

        quiet: do not log how many were in the store, for passages that are looked up repeatedly. Raises UserError like
        encode_queries.
        """
        yield from self._encode(passages, self.passage, share, quiet=quiet)

    def _encode(
        self,
        texts: Sequence[str],
        kind: TextKind,
        share: slice,
        instructions: Instructions = None,
        *,
        quiet: bool = False,
    ) -> Iterator[tuple[int, np.ndarray]]:
        store = self.stores.get(kind.name)
        if store is not None:
            store.refresh()
        first, stop, _ = share.indices(len(texts))
        parts = list(self._parts(first, stop))
        blocks = (self._prepare(part.start, texts[part], kind, instructions and instructions[part]) for part in parts)
        cut = encoded = 0
        with Progress(stop - first, f"Encoding {kind.name} texts", "text") as progress:
            for block in _one_ahead(blocks):
                progress.skip(len(block.texts) - len(block.missing))
                if len(block.missing):
                    progress.show()
                    self._embed(block, kind, progress)
                cut, encoded = cut + block.cut, encoded + len(block.missing)
                yield block.start, block.embeddings
        if store is not None and encoded:
            store.tidy()
        if store is not None and not store.is_scratch and parts and not quiet:
            logger.info("%d of %d %s texts were in --embeddings_dir", stop - first - encoded, stop - first, kind.name)
        if cut:
            new = "" if encoded == stop - first else "new "  # nobody knows how many of those in the store were cut
            logger.info("%d of %d %s%s texts were cut to %d tokens", cut, encoded, new, kind.name, kind.max_length)

    def _parts(self, first: int, stop: int) -> Iterator[slice]:
        """Blocks of the texts from first to stop; on an accelerator larger ones, after a first that it has soon."""
        size = TEXTS_PER_BLOCK
        while first < stop:
            yield slice(first, min(first + size, stop))
            first += size
            if self.device.type != "cpu":
                size = TEXTS_PER_BLOCK * _ON_AN_ACCELERATOR

    def _prepare(self, start: int, texts: Sequence[str], kind: TextKind, instructions: Instructions) -> Block:
        store = self.stores.get(kind.name)
        if store is None:
            embeddings = np.empty((len(texts), self.model.dimensions), dtype=np.float32)
            missing = np.arange(len(texts))
        else:
            embeddings, is_stored = store.get(texts, instructions)
            missing = np.flatnonzero(~is_stored)
        tokens, cut = kind.tokenize(self.tokenizer, *_at(missing, texts, instructions))
        return Block(start, texts, instructions, embeddings, missing, tokens, cut)

    def _embed(self, block: Block, kind: TextKind, progress: Progress) -> None:
        """Fill in the embeddings of a block's missing texts, and keep them where there is a store."""
        # Texts with the same tokens are encoded once.
        rows_of: dict[Tokens, int] = {}
        rows = np.array([rows_of.setdefault(tokens, len(rows_of)) for tokens in block.tokens], dtype=np.int64)
        copies = np.bincount(rows, minlength=len(rows_of))
        store, keeper = self.stores.get(kind.name), None
        if store is not None:
            keeper = BlockKeeper(store, raw_digests(*_at(block.missing, block.texts, block.instructions)), rows)

        def done(batch: np.ndarray, embeddings: np.ndarray) -> None:
            progress.update(int(copies[batch].sum()))
            if keeper is not None:
                keeper.done(batch, embeddings)

        embeddings = self._tokens.embed(
            list(rows_of), max_length=kind.max_length, with_prompt=kind.include_prompt, done=done
        )
        block.embeddings[block.missing] = embeddings[rows]
        _check_directions(block, kind)
        if keeper is not None:
            keeper.finish(embeddings)


def _at(rows: np.ndarray, texts: Sequence[str], instructions: Instructions) -> tuple[list[str], Instructions]:
    """The texts and instructions of these rows."""
    numbers = rows.tolist()
    return [texts[row] for row in numbers], instructions and [instructions[row] for row in numbers]


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread makes each one while the item before it is in use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def _check_directions(block: Block, kind: TextKind) -> None:
    comparable = has_direction(block.embeddings)
    if comparable.all():
        return
    row = int(np.argmin(comparable))
    embedding = block.embeddings[row]
    value = "too long or too short to be compared" if embedding.any() else "zero"
    value = value if np.isfinite(embedding).all() else "not finite"
    text = block.texts[row]
    raise UserError(
        f"{kind.name} {block.start + row + 1} has an embedding that is {value}: {text[:_SHOWN_CHARACTERS]!r}; "
        "the model's weights are damaged, or they need --dtype float32"
    )
