"""The flags about encoding and searching, as one value."""

import argparse
import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

from embedding_finetune.command_line import UserError
from embedding_finetune.model.pooling import POOLING_METHODS, PoolingMethod
from embedding_finetune.parser import add_switch, boolean, positive_int

BM25 = "bm25"
"""Stands among the names of models: ranking by words, see keywords.py."""

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """The flags of add_encoding_arguments, by name; None means what the checkpoint says or suits the device."""

    sentence_pooling_method: PoolingMethod | None = None
    normalized: bool | None = None
    query_instruction_for_retrieval: str | None = None
    passage_instruction_for_retrieval: str | None = None
    query_max_len: int | None = None
    passage_max_len: int | None = None
    truncate_dim: int | None = None
    dtype: Dtype = "auto"
    tokens_per_batch: int | None = None
    torch_compile: bool = False
    embeddings_dir: str | None = None
    use_gpu_for_searching: bool = False
    trust_remote_code: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.dtype == "int8" and self.torch_compile:
            raise UserError("--dtype int8 has kernels of its own, which are not compiled: drop --torch_compile")


def check_bm25s(flag: str) -> None:
    """Raise UserError where the package is missing. flag: the one that named BM25."""
    if importlib.util.find_spec("bm25s") is None:
        raise UserError(f"{flag} {BM25} needs the package bm25s: pip install bm25s")


def add_encoding_arguments(parser: argparse.ArgumentParser, *, several_dimensions: bool = False) -> None:
    """Add the flags about encoding and searching.

    several_dimensions: whether --truncate_dim takes several values, for --sizes; it parses to a list then.
    """
    group = parser.add_argument_group("encoding")
    checkpoint = "(default: what the checkpoint says, else %s)"
    group.add_argument(
        "--sentence_pooling_method",
        choices=POOLING_METHODS,
        help="how token states become one vector " + checkpoint % "cls",
    )
    group.add_argument(
        "--normalized", type=boolean, metavar="BOOL", help="scale embeddings to length 1 " + checkpoint % "True"
    )
    group.add_argument(
        "--query_instruction_for_retrieval", metavar="TEXT", help="put before each query " + checkpoint % '""'
    )
    group.add_argument(
        "--passage_instruction_for_retrieval", metavar="TEXT", help="put before each passage " + checkpoint % '""'
    )
    length = "%s are cut to this many tokens (default: the checkpoint's max_seq_length, else its tokenizer's)"
    group.add_argument("--query_max_len", type=positive_int, metavar="N", help=length % "queries")
    group.add_argument("--passage_max_len", type=positive_int, metavar="N", help=length % "passages")
    group.add_argument(
        "--truncate_dim",
        type=positive_int,
        nargs="+" if several_dimensions else None,
        metavar="N",
        help="keep the first N dimensions of embeddings, as models trained with --matryoshka_dims allow"
        + ("; with --sizes several N, which are the dimensions that it measures" if several_dimensions else ""),
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=EncodingOptions.dtype,
        help="precision of the model; auto: bfloat16 where the hardware computes it natively, else float32. "
        "int8: linear layers in 8 bits, on a CPU with VNNI, but not a reranker's, which stays at auto. Pooling, "
        "normalisation and scores are always float32",
    )
    group.add_argument(
        "--tokens_per_batch",
        type=positive_int,
        metavar="N",
        help="tokens that go through the model at once (default: 4096 on CPU, 8192 on MPS, 65536 on CUDA)",
    )
    add_switch(
        group, "--torch_compile", "compile the model; on a CPU this needs g++, and gained nothing where it was measured"
    )
    group.add_argument(
        "--embeddings_dir",
        metavar="DIR",
        help="keep embeddings there, and reuse those of earlier runs with the same weights and settings",
    )
    add_switch(
        group,
        "--use_gpu_for_searching",
        "search with faiss-gpu on all GPUs, not with torch on the GPU that encodes",
    )
    add_switch(group, "--trust_remote_code", "run code that comes with the model")
    group.add_argument("--cache_dir", metavar="DIR", help="where models from the hub are kept")
