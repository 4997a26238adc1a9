"""The bi-encoder: one backbone that embeds queries and passages, and the loss over them.

Shapes: N texts, T tokens, H dimensions; B queries with G passages each.
"""

import hashlib
import logging
import os

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from embedding_finetune.batching import batches_by_length, padded_length
from embedding_finetune.checkpoint import DenseConfig, EmbeddingConfig, find_file, read_config
from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.distributed import gather_rows
from embedding_finetune.loss import contrastive_loss

logger = logging.getLogger(__name__)

_TOKENS_PER_SUB_BATCH = {"cpu": 1024}
"""Padded tokens per sub-batch where --tokens_per_sub_batch does not say; see benchmarks/README.md."""

_UNLIMITED = 10**9
"""Tokenizers without a limit say 10^30."""


class BiEncoder(nn.Module):
    """Backbone, pooling, projection and normalisation; `encode` gives embeddings, `forward` the training loss.

    projection: what load_projection gives for the same checkpoint.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        config: EmbeddingConfig,
        *,
        projection: nn.Sequential | None = None,
        temperature: float = 0.02,
        use_inbatch_neg: bool = True,
        mask_known_positives: bool = True,
        negatives_cross_device: bool = False,
        tokens_per_sub_batch: int | None = None,
        recompute_sub_batches: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Sequential() if projection is None else projection
        self.embedding_config = config
        self.temperature = temperature
        self.use_inbatch_neg = use_inbatch_neg
        self.mask_known_positives = mask_known_positives
        self.negatives_cross_device = negatives_cross_device
        self.tokens_per_sub_batch = tokens_per_sub_batch
        self.recompute_sub_batches = recompute_sub_batches
        # Embeddings come from the last hidden states: a pooler on top gets no gradient.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)

    @property
    def dimensions(self) -> int:
        """H."""
        dense = self.embedding_config.dense
        return dense[-1].out_features if dense else self.backbone.config.hidden_size

    def encode(self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None) -> Tensor:
        """Embeddings (N, H) float32 of padded texts (N, T), padding on either side.

        prompt_lengths: (N,), how many tokens at the beginning of each text the pooling leaves out; None for none.
        """
        return self._embed(attention_mask, prompt_lengths, input_ids=input_ids)

    def encode_in_sub_batches(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """What `encode` gives, computed in sub-batches of texts of similar length: (N, H) float32.

        Half of a random batch is padding; sorted by length, hardly any is, and activations stay small. With
        recompute_sub_batches they are not kept at all: the backward pass computes each sub-batch again, so that
        memory does not grow with the batch (the gradient cache of arXiv:2101.06983, dropout masks included).
        """
        budget = self.tokens_per_sub_batch or _TOKENS_PER_SUB_BATCH.get(input_ids.device.type, 2**16)
        lengths = attention_mask.sum(dim=1).cpu().numpy()  # (N,)
        left_padded = bool(attention_mask[:, 0].sum() < attention_mask[:, -1].sum())
        # The word embeddings of the whole batch are looked up once: the gradient of a lookup is as large
        # as its table, and would be paid for by every sub-batch.
        token_ids, positions = input_ids.unique(return_inverse=True)  # (V,), (N, T)
        table = self.backbone.get_input_embeddings()(token_ids)  # (V, H')
        batches = list(batches_by_length(lengths, budget))
        embeddings = []
        for rows in batches:
            width = padded_length(int(lengths[rows].max()), limit=input_ids.shape[1])
            columns = slice(-width, None) if left_padded else slice(0, width)
            prompts = None if prompt_lengths is None else prompt_lengths[rows]
            inputs = (table, positions[rows, columns], attention_mask[rows, columns], prompts)
            if self.recompute_sub_batches:
                embeddings.append(checkpoint(self._embed_from_table, *inputs, use_reentrant=False))
            else:
                embeddings.append(self._embed_from_table(*inputs))
        order = torch.from_numpy(np.concatenate(batches).argsort()).to(input_ids.device)
        return torch.cat(embeddings)[order]

    def _embed_from_table(
        self, table: Tensor, positions: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None
    ) -> Tensor:
        return self._embed(attention_mask, prompt_lengths, inputs_embeds=F.embedding(positions, table))

    def _embed(self, attention_mask: Tensor, prompt_lengths: Tensor | None, **inputs: Tensor) -> Tensor:
        states = self.backbone(attention_mask=attention_mask, **inputs).last_hidden_state  # (n, t, H')
        if prompt_lengths is not None:
            attention_mask = attention_mask * (attention_mask.cumsum(dim=1) > prompt_lengths[:, None])
        embeddings = pool(states.float(), attention_mask, self.embedding_config.pooling)  # (n, H')
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = self.projection(embeddings)  # (n, H)
        return F.normalize(embeddings, dim=-1) if self.embedding_config.normalized else embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        query_index: Tensor,
        passage_index: Tensor,
        passage_ids: Tensor,
        known_ids: Tensor,
        prompt_lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch as EmbedCollator makes it, under "loss".

        input_ids, attention_mask: (N, T), the batch's distinct texts. query_index: (B,) and passage_index:
        (B, G): which of them each query and passage is. passage_ids: (B, G), known_ids: (B, P) as in loss.py.
        prompt_lengths: (N,) as in `encode`.
        """
        embeddings = self.encode_in_sub_batches(input_ids, attention_mask, prompt_lengths)  # (N, H)
        passages, first_group = embeddings[passage_index], 0  # (B, G, H)
        if self.negatives_cross_device and self.use_inbatch_neg:
            passages, first_group = gather_rows(passages)  # (C, G, H), C queries of all processes
            passage_ids, _ = gather_rows(passage_ids)  # (C, G)
        loss = contrastive_loss(
            embeddings[query_index],
            passages,
            first_group=first_group,
            temperature=self.temperature,
            use_inbatch_neg=self.use_inbatch_neg,
            passage_ids=passage_ids,
            known_ids=known_ids if self.mask_known_positives else None,
        )
        return {"loss": loss}

    def activation_checkpointing_enable(self, **options: object) -> None:
        """What transformers' Trainer calls under --gradient_checkpointing."""
        self.backbone.activation_checkpointing_enable(**options)


def pool(states: Tensor, attention_mask: Tensor, method: str) -> Tensor:
    """Token states (N, T, H) to one vector per text (N, H), by one of arguments.POOLING_METHODS."""
    rows = torch.arange(len(states), device=states.device)
    if method == "cls":
        return states[rows, attention_mask.argmax(dim=1)]  # the first token that is not padding
    if method == "lasttoken":
        positions = torch.arange(states.shape[1], device=states.device)
        return states[rows, (attention_mask * positions).argmax(dim=1)]
    if method == "mean":
        weights = attention_mask.unsqueeze(-1).to(states.dtype)  # (N, T, 1)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    raise ValueError(f"unknown pooling method {method!r}")


def load_backbone(
    name_or_path: str,
    *,
    flag: str,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EmbeddingConfig]:
    """Load a folder's or hub model's weights (as float32), tokenizer and embedding config.

    `flag` is what the user gave the name with. Raises UserError when something cannot be loaded or
    the weights do not fill the backbone.
    """
    transformers.logging.disable_progress_bar()  # ours are enough
    hub = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    try:
        config = read_config(name_or_path, cache_dir=cache_dir)
        hub["subfolder"] = config.backbone_folder
        model_config = AutoConfig.from_pretrained(config_name, **{**hub, "subfolder": ""}) if config_name else None
        backbone, loading = AutoModel.from_pretrained(
            name_or_path,
            config=model_config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **hub,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_name or name_or_path, **({**hub, "subfolder": ""} if tokenizer_name else hub)
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        kind = "" if os.path.isdir(name_or_path) else " (there is no such folder; tried as a hub name)"
        raise UserError(
            f"{flag} {name_or_path}{kind}: cannot be loaded: {first_line(error)} "
            "Give a folder with config.json, model.safetensors and tokenizer files, or a hub name."
        ) from error
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"{flag} {name_or_path}: the weights do not fill a {type(backbone).__name__}: "
            f"{len(missing)} tensors are missing, {missing[0]} among them; give an encoder's checkpoint"
        )
    return backbone, tokenizer, config


class Dense(nn.Module):
    """A linear layer and its activation: (N, in) -> (N, out)."""

    def __init__(self, config: DenseConfig):
        super().__init__()
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
        self.activation = {"tanh": nn.Tanh(), "identity": nn.Identity()}[config.activation]

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.activation(self.linear(embeddings))


def load_projection(name_or_path: str, config: EmbeddingConfig, *, cache_dir: str | None = None) -> nn.Sequential:
    """The layers that config.dense describes, with their weights as float32; empty where there are none.

    Raises UserError when weights are missing or are not those of the described layers.
    """
    layers = nn.Sequential(*map(Dense, config.dense))
    for layer, described in zip(layers, config.dense):
        name = os.path.join(described.folder, SAFE_WEIGHTS_NAME)
        path = find_file(name_or_path, name, cache_dir)
        if path is None:
            raise UserError(f"{name_or_path}: {name} is missing, though modules.json names its module")
        try:
            layer.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"{path}: {first_line(error)}; these are not the weights of a Dense module") from error
    return layers.float()


def freeze_position_embeddings(backbone: PreTrainedModel) -> None:
    """Keep the learned position embeddings as they are; UserError where the backbone has none."""
    table = _position_table(backbone)
    if table is None:
        raise UserError(f"--fix_position_embedding: a {type(backbone).__name__} has no position embeddings to fix")
    table.requires_grad_(False)


def weights_digest(*modules: nn.Module) -> str:
    """SHA-256 over names, shapes and contents of all weights: what a model is, whatever its folder is called."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def length_limit(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens, special ones included, that tokenizer and position embeddings both take."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or _UNLIMITED
    table = _position_table(backbone)
    if table is not None and table.padding_idx is not None:
        positions -= table.padding_idx + 1  # RoBERTa and MPNet count positions from after the padding index
    return min(positions, tokenizer.model_max_length)


def check_max_length(flag: str, value: int, limit: int) -> None:
    """Raise UserError when a length flag asks for more tokens than the model takes."""
    if value > limit:
        raise UserError(f"{flag} {value}: the model takes at most {limit} tokens")


def _position_table(backbone: PreTrainedModel) -> nn.Embedding | None:
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    return table if isinstance(table, nn.Embedding) else None
