"""What embeds queries and passages: for most models one tower, for those with routes two. Loading them, as flags say.

Shapes: N texts, n of them in a block, H dimensions.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from embedding_finetune.command_line import UserError
from embedding_finetune.data.texts import Instructions
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.calibration import calibrate, check_likeness
from embedding_finetune.model.checkpoint import has_routes
from embedding_finetune.model.checks import check_encoding
from embedding_finetune.model.encoding_kernels import (
    choose_dtype,
    dtype_name,
    leave_out_pooler,
    pack_linear_layers,
    precision,
    prepare_for_encoding,
    working_device,
)
from embedding_finetune.model.limits import first_position
from embedding_finetune.model.loading import EmbeddingModel, load_embedding_model
from embedding_finetune.model.packing import pack_if_possible
from embedding_finetune.model.pretrained import errors_name_the_model, weights_digest
from embedding_finetune.model.routes import Route
from embedding_finetune.model.tokens import TextKind
from embedding_finetune.retrieval.arguments import EncodingOptions
from embedding_finetune.retrieval.store import make_root
from embedding_finetune.retrieval.tower import Tower

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """The tower of queries and that of passages, which are one object for models without routes."""

    queries: Tower
    passages: Tower

    @property
    def device(self) -> torch.device:
        """Where passages are encoded, and searched."""
        return self.passages.device

    @property
    def weights_digest(self) -> str:
        """What identifies the weights: pretrained.weights_digest of the tower, or a digest of both towers'."""
        if self.queries is self.passages:
            return self.queries.weights_digest
        return hashlib.sha256(f"{self.queries.weights_digest} {self.passages.weights_digest}".encode()).hexdigest()

    def encode_queries(self, queries: Sequence[str], instructions: Instructions = None) -> np.ndarray:
        """Embeddings (N, H) float32. Raises UserError when an embedding has no direction: NaN, infinite or zero."""
        return self.queries.encode_queries(queries, instructions)

    def encode_passages(
        self, passages: Sequence[str], share: slice = slice(None), *, quiet: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position of the first passage, embeddings (n, H) float32) block by block, for passages[share].

        quiet: do not log how many were in the store, for passages that are looked up repeatedly. Raises UserError like
        encode_queries.
        """
        return self.passages.encode_passages(passages, share, quiet=quiet)


def load_encoder(name_or_path: str, options: EncodingOptions, *, flag: str, scratch: str | None = None) -> Encoder:
    """Load a model for encoding, as the flags of arguments.add_encoding_arguments say.

    scratch: a temporary folder to keep embeddings in where --embeddings_dir is not given.
    """
    # What cannot be is refused before a model is read.
    choose_dtype(options.dtype, working_device())
    if options.embeddings_dir is not None:
        make_root(options.embeddings_dir)
    if is_routed(name_or_path, options, flag=flag):
        encoder = Encoder(
            load_tower(name_or_path, options, flag=flag, route="query"),
            load_tower(name_or_path, options, flag=flag, route="document"),
        )
    else:
        tower = load_tower(name_or_path, options, flag=flag)
        encoder = Encoder(tower, tower)
    dimensions = encoder.queries.model.dimensions, encoder.passages.model.dimensions
    check_dimensions(*dimensions, what=f"{flag} {name_or_path}")
    keep(encoder.queries, encoder.queries.query, name_or_path, options, scratch)
    keep(encoder.passages, encoder.passages.passage, name_or_path, options, scratch)
    return encoder


def keep(tower: Tower, kind: TextKind, name_or_path: str, options: EncodingOptions, scratch: str | None) -> None:
    """Let a tower keep its embeddings of a kind in --embeddings_dir, or else in a temporary folder if there is one."""
    if options.embeddings_dir is not None:
        name = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path
        tower.keep_embeddings(kind, options.embeddings_dir, name=f"{name}, {precision(options.dtype)}")
    elif scratch is not None:
        tower.keep_embeddings(kind, scratch, is_scratch=True)


def is_routed(name_or_path: str, options: EncodingOptions, *, flag: str) -> bool:
    """Whether a checkpoint has two models, see routes.py. Raises UserError where it cannot be read."""
    with errors_name_the_model(
        name_or_path, flag=flag, cache_dir=options.cache_dir, trust_remote_code=options.trust_remote_code
    ):
        return has_routes(name_or_path, cache_dir=options.cache_dir)


def check_dimensions(query: int, passage: int, *, what: str) -> None:
    """Raise UserError where queries and passages have embeddings of different lengths."""
    if query != passage:
        raise UserError(f"{what}: embeddings of its queries have {query} dimensions, those of its passages {passage}")


def load_tower(name_or_path: str, options: EncodingOptions, *, flag: str, route: Route | None = None) -> Tower:
    """Load one model for encoding, of a checkpoint with two that of a route; it keeps no embeddings."""
    return tower_of(load_by_options(name_or_path, options, flag=flag, route=route), name_or_path, options, flag=flag)


def tower_of(loaded: EmbeddingModel, name_or_path: str, options: EncodingOptions, *, flag: str) -> Tower:
    """What encodes by a model that load_by_options gave, whose weights change their precision."""
    device = working_device()
    dtype = choose_dtype(options.dtype, device)
    digest = weights_digest(loaded.backbone, loaded.projection)  # as they are stored, before they change precision
    model, packed_from = _prepared(loaded, name_or_path, dtype, device, flag=flag, compiled=options.torch_compile)
    return Tower(
        model,
        loaded.tokenizer,
        query_max_len=loaded.query_max_len,
        passage_max_len=loaded.passage_max_len,
        tokens_per_batch=options.tokens_per_batch,
        packed_from=packed_from,
        weights_digest=digest,
        compiled=options.torch_compile,
    )


def load_by_options(
    name_or_path: str, options: EncodingOptions, *, flag: str, route: Route | None = None
) -> EmbeddingModel:
    """Load what a tower is made of, with its weights as they are stored."""
    options = _of_route(options, route)
    return load_embedding_model(
        name_or_path,
        flag=flag,
        route=route,
        given={
            "pooling": options.sentence_pooling_method,
            "normalized": options.normalized,
            "query_instruction": options.query_instruction_for_retrieval,
            "passage_instruction": options.passage_instruction_for_retrieval,
            "truncate_dim": options.truncate_dim,
        },
        query_max_len=options.query_max_len,
        passage_max_len=options.passage_max_len,
        cache_dir=options.cache_dir,
        trust_remote_code=options.trust_remote_code,
    )


def _of_route(options: EncodingOptions, route: Route | None) -> EncodingOptions:
    """The options without those about what the other route embeds: they are checked against a model and told."""
    if route == "query":
        return replace(options, passage_max_len=None, passage_instruction_for_retrieval=None)
    if route == "document":
        return replace(options, query_max_len=None, query_instruction_for_retrieval=None)
    return options


def _prepared(
    loaded: EmbeddingModel, name: str, dtype: torch.dtype, device: torch.device, *, flag: str, compiled: bool
) -> tuple[BiEncoder, int | None]:
    """The model in its precision and tried, and the position id of a text's first token if it takes packed texts."""
    backbone, tokenizer, limit = loaded.backbone, loaded.tokenizer, loaded.length_limit
    leave_out_pooler(backbone)
    position = first_position(backbone)
    packs = not compiled and pack_if_possible(backbone, tokenizer, device, dtype, first_position=position, limit=limit)
    packed_from = position if packs else None
    how = f"{dtype_name(dtype)} on {device.type}" + (", texts end to end" if packs else "")
    folder = loaded.config.backbone_folder
    logger.info("%s: encoding in %s", os.path.join(name, folder) if folder else name, how)
    model = BiEncoder(backbone, loaded.config, projection=loaded.projection).eval()
    what = f"{flag} {name}"
    calibration = calibrate(model, tokenizer, limit=limit, what=what) if dtype == torch.int8 else None
    prepare_for_encoding(backbone, dtype=dtype, device=device, torch_compile=compiled, calibration=calibration)
    loaded.projection.to(device)
    if device.type == "cpu" and not compiled:
        pack_linear_layers(loaded.projection)
    if calibration is not None:
        cosine = check_likeness(model, tokenizer, calibration, limit=limit, what=what)
        logger.info("int8: the smallest cosine to float32 is %.4f among the texts it was tried on", cosine)
    check_encoding(model, tokenizer, dtype=dtype, limit=limit, what=what, packed_from=packed_from)
    return model, packed_from
