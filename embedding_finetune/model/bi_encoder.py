"""The bi-encoder: one backbone that embeds queries and passages.

Shapes: N texts, T tokens, H dimensions; H' dimensions before projection and cutting.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from embedding_finetune.model.checkpoint import DenseConfig, EmbeddingConfig
from embedding_finetune.model.tokens import batches_by_length, padded_length

_TOKENS_PER_SUB_BATCH = {"cpu": 1024}
"""Padded tokens per sub-batch where --tokens_per_sub_batch does not say; see benchmarks/README.md."""


class BiEncoder(nn.Module):
    """Backbone, pooling, projection and normalisation: padded texts to embeddings.

    projection: the result of loading.load_projection for the same checkpoint. token_embeddings: an identity that
    encode_in_sub_batches passes the embeddings of tokens through; hooks can be put on it.
    """

    def __init__(
        self, backbone: PreTrainedModel, config: EmbeddingConfig, *, projection: nn.Sequential | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Sequential() if projection is None else projection
        self.embedding_config = config
        self.token_embeddings = nn.Identity()
        # Embeddings come from the last hidden states, so a pooler on top of them gets no gradient.
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.requires_grad_(False)

    @property
    def dimensions(self) -> int:
        """The number of dimensions of an embedding, H."""
        whole = embedding_dimensions(self.backbone, self.embedding_config)
        return min(self.embedding_config.truncate_dim or whole, whole)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None) -> Tensor:
        """Embeddings (N, H) float32 of padded texts (N, T), padding on either side.

        prompt_lengths: (N,), how many tokens at the beginning of each text pooling leaves out; None for none.
        """
        return self._embed(attention_mask, prompt_lengths, input_ids=input_ids)

    def encode_in_sub_batches(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_lengths: Tensor | None = None,
        *,
        tokens_per_sub_batch: int | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """The result of `forward`, computed in sub-batches of texts of similar length: (N, H) float32.

        Half of a random batch is padding; sorted by length, hardly any is, and activations stay small. With
        `recompute` they are not kept: the backward pass computes each sub-batch again, with the same dropout masks. So
        memory does not grow with the batch (the gradient cache of arXiv:2101.06983). tokens_per_sub_batch: padded
        tokens; None for the device's default.
        """
        budget = tokens_per_sub_batch or _TOKENS_PER_SUB_BATCH.get(input_ids.device.type, 2**16)
        lengths = attention_mask.sum(dim=1).cpu().numpy()  # (N,)
        left_padded = bool(attention_mask[:, 0].sum() < attention_mask[:, -1].sum())
        # One lookup of the batch's distinct tokens: the gradient of a lookup in the backbone's table is as large as
        # that table, and every sub-batch would compute one.
        token_ids, positions = input_ids.unique(return_inverse=True)  # (V,), (N, T)
        table = self.backbone.get_input_embeddings()(token_ids)  # (V, H')
        batches = list(batches_by_length(lengths, budget))
        embeddings = []
        for rows in batches:
            width = padded_length(int(lengths[rows].max()), limit=input_ids.shape[1])
            columns = slice(-width, None) if left_padded else slice(0, width)
            prompts = None if prompt_lengths is None else prompt_lengths[rows]
            inputs = (table, positions[rows, columns], attention_mask[rows, columns], prompts)
            if recompute:
                embeddings.append(checkpoint(self._embed_from_table, *inputs, use_reentrant=False))
            else:
                embeddings.append(self._embed_from_table(*inputs))
        order = torch.from_numpy(np.concatenate(batches).argsort()).to(input_ids.device)
        return torch.cat(embeddings)[order]

    def _embed_from_table(
        self, table: Tensor, positions: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None
    ) -> Tensor:
        inputs = self.token_embeddings(F.embedding(positions, table))  # (n, t, H')
        return self._embed(attention_mask, prompt_lengths, inputs_embeds=inputs)

    def _embed(self, attention_mask: Tensor, prompt_lengths: Tensor | None, **inputs: Tensor) -> Tensor:
        states = self.backbone(attention_mask=attention_mask, **inputs).last_hidden_state  # (n, t, H')
        if prompt_lengths is not None:
            attention_mask = attention_mask * (attention_mask.cumsum(dim=1) > prompt_lengths[:, None])
        embeddings = pool(states.float(), attention_mask, self.embedding_config.pooling)  # (n, H')
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = self.projection(embeddings)
        return self.cut(embeddings, self.dimensions)  # (n, H)

    def cut(self, embeddings: Tensor, dimensions: int) -> Tensor:
        """The first `dimensions` of embeddings (..., any), scaled to length 1 if this model normalises."""
        prefix = embeddings[..., :dimensions]
        return F.normalize(prefix, dim=-1) if self.embedding_config.normalized else prefix


def embedding_dimensions(backbone: PreTrainedModel, config: EmbeddingConfig) -> int:
    """The number of dimensions of embeddings before they are cut to truncate_dim."""
    return config.dense[-1].out_features if config.dense else backbone.config.hidden_size


def pool(states: Tensor, attention_mask: Tensor, method: str) -> Tensor:
    """Token states (N, T, H) to one vector per text (N, H), by one of pooling.POOLING_METHODS."""
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


class Dense(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
        self.activation = {"tanh": nn.Tanh(), "identity": nn.Identity()}[config.activation]

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return self.activation(self.linear(embeddings))
