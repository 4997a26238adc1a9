"""The bi-encoder: one backbone that embeds queries and passages.

Shapes: N texts, T tokens, H dimensions; H' dimensions before projection and cutting. Of a training batch: D texts of S
tokens in all, V of them distinct.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.module_configs import DenseConfig
from embedding_finetune.model.modules import pool, pool_packed
from embedding_finetune.model.packing import Packed
from embedding_finetune.model.sub_batches import Texts


class BiEncoder(nn.Module):
    """Backbone, pooling, projection and normalisation: padded texts to embeddings.

    projection: the result of modules.load_projection for the same checkpoint. token_embeddings: an identity that
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

    def encode_in_sub_batches(self, texts: Texts, *, recompute: bool = False) -> Tensor:
        """Embeddings of texts that are laid out for training, in their order: (D, H) float32.

        Half of a random batch is padding; sorted by length, hardly any is, and activations stay small. With
        `recompute` they are not kept: the backward pass computes each sub-batch again, with the same dropout masks. So
        memory does not grow with the batch (the gradient cache of arXiv:2101.06983).
        """
        table = self.backbone.get_input_embeddings()(texts["token_ids"])  # (V, H')
        embed = self._embed_padded if "attention_mask" in texts else self._embed_packed
        if recompute:
            parts = [checkpoint(embed, table, texts, part, use_reentrant=False) for part in texts["sub_batches"]]
        else:
            parts = [embed(table, texts, part) for part in texts["sub_batches"]]
        return torch.cat(parts)

    def _embed_padded(self, table: Tensor, texts: Texts, sub_batch: tuple[int, ...]) -> Tensor:
        first, end, left, right = sub_batch
        positions = texts["positions"][first:end, left:right]
        inputs = self.token_embeddings(F.embedding(positions, table))  # (n, t, H')
        prompts = texts["prompt_lengths"][first:end] if "prompt_lengths" in texts else None
        return self._embed(texts["attention_mask"][first:end, left:right], prompts, inputs_embeds=inputs)

    def _embed_packed(self, table: Tensor, texts: Texts, sub_batch: tuple[int, ...]) -> Tensor:
        first, end, begin, stop, longest = sub_batch
        boundaries = texts["boundaries"][first : end + 1] - begin
        packed = Packed(texts["position_ids"][begin:stop], boundaries, longest)
        inputs = self.token_embeddings(F.embedding(texts["positions"][None, begin:stop], table))  # (1, s, H')
        prompts = texts["prompt_lengths"][first:end] if "prompt_lengths" in texts else None
        return self.embed_packed(packed, prompts, inputs_embeds=inputs)

    def embed_packed(self, texts: Packed, prompt_lengths: Tensor | None, **inputs: Tensor) -> Tensor:
        """Embeddings (n, H) float32 of packed texts, for a backbone that packing.pack_if_possible has prepared.

        inputs: input_ids (1, S), or inputs_embeds (1, S, H').
        """
        states = self.backbone(**inputs, **texts.keywords()).last_hidden_state[0]  # (S, H')
        return self._finished(pool_packed(states.float(), texts, self.embedding_config.pooling, prompt_lengths))

    def _embed(self, attention_mask: Tensor, prompt_lengths: Tensor | None, **inputs: Tensor) -> Tensor:
        states = self.backbone(attention_mask=attention_mask, **inputs).last_hidden_state  # (n, t, H')
        return self._finished(pool(states.float(), attention_mask, self.embedding_config.pooling, prompt_lengths))

    def _finished(self, embeddings: Tensor) -> Tensor:
        """Pooled states (n, H') through projection, cutting and normalisation: (n, H)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = self.projection(embeddings)
        return self.cut(embeddings, self.dimensions)

    def cut(self, embeddings: Tensor, dimensions: int) -> Tensor:
        """The first `dimensions` of embeddings (..., any), scaled to length 1 if this model normalises."""
        prefix = embeddings[..., :dimensions]
        return F.normalize(prefix, dim=-1) if self.embedding_config.normalized else prefix


def embedding_dimensions(backbone: PreTrainedModel, config: EmbeddingConfig) -> int:
    """The number of dimensions of embeddings before they are cut to truncate_dim."""
    dense = [module for module in config.modules if isinstance(module, DenseConfig)]
    if dense:
        return dense[-1].out_features
    return backbone.config.hidden_size * len(config.pooling.split("+"))
