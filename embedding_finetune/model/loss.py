"""The contrastive loss as pure tensor functions.

Shapes: B queries, C groups of G passages (each led by a positive), H dimensions, N candidate
columns: every passage in-batch (N = C*G), only the query's own group otherwise (N = G).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_ID = -1
"""Text id of a column or list entry that stands for no text."""


def contrastive_loss(
    queries: Tensor,
    passages: Tensor,
    *,
    temperature: float,
    use_inbatch_neg: bool = True,
    passage_ids: Tensor | None = None,
    known_ids: Tensor | None = None,
    first_group: int = 0,
) -> Tensor:
    """Mean over queries of the temperature-scaled softmax cross entropy (InfoNCE, arXiv:1807.03748).

    queries: (B, H). passages: (C, G, H); query b's own group is number `first_group + b`, so that
    groups gathered from other ranks can stand before and after. passage_ids: (C, G) text ids, to
    mask columns with; known_ids: (B, P), see `masked_columns`. Without passage_ids nothing is masked.

    Scores and loss are float32 whatever the inputs and autocast say: cosines near 1 are 0.004 apart
    in bfloat16, which a temperature of 0.02 turns into 0.2 in the logit.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, passages = queries.float(), passages.float()
        own = first_group + torch.arange(len(queries), device=queries.device)  # (B,)
        if use_inbatch_neg:
            scores = queries @ passages.flatten(0, 1).T / temperature  # (B, C*G)
            columns = None if passage_ids is None else passage_ids.reshape(1, -1)  # (1, C*G)
            targets = own * passages.shape[1]  # (B,)
        else:
            scores = torch.einsum("bh,bgh->bg", queries, passages[own]) / temperature  # (B, G)
            columns = None if passage_ids is None else passage_ids[own]  # (B, G)
            targets = torch.zeros_like(own)  # (B,)
        if columns is not None:
            scores = scores.masked_fill(masked_columns(columns, targets, known_ids), float("-inf"))
        return F.cross_entropy(scores, targets)


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


def masked_columns(columns: Tensor, targets: Tensor, known_ids: Tensor | None) -> Tensor:
    """Which columns do not count as negatives of which query: (B, N) bool.

    columns: (B, N) text ids, or (1, N) where all queries share them. targets: (B,), never masked.
    Columns of PADDING_ID are masked always. With known_ids (B, P), the ids of all texts that are
    known to answer query b or are the query itself (filled up with PADDING_ID), so are those
    texts and every text that stands in an earlier column already.
    """
    masked = columns == PADDING_ID  # (1 or B, N)
    if known_ids is not None:
        masked = masked | _repeats_of_earlier_columns(columns)
        for ids in known_ids.unbind(1):
            masked = masked | (columns == ids[:, None])  # (B, N)
    masked = masked.expand(len(targets), -1).clone()  # (B, N)
    return masked.scatter_(1, targets[:, None], False)


def _repeats_of_earlier_columns(columns: Tensor) -> Tensor:
    """True where a row holds the same id in an earlier column: (R, N) -> (R, N) bool."""
    in_order, positions = columns.sort(dim=1, stable=True)  # (R, N)
    repeats = torch.zeros_like(columns, dtype=torch.bool)
    repeats[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    return torch.zeros_like(repeats).scatter_(1, positions, repeats)
