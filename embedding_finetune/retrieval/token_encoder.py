"""Token ids -> embeddings, in batches that suit the device.

Padded batches hold texts of one padded length. So the shape that a text is computed in does not depend on its
neighbours. Where the model takes packed texts, batches have none. One batch is in flight: while an accelerator computes
it, the next one is put together.

Shapes: N texts, n of them in a batch, S tokens in all, H dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.packing import Packed, places_of
from embedding_finetune.model.padding import batches_of_one_length, pad, padded_length
from embedding_finetune.model.sub_batches import cuts_of_sums
from embedding_finetune.model.tokens import Tokens
from embedding_finetune.retrieval.budget import TokenBudget

_TOKENS_STEP = 256
"""On a CPU batches are filled with copies of a text to about a multiple of this. oneDNN keeps kernels for each shape:
without it memory would grow with the number of shapes."""

Done = Callable[[np.ndarray, np.ndarray], None]
"""Is told which rows of embeddings (N, H) have come, and these; rows that have not come yet hold anything."""


@dataclass(frozen=True)
class _InFlight:
    """Embeddings (n, H) on their way to the host; `event` tells when they have come, None if they are there."""

    embeddings: Tensor
    event: torch.cuda.Event | None

    def arrived(self) -> np.ndarray:
        """The embeddings, waited for: (n, H)."""
        if self.event is not None:
            self.event.synchronize()
        return self.embeddings.numpy()


class TokenEncoder:
    """Gives the embeddings of tokenized texts.

    tokens_per_batch: None for the device's default. packed_from: the position id of a text's first token, for a
    backbone that takes packed texts.
    """

    def __init__(
        self,
        model: BiEncoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens_per_batch: int | None,
        packed_from: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.packed_from = packed_from
        self.budget = TokenBudget(tokens_per_batch, model.backbone.device)

    def embed(self, texts: Sequence[Tokens], *, max_length: int, with_prompt: bool, done: Done) -> np.ndarray:
        """Embeddings (N, H) float32. with_prompt: whether pooling includes prompts. done: is told after each batch."""
        embeddings = np.empty((len(texts), self.model.dimensions), dtype=np.float32)
        before: tuple[np.ndarray, list[_InFlight]] | None = None
        for rows, parts in self._launched(texts, max_length, with_prompt):
            if before is not None:
                _put(embeddings, *before, done)
            before = rows, parts
        if before is not None:
            _put(embeddings, *before, done)
        return embeddings

    def _launched(
        self, texts: Sequence[Tokens], max_length: int, with_prompt: bool
    ) -> Iterator[tuple[np.ndarray, list[_InFlight]]]:
        """Batch after batch, as rows of texts and their embeddings in flight."""
        lengths = np.array([len(tokens.ids) for tokens in texts], dtype=np.int64)
        if self.packed_from is None:
            limit = max_length
            for rows in batches_of_one_length(lengths, self.budget.tokens, limit=limit):
                batch = [texts[row] for row in rows]
                length = padded_length(len(batch[0].ids), limit)
                parts = self.budget.within(
                    batch,
                    lambda part, length=length: len(part) * length,  # type: ignore[misc]
                    lambda part: self._padded(part, limit, with_prompt),
                )
                yield rows, list(parts)
            return
        order = np.argsort(-lengths, kind="stable")
        ends = cuts_of_sums(lengths[order], self.budget.tokens) if len(order) else []
        for first, end in zip([0, *ends], ends):
            batch = [texts[row] for row in order[first:end]]
            parts = self.budget.within(
                batch, lambda part: sum(len(t.ids) for t in part), lambda part: self._packed(part, with_prompt)
            )
            yield order[first:end], list(parts)

    def _padded(self, texts: Sequence[Tokens], limit: int, with_prompt: bool) -> _InFlight:
        """The embeddings of texts of one padded length."""
        count, length = len(texts), padded_length(len(texts[0].ids), limit)
        if self.model.backbone.device.type == "cpu":
            step, most = max(_TOKENS_STEP // length, 1), max(self.budget.tokens // length, 1)
            texts = [*texts, *[texts[0]] * (min(-(-count // step) * step, most) - count)]
        batch = pad(self.tokenizer, [tokens.ids for tokens in texts], limit=limit)
        if not with_prompt:
            batch["prompt_lengths"] = torch.tensor([tokens.prompt_length for tokens in texts])
        with torch.no_grad():
            return self._sent_home(self.model(**self._there(batch))[:count])

    def _packed(self, texts: Sequence[Tokens], with_prompt: bool) -> _InFlight:
        """The embeddings of texts that are laid end to end."""
        assert self.packed_from is not None
        lengths = [len(tokens.ids) for tokens in texts]
        position_ids, boundaries = places_of(lengths, self.packed_from)
        batch = {
            "input_ids": torch.from_numpy(np.concatenate([tokens.ids for tokens in texts]).astype(np.int64)),  # (S,)
            "position_ids": torch.from_numpy(position_ids),
            "boundaries": torch.from_numpy(boundaries),
        }
        if not with_prompt:
            batch["prompt_lengths"] = torch.tensor([tokens.prompt_length for tokens in texts])
        there = self._there(batch)
        packed = Packed(there["position_ids"], there["boundaries"], max(lengths))
        with torch.no_grad():
            return self._sent_home(
                self.model.embed_packed(packed, there.get("prompt_lengths"), input_ids=there["input_ids"][None])
            )

    def _there(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the model's device; from pinned memory nobody waits for the copy."""
        device = self.model.backbone.device
        if device.type != "cuda":  # a copy from other memory must be waited for: it may be used anew
            return {name: tensor.to(device) for name, tensor in batch.items()}
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}

    def _sent_home(self, embeddings: Tensor) -> _InFlight:
        if embeddings.device.type != "cuda":
            return _InFlight(embeddings.cpu(), None)
        home = embeddings.to("cpu", non_blocking=True)  # torch gives it pinned memory
        event = torch.cuda.Event()
        event.record()
        return _InFlight(home, event)


def _put(embeddings: np.ndarray, rows: np.ndarray, parts: Sequence[_InFlight], done: Done) -> None:
    embeddings[rows] = np.concatenate([part.arrived() for part in parts])
    done(rows, embeddings)
