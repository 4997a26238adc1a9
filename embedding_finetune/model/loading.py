"""Checkpoints -> modules: the backbone with its tokenizer, and the layers after pooling, checked against the flags."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError
from embedding_finetune.model.adapters import AdapterBase, check_peft, find_adapter, merged_into
from embedding_finetune.model.checkpoint import EmbeddingConfig, find_file, read_config
from embedding_finetune.model.checks import check_states, check_tokenizer
from embedding_finetune.model.limits import check_instructions, check_max_length, check_truncate_dim, length_limit
from embedding_finetune.model.modules import load_projection
from embedding_finetune.model.pretrained import (
    errors_name_the_model,
    load_config,
    load_pretrained,
    log_hub_lookup,
    weights_digest,
)
from embedding_finetune.model.revisions import at_revision
from embedding_finetune.model.routes import Route

_WITH_A_DECODER = ("t5", "mt5", "umt5")
"""Models whose encoder alone embeds texts: sentence-t5, gtr-t5. AutoModel would make the decoder too."""


def load_backbone(
    name_or_path: str,
    *,
    flag: str,
    route: Route | None = None,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EmbeddingConfig]:
    """Load the weights (as float32), tokenizer and embedding config of a folder or hub model.

    An adapter alone is loaded with its base, and merged into it. flag: the flag that gave the name. route: which model
    of a checkpoint that has two, see routes.py. Raises UserError when something cannot be loaded, when weights are
    missing, or when the backbone does not give a state for every token.
    """
    log_hub_lookup(name_or_path, flag)
    hub: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    with errors_name_the_model(name_or_path, flag=flag, **hub):
        base = find_adapter(name_or_path, cache_dir=cache_dir)
    if base is not None:
        return _load_adapted(
            name_or_path, base, flag=flag, tokenizer_name=tokenizer_name, config_name=config_name, **hub
        )
    with errors_name_the_model(name_or_path, flag=flag, **hub):
        config = read_config(name_or_path, route=route, cache_dir=cache_dir)
        described = load_config(
            config_name or name_or_path, subfolder="" if config_name else config.backbone_folder, **hub
        )
    backbone, tokenizer = load_pretrained(
        AutoModelForTextEncoding if described.model_type in _WITH_A_DECODER else AutoModel,
        name_or_path,
        flag=flag,
        remedy="give an encoder's checkpoint",
        may_lack="pooler",
        subfolder=config.backbone_folder,
        config_name=config_name,
        tokenizer_name=tokenizer_name,
        **hub,
    )
    check_states(backbone, tokenizer, limit=length_limit(backbone, tokenizer), what=f"{flag} {name_or_path}")
    return backbone, tokenizer, config


def _load_adapted(
    name_or_path: str,
    base: AdapterBase,
    *,
    flag: str,
    config_name: str | None,
    tokenizer_name: str | None,
    cache_dir: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EmbeddingConfig]:
    """The base of an adapter with the adapter in its weights.

    Tokenizer and embedding config are those beside the adapter, where there are any, else the base's.
    """
    what = f"{flag} {name_or_path}"
    hub: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    check_peft(f"{what} is an adapter, which")
    if os.path.isabs(base.name) and not os.path.isdir(base.name):
        raise UserError(f"{what} is an adapter of {base.name}, which is not there; put that model back in its place")
    backbone, tokenizer, config = load_backbone(
        base.name,
        flag=f"{what} is an adapter, and its base",
        config_name=config_name,
        tokenizer_name=tokenizer_name,
        **hub,
    )
    if base.weights_sha256 not in (None, weights_digest(backbone)):
        raise UserError(f"{what}: {base.name} has other weights than those that this adapter was trained on")
    with errors_name_the_model(name_or_path, flag=flag, **hub):
        backbone = merged_into(backbone, name_or_path, cache_dir=cache_dir)
        if find_file(name_or_path, "modules.json", cache_dir) is not None:
            config = read_config(name_or_path, cache_dir=cache_dir)
        if tokenizer_name is None and find_file(name_or_path, "tokenizer_config.json", cache_dir) is not None:
            name, revision = at_revision(name_or_path)
            # The config is the base's: an adapter has none, and offline the hub's cache does not say that it has none.
            tokenizer = AutoTokenizer.from_pretrained(name, config=backbone.config, **revision, **hub)
    check_tokenizer(tokenizer, backbone, what)
    check_states(backbone, tokenizer, limit=length_limit(backbone, tokenizer), what=what)
    return backbone, tokenizer, config


@dataclass(frozen=True)
class EmbeddingModel:
    """All parts of a model that embeds texts, with the flags applied, not yet prepared for encoding or training.

    query_max_len, passage_max_len: in tokens, special ones included. own_max_len: the checkpoint's own length.
    length_limit: the most tokens that backbone and tokenizer take.
    """

    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: EmbeddingConfig
    projection: nn.Sequential
    query_max_len: int
    passage_max_len: int
    own_max_len: int
    length_limit: int


def load_embedding_model(
    name_or_path: str,
    *,
    flag: str,
    given: Mapping[str, Any],
    route: Route | None = None,
    query_max_len: int | None = None,
    passage_max_len: int | None = None,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> EmbeddingModel:
    """Load all parts of a model that embeds texts, for encoding or training; flags override the checkpoint.

    given: values for EmbeddingConfig.with_flags, None where no flag is given. route: as in load_backbone. A length of
    None is the checkpoint's own. Raises UserError like load_backbone, and where flags ask for more than the model has.
    """
    backbone, tokenizer, config = load_backbone(
        name_or_path,
        flag=flag,
        route=route,
        config_name=config_name,
        tokenizer_name=tokenizer_name,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )
    limit = length_limit(backbone, tokenizer)
    check_max_length("--query_max_len", query_max_len or 0, limit)
    check_max_length("--passage_max_len", passage_max_len or 0, limit)
    own_max_len = min(config.max_seq_length or limit, limit)
    config = config.with_flags(**given)
    lengths = {"query_max_len": query_max_len or own_max_len, "passage_max_len": passage_max_len or own_max_len}
    check_instructions(tokenizer, config, **lengths)
    check_truncate_dim(backbone, config)
    projection = load_projection(name_or_path, config, cache_dir=cache_dir)
    return EmbeddingModel(
        backbone, tokenizer, config, projection, **lengths, own_max_len=own_max_len, length_limit=limit
    )
