"""Passages that stay as they are while the model of their queries is trained: embedded once, by the model as it is.

Shapes: N passages of the pool, n of them in a block, H dimensions.
"""

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError, first_line, scratch_folder
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.jsonl import Record
from embedding_finetune.distributed import once_per_machine, own_share_of_machine
from embedding_finetune.model.checkpoint import EmbeddingConfig, find_file, read_config, save_route, save_router
from embedding_finetune.model.loading import EmbeddingModel
from embedding_finetune.model.pretrained import weights_digest
from embedding_finetune.model.side_files import TEXT, SideFile, read_json
from embedding_finetune.retrieval.arguments import EncodingOptions
from embedding_finetune.retrieval.encoder import Encoder, check_dimensions, keep, load_by_options, tower_of
from embedding_finetune.retrieval.store import make_root
from embedding_finetune.retrieval.tower import Tower
from embedding_finetune.training.pool_file import PoolFile, new_file

if TYPE_CHECKING:
    from embedding_finetune.training.hardest import Hardest

logger = logging.getLogger(__name__)

PASSAGE_MODEL_FILE = "passage_model.json"
"""Which model an index for this checkpoint was made with."""
_FLAG = "--model_name_or_path"

T = TypeVar("T")


class FrozenPassages:
    """A pool of passages with their embeddings, and the model that made them.

    name: the model's. All processes of a machine share the embeddings. hardest: what finds the passages to train
    against, where these are too many to be all. Raises UserError where the model cannot be loaded, or embeddings cannot
    be written, or its embeddings have not as many dimensions as those of queries.
    """

    def __init__(self, pool: Corpus, name: str, options: EncodingOptions, *, dimensions: int) -> None:
        self.pool = pool
        scratch = None
        if options.embeddings_dir is None:
            scratch = _on_each_machine(_new_folder)
        else:
            make_root(options.embeddings_dir)
        loaded = load_by_options(name, options, flag=_FLAG, route="document")
        self.route, self.config, self.described = _on_each_machine(lambda: _write_route(loaded, name, options))
        self.tower = tower_of(loaded, name, options, flag=_FLAG)
        check_dimensions(dimensions, self.tower.model.dimensions, what=f"{_FLAG} {name}")
        keep(self.tower, self.tower.passage, name, options, scratch)
        self.embeddings = embed_all(self.tower, pool)
        self.hardest: Hardest | None = None

    def facts(self) -> Record:
        """What a run's summary says of them."""
        return {"passages": len(self.pool), "index_sha256": self.tower.index_digest, "model": self.described}

    def encoder_with(self, queries: Tower) -> Encoder:
        """What searches: queries by another model, passages by this one, which finds their embeddings kept."""
        return Encoder(queries, self.tower)

    def write_checkpoint(
        self,
        folder: Path,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EmbeddingConfig,
        projection: torch.nn.Sequential,
    ) -> None:
        """Write a checkpoint of a model for queries and this one for passages into an empty folder."""
        shutil.copytree(self.route, folder, dirs_exist_ok=True)
        save_route(folder, "query", backbone, tokenizer, config, projection)
        save_router(folder, query=config, document=self.config)
        (folder / PASSAGE_MODEL_FILE).write_text(json.dumps(self.described, indent=2) + "\n", encoding="utf-8")


def embed_all(tower: Tower, pool: Corpus) -> PoolFile:
    """The embeddings of a pool (N, H). Each process encodes its share of the machine's.

    Raises UserError where the file cannot be written.
    """
    shape = len(pool), tower.model.dimensions
    path = _on_each_machine(lambda: new_file(4 * shape[0] * shape[1]))
    embeddings = PoolFile(path, shape)
    for first, block in tower.encode_passages(pool.texts, own_share_of_machine(len(pool))):
        with _disk_errors_name_tmpdir():
            embeddings.write(first, block)
    # When all have opened it and written theirs, it needs no name: the system removes it however the run ends.
    once_per_machine(lambda: os.unlink(path))
    return embeddings


def _write_route(loaded: EmbeddingModel, name: str, options: EncodingOptions) -> tuple[str, EmbeddingConfig, Record]:
    """A folder with the model as a checkpoint's route of documents, its config, and what identifies it."""
    _warn_of_another_index(name, options, loaded)
    config = dataclasses.replace(loaded.config, max_seq_length=loaded.passage_max_len, backbone_folder="")
    folder = Path(_new_folder())
    save_route(folder, "document", loaded.backbone, loaded.tokenizer, config, loaded.projection)
    described = {
        "name": _name_of(name, options.cache_dir),
        "weights_sha256": weights_digest(loaded.backbone, loaded.projection),
        "pooling": config.pooling,
        "normalized": config.normalized,
        "instruction": config.passage_instruction,
        "max_seq_length": config.max_seq_length,
    }
    return str(folder), config, described


def _warn_of_another_index(name: str, options: EncodingOptions, loaded: EmbeddingModel) -> None:
    """Log a warning where flags give passages other embeddings than the model gives them by itself."""
    own = read_config(name, route="document", cache_dir=options.cache_dir)
    used = loaded.config
    differs = {
        "--sentence_pooling_method": own.pooling != used.pooling,
        "--normalized": own.normalized != used.normalized,
        "--passage_instruction_for_retrieval": own.passage_instruction != used.passage_instruction,
        "--passage_max_len": loaded.passage_max_len != loaded.own_max_len,
    }
    if flags := [flag for flag, other in differs.items() if other]:
        logger.warning(
            "warning: %s: passages get other embeddings than %s gives them by itself: an index made without that does "
            "not stay valid",
            *(" and ".join(flags), name),
        )


def _name_of(name: str, cache_dir: str | None) -> str:
    """What the model of passages is called, without a path: as a checkpoint of --freeze_passages says it, or itself."""
    said = find_file(name, PASSAGE_MODEL_FILE, cache_dir)
    if said is not None:
        return str(SideFile(said, read_json(said)).field("name", TEXT))
    return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name


def _on_each_machine(write: Callable[[], T]) -> T:
    """What `write` gives, once on each machine. Raises UserError where it cannot write into TMPDIR."""

    def written() -> T:
        with _disk_errors_name_tmpdir():
            return write()

    return once_per_machine(written)


@contextmanager
def _disk_errors_name_tmpdir() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--freeze_passages: TMPDIR cannot take the passages' model and embeddings: {first_line(error)}; make "
            "room, or set it to another folder"
        ) from error


def _new_folder() -> str:
    return tempfile.mkdtemp(dir=scratch_folder())
