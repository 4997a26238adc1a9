"""Training rows -> examples -> batches.

Which positive and which negatives an example holds is a pure function of (seed, epoch, index):
workers, resuming and the number of ranks cannot change it. The epoch therefore travels with the index.

Shapes: R rows, B queries, G passages per query, N distinct texts, T tokens, P known positives per query.
"""

import os
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.data.texts import text_id
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.sub_batches import Layout
from embedding_finetune.model.tokens import distinct, text_kinds
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.loss import PADDING_ID
from embedding_finetune.training.neighbours import Neighbours
from embedding_finetune.training.row_columns import flatten_column, list_lengths, read_column


class Draw(NamedTuple):
    """Which row an example is made of, and in which epoch. weight: of the loss of the micro-batch that it stands in."""

    epoch: int
    row: int
    weight: float = 1.0


Key = tuple[int, int] | Draw | None
"""What a sampler asks a TrainDataset for: (epoch, index), or no example where a batch holds fewer."""


class TrainExample(NamedTuple):
    """Row number, query, its chosen positive with up to G - 1 negatives, and the ids of the texts that answer it.

    instruction: the query's own, None where it has none. passage_ids and teacher_scores stand beside the passages;
    there are no scores where the row has none. confirmed_ids: of texts that were judged not to answer it. weight: as in
    Draw.
    """

    row: int
    query: str
    instruction: str | None
    passages: list[str]
    passage_ids: list[int]
    known_ids: np.ndarray
    confirmed_ids: list[int]
    teacher_scores: list[float]
    weight: float


class KnownPositives:
    """Query -> the ids of every text that any row gives as an answer to it."""

    def __init__(self, rows: datasets.Dataset) -> None:
        owners, answers = flatten_column(rows, "pos_ids")
        queries = rows.select_columns(["query_id"]).with_format("arrow")[:]["query_id"].to_numpy()[owners]
        order = np.lexsort((answers, queries))
        self.query_ids, self.answer_ids = queries[order], answers[order]  # (pairs,) each, sorted by query

    def of(self, query_id: int) -> np.ndarray:
        """Ids of a query's answers and of the query itself: (P,) int64."""
        first, last = np.searchsorted(self.query_ids, [query_id, query_id + 1])
        return np.append(np.unique(self.answer_ids[first:last]), query_id)

    def overlap(self, task: RetrievalTask) -> tuple[int, int]:
        """How many of a task's queries, and of its relevant passages, are queries and positives of the rows."""
        passages = [text_id(task.corpus.texts[position]) for position in task.findable_answers]
        return task.count_queries_among(self.query_ids), int(np.isin(passages, self.answer_ids).sum())


class TrainDataset(Dataset[TrainExample | None]):
    """Rows as training examples; an item is asked for by (epoch, index), see EpochSampler and Key.

    files: (R,), the number of each row's file. `group_size` is that of the longest group that the rows can fill, where
    this is smaller: no batch is wider than it needs to be. negatives: the most that a row will have, where `rows` is to
    be replaced by the same rows with other negatives.
    """

    def __init__(self, rows: datasets.Dataset, *, group_size: int, seed: int, negatives: int | None = None) -> None:
        self.rows = rows
        most = int(list_lengths(rows, "neg").max()) if negatives is None else negatives
        self.group_size = min(group_size, 1 + most)
        self.seed = seed
        self.files = read_column(rows, "file")
        self.known_positives = KnownPositives(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> TrainExample | None:
        if key is None:
            return None
        epoch, index, weight = Draw(*key)
        row = self.rows[index]
        rng = random.Random(f"{self.seed}:{epoch}:{index}")
        positive = rng.choice(range(len(row["pos"])))
        confirmed, wanted = row["confirmed"], min(self.group_size - 1, len(row["neg"]))
        negatives = rng.sample(range(confirmed), min(wanted, confirmed))
        negatives += rng.sample(range(confirmed, len(row["neg"])), wanted - len(negatives))
        texts = [row["neg"][place] for place in negatives]
        scores = []
        if row["pos_scores"] and len(row["neg_scores"]) == len(row["neg"]):
            scores = [row["pos_scores"][positive], *(row["neg_scores"][place] for place in negatives)]
        return TrainExample(
            row=index,
            query=row["query"],
            instruction=row["instruction"],
            passages=[row["pos"][positive], *texts],
            # The passages of an example without weight are nobody's negatives.
            passage_ids=[row["pos_ids"][positive], *map(text_id, texts)] if weight else [PADDING_ID] * (1 + len(texts)),
            known_ids=self.known_positives.of(row["query_id"]),
            confirmed_ids=list(map(text_id, row["neg"][:confirmed])),
            teacher_scores=scores,
            weight=weight,
        )


def check_it_can_learn(dataset: TrainDataset, args: RetrieverTrainingArguments, pool: Sized | None = None) -> None:
    """Raise UserError where there would be no batch, or no batch with a negative.

    pool: the passages that all queries are trained against, if they are.
    """
    global_batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(dataset) < global_batch:
        raise UserError(
            f"--dataloader_drop_last True leaves nothing to train on: {len(dataset)} rows do not fill a batch of "
            f"{global_batch}; lower --per_device_train_batch_size, or leave the flag out"
        )
    if pool is not None:
        if len(pool) == 1:
            raise UserError(
                "--freeze_passages: no query would have a negative: there is one passage; give --candidate_pool"
            )
        return
    if dataset.group_size == 1 and (len(dataset) == 1 or not args.rows_share_negatives):
        raise UserError(
            "no query would have a negative: no row has any, and none shares a batch with another row; "
            'mine "neg" with mine_hard_neg.py, or give a --per_device_train_batch_size of 32 or more'
        )


class EpochSampler(Sampler[Key]):
    """Yields (epoch, index) over all rows: shuffled by (seed, epoch), neighbours together if given, or in order."""

    def __init__(self, length: int, *, seed: int, shuffle: bool = True, neighbours: Neighbours | None = None) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.neighbours = neighbours
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch to draw from; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        return ((self.epoch, index) for index in self.order(self.rng()).tolist())

    def rng(self) -> np.random.Generator:
        """Random numbers of the epoch, the same in every process."""
        return np.random.default_rng([self.seed, self.epoch])

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All rows in the order of the epoch: (R,) int64."""
        if not self.shuffle:
            return np.arange(self.length)
        return rng.permutation(self.length) if self.neighbours is None else self.neighbours.order(rng)


class EmbedCollator:
    """Examples -> the arguments of RetrievalLoss.forward, `rows` and `cut_texts`; a repeated text is in a batch once.

    rows: (B,), the examples' numbers. cut_texts: (2, 2), how many queries were cut and how many there are; passages.
    Both are numpy's: they stay on the host. layout: how texts are laid out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: EmbeddingConfig,
        *,
        group_size: int,
        query_max_len: int,
        passage_max_len: int,
        layout: Layout,
        with_teacher: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.group_size = group_size
        self.with_teacher = with_teacher
        self.query, self.passage = text_kinds(config, query_max_len=query_max_len, passage_max_len=passage_max_len)

    def __call__(self, items: Sequence[TrainExample | None]) -> dict[str, Any]:
        """Tokenize the distinct texts of the examples, and point at them."""
        if torch.utils.data.get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the Rust tokenizer warns of forks, and does the same
        examples = [item for item in items if item is not None]
        texts_of = [example.passages for example in examples]
        queries, cut_queries = self.query.tokenize(
            self.tokenizer, [example.query for example in examples], [example.instruction for example in examples]
        )
        passages, cut_passages = self.passage.tokenize(self.tokenizer, [text for texts in texts_of for text in texts])
        texts_once, numbers = distinct([*queries, *passages])
        places, texts = self.layout(texts_once)
        indices = places[numbers]
        query_index, passage_index = indices[: len(queries)], _groups(indices[len(queries) :], map(len, texts_of))
        batch: dict[str, Any] = {"texts": texts}
        if self.with_teacher:
            scores = [example.teacher_scores for example in examples]
            batch["teacher_scores"] = _matrix(scores, self.group_size, float("-inf"), torch.float32)  # (B, G)
        if examples[0].weight != 1:  # that of all
            batch["weight"] = torch.tensor(examples[0].weight)
        confirmed_ids = [example.confirmed_ids for example in examples]
        if any(confirmed_ids):
            batch["confirmed_ids"] = _padded_ids(confirmed_ids)  # (B, any)
        passage_ids = [example.passage_ids for example in examples]
        known_ids = [example.known_ids for example in examples]
        return {
            **batch,
            "rows": np.array([example.row for example in examples]),  # (B,)
            "cut_texts": np.array([[cut_queries, len(queries)], [cut_passages, len(passages)]]),  # (2, 2)
            "query_index": torch.from_numpy(query_index),  # (B,)
            # A group short of negatives is filled with columns of no text, which the loss masks.
            "passage_index": _matrix(passage_index, self.group_size, 0, torch.int64),  # (B, G)
            "passage_ids": _matrix(passage_ids, self.group_size, PADDING_ID, torch.int64),  # (B, G)
            "known_ids": _padded_ids(known_ids),  # (B, P)
        }


def _groups(values: np.ndarray, sizes: Iterable[int]) -> list[list[int]]:
    """Values in consecutive groups of these sizes."""
    following = iter(values.tolist())
    return [list(islice(following, size)) for size in sizes]


def _padded_ids(lists: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
    return _matrix(lists, max(map(len, lists)), PADDING_ID, torch.int64)


def _matrix(
    lists: Sequence[Sequence[float] | np.ndarray], width: int, filling: float, dtype: torch.dtype
) -> torch.Tensor:
    """Lists of at most `width` numbers as the rows of a matrix, filled up: (len(lists), width)."""
    matrix = torch.full((len(lists), width), filling, dtype=dtype)
    for row, values in enumerate(lists):
        matrix[row, : len(values)] = torch.as_tensor(values, dtype=dtype)
    return matrix
