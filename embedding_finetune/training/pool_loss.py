"""The loss of queries whose passages stay as they are: a softmax over all passages of a pool, not those of a batch.

Shapes: B queries, N passages of the pool, n of them at a time, H dimensions, M pairs of a passage and a query.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.sub_batches import Texts
from embedding_finetune.retrieval.results import rounding_error
from embedding_finetune.training.loss import BiEncoderLoss, LossOptions
from embedding_finetune.training.pool_file import PoolFile

_SCORES_AT_ONCE = {"cpu": 2**20}
_SCORES_ON_A_GPU = 2**26
"""Scores that are held at once: those of a CPU stay in its caches, those of a GPU are as many as it computes well."""


@dataclass(frozen=True, eq=False)
class Pairs:  # no tuple: the Trainer would take it apart
    """Some passages of some queries, by rising column.

    columns: (M,) int64, of the pool. rows: (M,) int64, of the batch. Both are numpy's: they stay on the host.
    """

    columns: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, columns: np.ndarray, rows: np.ndarray) -> "Pairs":
        """Pairs in any order, of which those with a column below 0 are left out: such passages are not in the pool."""
        order = np.argsort(columns, kind="stable")[np.count_nonzero(columns < 0) :]
        return cls(columns[order], rows[order])

    def within(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and columns counted from `first`, of the pairs with columns from there to before `stop`."""
        part = slice(*np.searchsorted(self.columns, [first, stop]).tolist())
        return self.rows[part], self.columns[part] - first


class Panel(NamedTuple):
    """The passages of a pool that queries are trained against.

    embeddings: (n, H) float32. places: (n,) int64, where they stand in the pool, ascending; None where they are all.
    """

    embeddings: Tensor | PoolFile
    places: np.ndarray | None = None

    def columns(self, places: np.ndarray) -> np.ndarray:
        """Where passages of the pool stand here, -1 for one that does not: (any,) int64. places: in the pool."""
        if self.places is None:
            return places
        found = np.searchsorted(self.places, places).clip(max=len(self.places) - 1)
        return np.where(self.places[found] == places, found, -1)

    def pairs(self, pairs: Pairs) -> Pairs:
        """The pairs whose passages are here."""
        return pairs if self.places is None else Pairs.of(self.columns(pairs.columns), pairs.rows)


NO_PAIRS = Pairs(np.empty(0, np.int64), np.empty(0, np.int64))


def pool_loss(
    queries: Tensor,
    passages: Tensor | PoolFile,
    targets: np.ndarray,
    *,
    temperature: float,
    positives: Tensor | None = None,
    masked: Pairs = NO_PAIRS,
    false_negative_margin: float | None = None,
    exempt: Pairs = NO_PAIRS,
) -> Tensor:
    """Mean over queries of the temperature-scaled softmax cross entropy over all passages.

    queries: (B, H), which alone get gradients. passages: (N, H) float32. targets: (B,), each query's positive among
    them. positives: (B, H), these, where a target may be -1: a positive that is not among the passages. masked: pairs
    that do not count; a target counts always. false_negative_margin: passages that score above the query's own positive
    + this do not count either, but those of `exempt` do; None to leave none out.

    It is loss.contrastive_loss of one group per passage, and never holds the scores (B, N): the gradient of the loss
    with respect to a query is its mean passage under the softmax, less its target, over the temperature. That mean is
    what attention computes, here with sums that are scaled to the largest score so far (arXiv:2112.05682).
    """
    with torch.autocast(queries.device.type, enabled=False):
        positives = passages[targets] if positives is None else positives
        return _PoolLoss.apply(
            queries.float(), passages, positives, targets, temperature, masked, false_negative_margin, exempt
        ).mean()


class _PoolLoss(torch.autograd.Function):
    """The loss of each query: (B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        passages: Tensor | PoolFile,
        positives: Tensor,
        targets: np.ndarray,
        temperature: float,
        masked: Pairs,
        margin: float | None,
        exempt: Pairs,
    ) -> Tensor:
        similarities = (queries * positives).sum(dim=1)  # (B,)
        own = similarities / temperature  # (B,)
        if margin is not None:
            # What has the positive's own embedding is not above it, though a product in blocks rounds otherwise.
            lengths = queries.norm(dim=1) * positives.norm(dim=1)
            bounds = similarities + margin + rounding_error(queries.shape[1]) * lengths  # (B,)
        largest, total, mean = own, torch.ones_like(own), positives  # a target is its query's first passage
        targets_in_order = Pairs.of(targets, np.arange(len(targets)))
        step = max(_SCORES_AT_ONCE.get(queries.device.type, _SCORES_ON_A_GPU) // len(queries), 1)
        for first in range(0, len(passages), step):
            part = passages[first : first + step]  # (n, H)
            scores = queries @ part.T  # (B, n)
            stop = first + len(part)
            if margin is not None:
                kept = exempt.within(first, stop)
                values = scores[kept]
                scores.masked_fill_(scores > bounds[:, None], float("-inf"))
                scores[kept] = values
            for pairs in (masked, targets_in_order):
                scores[pairs.within(first, stop)] = float("-inf")
            scores /= temperature
            larger = torch.maximum(largest, scores.amax(dim=1))  # (B,)
            shrunk = (largest - larger).exp_()
            weights = scores.sub_(larger[:, None]).exp_()  # (B, n)
            total = total * shrunk + weights.sum(dim=1)
            mean = torch.addmm(mean * shrunk[:, None], weights, part)  # (B, H)
            largest = larger
        ctx.save_for_backward((mean / total[:, None] - positives) / temperature)
        return largest + total.log() - own

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_queries,) = ctx.saved_tensors
        return gradient[:, None] * of_queries, None, None, None, None, None, None, None


class PoolLoss(BiEncoderLoss):
    """The loss of a BiEncoder of queries on batches as QueryCollator makes them.

    pool: (N, H) float32, the embeddings of all passages; they are not among the module's weights. panel: those that
    queries are trained against, all of them unless hardest.py says others. Of `options` it reads temperature,
    mask_known_positives and false_negative_margin.
    """

    def __init__(
        self,
        bi_encoder: BiEncoder,
        options: LossOptions,
        pool: Tensor | PoolFile,
        *,
        recompute_sub_batches: bool = False,
    ) -> None:
        super().__init__(bi_encoder, options, recompute_sub_batches=recompute_sub_batches)
        self.pool = pool
        self.panel = Panel(pool)

    def forward(
        self, texts: Texts, query_index: Tensor, targets: np.ndarray, known: Pairs, negatives: Pairs
    ) -> dict[str, Tensor]:
        """The loss under "loss", a scalar.

        texts: the batch's distinct queries. query_index: (B,), which of them each is. targets: (B,), the place of each
        query's positive in the pool. known: what is known to answer each query, or is the query itself. negatives:
        those of its row, which the margin never masks.
        """
        queries = self.bi_encoder.encode_in_sub_batches(texts, recompute=self.recompute_sub_batches)[query_index]
        positives = self.pool[targets].to(queries.device)  # (B, H)
        loss = pool_loss(
            queries,
            self.panel.embeddings,
            self.panel.columns(targets),
            positives=positives,
            temperature=self.options.temperature,
            masked=self.panel.pairs(known) if self.options.mask_known_positives else NO_PAIRS,
            false_negative_margin=self.options.false_negative_margin,
            exempt=self.panel.pairs(negatives),
        )
        return {"loss": loss}
