"""The bi-encoder: one backbone that embeds queries and passages, and the loss over them.

Shapes: N texts, T tokens, H dimensions; B queries with G passages each.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from embedding_finetune.batching import batches_by_length, padded_length
from embedding_finetune.checkpoint import DenseConfig, EmbeddingConfig
from embedding_finetune.distributed import gather_rows
from embedding_finetune.loss import contrastive_loss

_TOKENS_PER_SUB_BATCH = {"cpu": 1024}
"""Padded tokens per sub-batch where --tokens_per_sub_batch does not say; see benchmarks/README.md."""


class BiEncoder(nn.Module):
    """Backbone, pooling, projection and normalisation; `encode` gives embeddings, `forward` the training loss.

    projection: what loading.load_projection gives for the same checkpoint.
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


class Dense(nn.Module):
    """A linear layer and its activation: (N, in) -> (N, out)."""

    def __init__(self, config: DenseConfig):
        super().__init__()
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
        self.activation = {"tanh": nn.Tanh(), "identity": nn.Identity()}[config.activation]

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.activation(self.linear(embeddings))
