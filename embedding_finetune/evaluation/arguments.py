"""The flags of evaluate.py as a value."""

import os
import re
from dataclasses import dataclass, field

from embedding_finetune import files
from embedding_finetune.command_line import UserError
from embedding_finetune.data.columns import parse_columns
from embedding_finetune.data.judgements import check_judgement_paths
from embedding_finetune.parser import repeated_model
from embedding_finetune.retrieval.arguments import BM25, EncodingOptions, check_bm25s

FILES = ("metrics.json", "per_query.jsonl", "qrels.trec", "report.html")
"""The files in --output_dir, beside rankings."""

_NAME_CHARACTERS = 50
"""A file name holds this many characters of a model's name, from its end, which differs between models. File systems
allow 255 bytes."""

DEFAULT_CUTOFFS = (1, 5, 10)
DEFAULT_MEASURES = ("MRR", "Hit")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(EncodingOptions):
    """The flags of evaluate.py, by name. Raises UserError where they contradict each other.

    smaller_dimensions: what --sizes measures below truncate_dim, in decreasing order; none for half of it, a fourth and
    an eighth. fail_below: measures, such as `MRR@10`, and the values that they must reach.
    """

    model_name: list[str]
    index_file_jsonl_path: str
    query_file_jsonl_path: str
    columns: list[str] = field(default_factory=list)
    judgements: list[str] = field(default_factory=list)
    doubts_file: str | None = None
    cutoffs: list[int] = field(default_factory=lambda: list(DEFAULT_CUTOFFS))
    measures: list[str] = field(default_factory=lambda: list(DEFAULT_MEASURES))
    smaller_dimensions: list[int] = field(default_factory=list)
    output_dir: str | None = None
    json: bool = False
    seed: int = 42
    fail_below: list[tuple[str, float]] = field(default_factory=list)
    fail_if_worse: bool = False
    thresholds: bool = False
    sizes: bool = False
    ignore_query_itself: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_columns(self.columns)
        self._check_names()
        if self.fail_if_worse and len(self.model_name) == 1:
            raise UserError("--fail_if_worse: there is only one --model_name; put the model to compare with before it")
        if self.fail_if_worse and self.model_name[-1] == self.base:
            raise UserError(f"--fail_if_worse: {self.base}, the first model, comes last; put another one behind it")
        if self.smaller_dimensions and not self.sizes:
            raise UserError("--truncate_dim: several values are the dimensions of --sizes; give one, or --sizes too")
        if self.sizes and not self.dense_alone:
            raise UserError(f"--sizes: {BM25} and fusions have no embeddings; name a model by itself")
        if self.thresholds and not self.dense_alone:
            raise UserError(f"--thresholds: scores of {BM25} and of fusions mean nothing by themselves; name a model")
        measured = [f"{measure}@{cutoff}" for cutoff in self.cutoffs for measure in self.measures]
        for name, _ in self.fail_below:
            if name not in measured:
                raise UserError(f"--fail_below: {name} is not measured; these are: {', '.join(measured)}")

    def parts_of(self, name: str) -> list[str]:
        """The rankings that a name stands for: `a+b` is the fusion of two.

        A path that exists is one of them, whatever `+` it has. From the left, the longest such path is taken.
        """
        pieces, parts = name.split("+"), []
        while pieces:
            joined = ["+".join(pieces[:count]) for count in range(len(pieces), 1, -1)]
            parts.append(next(filter(os.path.exists, joined), pieces[0]))
            pieces = pieces[parts[-1].count("+") + 1 :]
        return parts

    @property
    def rankings(self) -> list[str]:
        """The models to rank with, BM25 among them: each once, however often it is named."""
        return list(dict.fromkeys(part for name in self.model_name for part in self.parts_of(name)))

    @property
    def dense_models(self) -> list[str]:
        """Those of the rankings that embed texts."""
        return [name for name in self.rankings if name != BM25]

    @property
    def dense_alone(self) -> list[str]:
        """The names that stand for one model that embeds texts."""
        return [name for name in self.model_name if name in self.dense_models]

    @property
    def single_models(self) -> list[str]:
        """The names that stand for one ranking; all names where each is a fusion."""
        return [name for name in self.model_name if len(self.parts_of(name)) == 1] or self.model_name

    @property
    def base(self) -> str:
        """What others are compared with: the first that embeds texts, if one is named by itself, else the first."""
        return next(iter(self.dense_alone), self.model_name[0])

    def _check_names(self) -> None:
        if (repeated := repeated_model(self.model_name)) is not None:
            raise UserError(f"--model_name: the same model is named twice, as {repeated}")
        for name in self.model_name:
            parts = self.parts_of(name)
            if not all(parts) or repeated_model(parts) is not None:
                raise UserError(f"--model_name {name}: a fusion joins names of different models, as {BM25}+MODEL")
        if BM25 in self.rankings:
            check_bm25s("--model_name")

    def check_paths(self) -> None:
        """Raise UserError where a file is missing, or where an output would replace another file of the run."""
        inputs = {f"--{name}": getattr(self, name) for name in ("index_file_jsonl_path", "query_file_jsonl_path")}
        for flag, path in inputs.items():
            files.require_data(flag, path)
        check_judgement_paths(self.judgements, self.doubts_file)
        outputs = {"--doubts_file": self.doubts_file, "--embeddings_dir": self.embeddings_dir}
        if self.output_dir is not None:
            files.require_folder("--output_dir", self.output_dir)
            names = [*FILES, *(run_file(name, self.model_name) for name in self.model_name)]
            outputs |= {f"--output_dir: {name}": os.path.join(self.output_dir, name) for name in names}
        if self.embeddings_dir is not None:
            files.require_folder("--embeddings_dir", self.embeddings_dir, may_be_read_only=True)
        files.require_apart(inputs, outputs)
        for path in self.judgements:
            files.require_apart({"--judgements": path}, outputs)
        files.require_outside_models({"--doubts_file": self.doubts_file}, self.dense_models)


def run_file(model: str, models: list[str]) -> str:
    """The file of a model's ranking in --output_dir: its name, with a number where two models would share it."""
    safe = [re.sub(r"[^\w.-]+", "_", name.strip("./"))[-_NAME_CHARACTERS:] for name in models]
    number = models.index(model)
    if safe.count(safe[number]) == 1:
        return f"run.{safe[number]}.trec"
    numbered = f"{safe[number]}.{number + 1}"
    while numbered in safe:  # another model may have this name
        numbered += "_"
    return f"run.{numbered}.trec"
