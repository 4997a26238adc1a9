"""The flags of mine_hard_neg.py: those about choosing and writing negatives, and all of them as one value."""

import argparse
import os
from dataclasses import dataclass, field, fields
from typing import get_args

from embedding_finetune import files
from embedding_finetune.command_line import UserError
from embedding_finetune.data import beir
from embedding_finetune.data.columns import parse_columns
from embedding_finetune.data.formats import check_can_be_written
from embedding_finetune.data.judgements import check_judgement_paths
from embedding_finetune.mining.choice import Strategy
from embedding_finetune.mining.filters import ScoreFilters
from embedding_finetune.parser import (
    add_switch,
    cosine_threshold,
    finite_number,
    margin,
    positive_int,
    rank_range,
    repeated_model,
    seed,
)
from embedding_finetune.retrieval.arguments import BM25, EncodingOptions, check_bm25s


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """The flags of add_selection_arguments, by name; None switches a filter off.

    Raises UserError where they contradict each other.
    """

    range_for_sampling: tuple[int, int] = (10, 210)
    negative_number: int = 15
    sampling_strategy: Strategy = "random"
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    near_duplicate_threshold: float | None = None
    keep_existing_negatives: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_score is not None and self.min_score is not None and self.max_score < self.min_score:
            raise UserError(f"--max_score: {self.max_score} is below --min_score {self.min_score}")

    @property
    def score_filters(self) -> ScoreFilters:
        """The flags that filter by score."""
        return ScoreFilters(self.max_score, self.min_score, self.absolute_margin, self.relative_margin)


_ABOUT_SCORES = ("max_score", "min_score", "absolute_margin", "relative_margin")
CHOICE_FLAGS = tuple(
    name.name for name in fields(SelectionOptions) if name.name not in ("keep_existing_negatives", "seed")
)
"""Those that finetune.py --mining_rounds has too."""


@dataclass(frozen=True, kw_only=True)
class RankingOptions(EncodingOptions, SelectionOptions):
    """What negatives depend on beside the data: the models, how they encode, and the choice, by the flags' names."""

    model_name_or_path: list[str]
    reranker_name_or_path: str | None = None

    def __post_init__(self) -> None:
        EncodingOptions.__post_init__(self)
        SelectionOptions.__post_init__(self)

    @property
    def dense_models(self) -> list[str]:
        """The models that embed texts: all but BM25."""
        return [name for name in self.model_name_or_path if name != BM25]


@dataclass(frozen=True, kw_only=True)
class MiningOptions(RankingOptions):
    """All flags of mine_hard_neg.py, by name."""

    input_file: str
    output_file: str
    columns: list[str] = field(default_factory=list)
    candidate_pool: str | None = None
    judgements: list[str] = field(default_factory=list)
    doubts_file: str | None = None
    save_scores: bool = False
    drop_rows_without_negatives: bool = False
    report_file: str | None = None
    show_examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_columns(self.columns)
        if (repeated := repeated_model(self.model_name_or_path)) is not None:
            raise UserError(f"--model_name_or_path: the same model is named twice, as {repeated}")
        self._check_bm25()

    def _check_bm25(self) -> None:
        """Raise UserError where BM25 lacks its package, or a flag needs cosines and there is no other model."""
        if BM25 not in self.model_name_or_path:
            return
        check_bm25s("--model_name_or_path")
        if self.dense_models:
            return
        by_reranker = () if self.reranker_name_or_path is not None else _ABOUT_SCORES
        for name in (*by_reranker, "near_duplicate_threshold"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"--{name}: the scores of {BM25} are no cosines; name a model beside it in --model_name_or_path, "
                    "or leave the flag out"
                )

    def check_paths(self) -> None:
        """Raise UserError where a file is missing, or where an output would replace another file of the run."""
        files.require_data("--input_file", self.input_file)
        if self.candidate_pool is not None:
            files.require_data("--candidate_pool", self.candidate_pool)
        check_can_be_written("--output_file", self.output_file)
        files.require_writable("--output_file", self.output_file)
        if self.report_file is not None:
            files.require_writable("--report_file", self.report_file)
        if self.embeddings_dir is not None:
            files.require_folder("--embeddings_dir", self.embeddings_dir, may_be_read_only=True)
        check_judgement_paths(self.judgements, self.doubts_file)
        names = ("output_file", "report_file", "doubts_file", "embeddings_dir")
        outputs = {f"--{name}": getattr(self, name) for name in names}
        files.require_outside_models(outputs, [*self.model_name_or_path, self.reranker_name_or_path])
        files.require_apart({"--candidate_pool": self.candidate_pool}, outputs)
        for judged in self.judgements:
            files.require_apart({"--judgements": judged}, outputs)
        for flag, path in (("--input_file", self.input_file), ("--candidate_pool", self.candidate_pool)):
            for file in beir.input_files(path) if path is not None and beir.is_beir(path) else ():
                files.require_apart({flag: str(file)}, outputs)
        # Rows may be written over the file that they come from, but not into a folder of such files.
        others = outputs if os.path.isdir(self.input_file) else {**outputs, "--output_file": None}
        files.require_apart({"--input_file": self.input_file}, others)


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of mine_hard_neg.py about which candidates become negatives."""
    group = parser.add_argument_group("choosing negatives")
    add_choice_arguments(group)
    add_switch(group, "--keep_existing_negatives", 'keep the "neg" of the input, and add to it up to the number')
    group.add_argument("--seed", type=seed, default=SelectionOptions.seed, metavar="N", help="seed of the sampling")


def add_choice_arguments(group: argparse._ActionsContainer) -> None:
    """Add the flags of CHOICE_FLAGS."""
    group.add_argument(
        "--range_for_sampling",
        type=rank_range,
        default="{}-{}".format(*SelectionOptions.range_for_sampling),
        metavar="A-B",
        help="sample from the ranks [A, B) of each query's ranking, counted from 0",
    )
    group.add_argument(
        "--negative_number",
        type=positive_int,
        default=SelectionOptions.negative_number,
        metavar="N",
        help="negatives per row",
    )
    group.add_argument(
        "--sampling_strategy",
        choices=get_args(Strategy),
        default=SelectionOptions.sampling_strategy,
        help="draw negatives from the range, or take its best",
    )
    group.add_argument("--max_score", type=finite_number, metavar="X", help="only negatives that score at most X")
    group.add_argument("--min_score", type=finite_number, metavar="X", help="only negatives that score at least X")
    group.add_argument(
        "--absolute_margin", type=margin, metavar="M", help="only negatives that score at most positive - M"
    )
    group.add_argument(
        "--relative_margin",
        type=margin,
        metavar="R",
        help="only negatives that score at most positive - R * |positive|; of several positives the lowest counts",
    )
    group.add_argument(
        "--near_duplicate_threshold",
        type=cosine_threshold,
        metavar="T",
        help="no passages whose embedding has a cosine of at least T to that of a positive",
    )


def add_mining_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of mine_hard_neg.py about what it writes."""
    group = parser.add_argument_group("output")
    add_switch(group, "--save_scores", 'write "pos_scores" and "neg_scores" beside "pos" and "neg"')
    add_switch(group, "--drop_rows_without_negatives", "do not write rows that got no negative")
    group.add_argument("--report_file", metavar="FILE", help="write the audit there as JSON")
    group.add_argument("--show_examples", type=positive_int, metavar="N", help="print N mined rows, drawn at random")
