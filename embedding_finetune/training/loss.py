"""The loss: pure tensor functions, and a module that computes them over a BiEncoder.

Shapes: B queries, C groups of G passages (each led by a positive), H dimensions, N candidate
columns: every passage in-batch (N = C*G), only the query's own group otherwise (N = G).
In RetrievalLoss: D distinct texts of a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedding_finetune.distributed import gather_rows
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.sub_batches import Texts

PADDING_ID = -1
"""Text id of a column or list entry that stands for no text."""


def contrastive_loss(
    queries: Tensor,
    passages: Tensor,
    *,
    temperature: float,
    use_inbatch_neg: bool = True,
    masked: Tensor | None = None,
    first_group: int = 0,
    false_negative_margin: float | None = None,
    confirmed: Tensor | None = None,
) -> Tensor:
    """Mean over queries of the temperature-scaled softmax cross entropy (InfoNCE, arXiv:1807.03748).

    queries: (B, H). passages: (C, G, H); query b's own group is number `first_group + b`, so that
    groups gathered from other ranks can stand before and after. masked: (B, N) bool, the columns that do not
    count, as `masked_in_batch` gives them; None for none. false_negative_margin: see `false_negatives`; None to
    mask none. confirmed: (B, N) bool, columns known to answer nothing, which the margin never masks; None for none.

    Scores and loss are float32 whatever the inputs and autocast say: cosines near 1 are 0.004 apart
    in bfloat16, which a temperature of 0.02 turns into 0.2 in the logit.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, passages = queries.float(), passages.float()
        groups = first_group + torch.arange(len(queries), device=queries.device)  # (B,), each query's own
        if use_inbatch_neg:
            similarities = queries @ passages.flatten(0, 1).T  # (B, C*G)
            scores = similarities / temperature
            if false_negative_margin is not None:
                likely = false_negatives(similarities, groups, passages.shape[1], false_negative_margin)
                likely = likely if confirmed is None else likely & ~confirmed
                scores = scores.masked_fill(likely, float("-inf"))
            targets = groups * passages.shape[1]  # (B,)
        else:
            scores = torch.einsum("bh,bgh->bg", queries, passages[groups]) / temperature  # (B, G)
            targets = torch.zeros_like(groups)  # (B,)
        if masked is not None:
            scores = scores.masked_fill(masked, float("-inf"))
        return F.cross_entropy(scores, targets)


def false_negatives(similarities: Tensor, groups: Tensor, group_size: int, margin: float) -> Tensor:
    """Which columns of other queries' groups score above the query's own positive + margin: (B, N) bool.

    Such a passage is likely an answer that nobody labelled (Qwen3-Embedding, arXiv:2506.05176). similarities: (B, N),
    before the temperature. groups: (B,), each query's own. The query's own negatives are never among them.
    """
    similarities = similarities.detach()
    positives = similarities.gather(1, (groups * group_size)[:, None])  # (B, 1)
    group_of_column = torch.arange(similarities.shape[1], device=groups.device) // group_size  # (N,)
    return (similarities > positives + margin) & (group_of_column != groups[:, None])


def distillation_loss(
    queries: Tensor, passages: Tensor, teacher_scores: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean over queries of the Kullback-Leibler divergence KL(teacher || student) over each query's own group.

    queries: (B, H). passages: (B, G, H). teacher_scores: (B, G), -inf in a column of no text. The teacher's
    distribution is the softmax of its scores / teacher_temperature, the student's that of its own / temperature
    (Hinton et al., arXiv:1503.02531); all in float32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        scores = torch.einsum("bh,bgh->bg", queries.float(), passages.float()) / temperature  # (B, G)
        empty = teacher_scores == float("-inf")
        teacher = (teacher_scores.float() / teacher_temperature).softmax(dim=1)  # (B, G)
        log_student = scores.masked_fill(empty, float("-inf")).log_softmax(dim=1).masked_fill(empty, 0.0)  # (B, G)
        return (torch.xlogy(teacher, teacher) - teacher * log_student).sum(dim=1).mean()


def masked_in_batch(
    passage_ids: Tensor,
    known_ids: Tensor | None,
    *,
    queries: int,
    use_inbatch_neg: bool = True,
    first_group: int = 0,
) -> Tensor:
    """What contrastive_loss is to mask by the identity of texts, as `masked_columns` says: (B, N) bool.

    passage_ids: (C, G) text ids. known_ids: (B, P) or None. queries: B. The others are those of contrastive_loss.
    """
    groups = first_group + torch.arange(queries, device=passage_ids.device)  # (B,), each query's own
    if use_inbatch_neg:
        return masked_columns(passage_ids.reshape(1, -1), groups * passage_ids.shape[1], known_ids)
    return masked_columns(passage_ids[groups], torch.zeros_like(groups), known_ids)


def masked_columns(columns: Tensor, targets: Tensor, known_ids: Tensor | None) -> Tensor:
    """Which columns do not count as negatives of which query: (B, N) bool.

    columns: (B, N) text ids, or (1, N) where all queries share them. targets: (B,), never masked.
    Columns of PADDING_ID are masked always. With known_ids (B, P), the ids of all texts that are
    known to answer query b or are the query itself (filled up with PADDING_ID), so are those
    texts and every text that stands in an earlier column already.

    The kernels are few, and as many for any P: known texts are looked up among the sorted columns.
    """
    own = targets[:, None]  # (B, 1)
    masked = columns == PADDING_ID  # (1 or B, N)
    if known_ids is None:
        return masked.expand(len(targets), -1).scatter(1, own, False)
    in_order, positions = columns.sort(dim=1, stable=True)  # (1 or B, N)
    repeats = torch.zeros_like(masked)
    repeats[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    masked = masked | torch.zeros_like(masked).scatter_(1, positions, repeats)
    # Of a known text the first column is masked: the later ones are repeats of it.
    sequences = in_order[0] if len(columns) == 1 else in_order
    found = torch.searchsorted(sequences, known_ids).clamp_(max=columns.shape[1] - 1)  # (B, P)
    in_order, positions = (tensor.expand(len(targets), -1).gather(1, found) for tensor in (in_order, positions))
    first = torch.where(in_order == known_ids, positions, own)  # (B, P); what is not there stands for the target
    return masked.expand(len(targets), -1).scatter(1, first, True).scatter_(1, own, False)


@dataclass(frozen=True)
class LossOptions:
    """What the loss is; the flags of the same names say it.

    matryoshka: dimensions -> weight of the loss of embeddings cut to these (arXiv:2205.13147); None for whole
    embeddings alone.
    """

    temperature: float = 0.02
    use_inbatch_neg: bool = True
    mask_known_positives: bool = True
    negatives_cross_device: bool = False
    false_negative_margin: float | None = None
    matryoshka: Mapping[int, float] | None = None
    distillation_weight: float = 0.0
    teacher_temperature: float = 1.0


class BiEncoderLoss(nn.Module):
    """What transformers' Trainer trains: a BiEncoder, and in a subclass the loss of its embeddings.

    recompute_sub_batches: as in BiEncoder.encode_in_sub_batches.
    """

    def __init__(self, bi_encoder: BiEncoder, options: LossOptions, *, recompute_sub_batches: bool = False) -> None:
        super().__init__()
        self.bi_encoder = bi_encoder
        self.options = options
        self.recompute_sub_batches = recompute_sub_batches

    def get_input_embeddings(self) -> nn.Module:
        """What transformers' Trainer hooks its noise to under --neftune_noise_alpha.

        Not the table, of which each distinct token is looked up once: each token of each text is to have its own noise.
        """
        return self.bi_encoder.token_embeddings

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """What transformers' Trainer calls under --gradient_checkpointing."""
        self.bi_encoder.backbone.activation_checkpointing_enable(**options)


class RetrievalLoss(BiEncoderLoss):
    """The loss of a BiEncoder on batches as EmbedCollator makes them."""

    # Trainer takes a forward with **kwargs for one that averages over accumulated micro-batches itself.
    def forward(
        self,
        texts: Texts,
        query_index: Tensor,
        passage_index: Tensor,
        passage_ids: Tensor,
        known_ids: Tensor,
        teacher_scores: Tensor | None = None,
        confirmed_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss under "loss", a scalar.

        texts: the batch's distinct texts, D of them. query_index: (B,) and passage_index: (B, G): which of them each
        query and passage is. passage_ids: (B, G), known_ids: (B, P) as in masked_in_batch. teacher_scores: (B, G) as
        in distillation_loss; None for no teacher. confirmed_ids: (B, any), the ids of texts known not to answer each
        query, filled up with PADDING_ID; None for none. weight: a scalar that the loss is multiplied with; None for 1.
        """
        embeddings = self.bi_encoder.encode_in_sub_batches(texts, recompute=self.recompute_sub_batches)  # (D, H)
        queries, passages = embeddings[query_index], embeddings[passage_index]  # (B, H), (B, G, H)
        loss = self._contrastive(queries, passages, passage_ids, known_ids, confirmed_ids)
        if teacher_scores is not None:
            divergence = distillation_loss(
                queries,
                passages,
                teacher_scores,
                temperature=self.options.temperature,
                teacher_temperature=self.options.teacher_temperature,
            )
            loss = loss + self.options.distillation_weight * divergence
        return {"loss": loss if weight is None else loss * weight}

    def _contrastive(
        self,
        queries: Tensor,
        passages: Tensor,
        passage_ids: Tensor,
        known_ids: Tensor,
        confirmed_ids: Tensor | None,
    ) -> Tensor:
        """The contrastive loss of embeddings (B, H) and (B, G, H), summed over the Matryoshka dimensions."""
        options, encoder, first_group = self.options, self.bi_encoder, 0
        if options.negatives_cross_device and options.use_inbatch_neg:
            # (C, G, H) and (C, G), of the C queries of all processes
            (passages, passage_ids), first_group = gather_rows(passages, passage_ids)
        masked = masked_in_batch(
            passage_ids,
            known_ids if options.mask_known_positives else None,
            queries=len(queries),
            use_inbatch_neg=options.use_inbatch_neg,
            first_group=first_group,
        )  # (B, N)
        confirmed = None
        if confirmed_ids is not None and options.false_negative_margin is not None:
            confirmed = (passage_ids.reshape(1, -1, 1) == confirmed_ids[:, None, :]).any(dim=2)  # (B, N)
        loss = queries.new_zeros(())
        for dimensions, weight in (options.matryoshka or {encoder.dimensions: 1.0}).items():
            whole = dimensions == encoder.dimensions
            loss = loss + weight * contrastive_loss(
                queries if whole else encoder.cut(queries, dimensions),
                passages if whole else encoder.cut(passages, dimensions),
                first_group=first_group,
                temperature=options.temperature,
                use_inbatch_neg=options.use_inbatch_neg,
                false_negative_margin=options.false_negative_margin,
                masked=masked,
                confirmed=confirmed,
            )
        return loss
