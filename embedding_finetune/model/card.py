"""README.md of a checkpoint: the model card that the hub shows, and whose metadata it reads.

It holds no text of the user's data, no path, no name of a file and no time. So identical runs have identical cards.
Instructions and flags stand in it: they are in other files of the checkpoint too, or decide about the result.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from embedding_finetune.command_line import UserError
from embedding_finetune.files import AnyPath, atomic_writer
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.revisions import HUB_NAME, at_revision

CARD = "README.md"
_HUB = "https://huggingface.co"
_MARK = re.compile(r"\n<!-- finetune\.py wrote this; as it was written: ([0-9a-f]{32}) -->\n\Z")
_USUAL_FOLDERS = {"checkpoints", "data", "exp", "model", "models", "out", "output", "outputs", "results", "runs", "tmp"}
"""Their subfolders are written as names of the hub are, and old configs keep such paths."""


@dataclass(frozen=True)
class Measured:
    """What the model was measured with, and how it fared.

    what: what the queries are, `questions about ...`. before, after: measure -> mean, before training and with the
    weights of the checkpoint; before is None where it was not measured. verdict: a sentence about the difference.
    """

    what: str
    queries: int
    before: Mapping[str, float] | None
    after: Mapping[str, float]
    verdict: str = ""

    @property
    def described(self) -> str:
        """How many queries, and what they are."""
        return f"{self.queries} {self.what if self.queries > 1 else self.what.replace('questions', 'question', 1)}"


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    base: names of the models that training started from, by base_names; revision: that of the base, if one was given.
    repository: where the checkpoint will be found on the hub, None where that is not known. passage_model: where
    passages kept their embeddings, what passage_model.json says of the model that made these. rows: that were trained
    on. losses: sentence-transformers' names of them. settings: flag -> value. versions: package -> version. note: a
    sentence about these weights.
    """

    config: EmbeddingConfig
    dimensions: int
    rows: int
    losses: Sequence[str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    base: Sequence[str] = ()
    revision: str | None = None
    repository: str | None = None
    steps: int = 0
    epochs: float = 0.0
    measured: Measured | None = None
    note: str = ""
    adapter_alone: bool = False
    runs_own_code: bool = False
    passage_model: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """What the model is called: as its repository, else after its base."""
        if self.repository is not None:
            return self.repository.rpartition("/")[2]
        return f"{self.base[0].rpartition('/')[2]}-finetuned" if self.base else "finetuned-embedding-model"


def write_card(folder: AnyPath, facts: CardFacts) -> None:
    """Write README.md into a folder, in place of what is there."""
    text = card_text(facts)
    with atomic_writer(Path(folder) / CARD) as file:
        file.write(f"{text}\n<!-- finetune.py wrote this; as it was written: {_digest(text)} -->\n".encode())


def is_own_card(path: Path) -> bool:
    """Whether a file is a card of write_card that nobody has changed since."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARK.search(text)
    return path.name == CARD and mark is not None and mark[1] == _digest(text[: mark.start()])


def check_card_is_not_replaced(folder: AnyPath) -> None:
    """Raise UserError where a folder to write a model to, or `merged` in it, has a README.md of the user's own."""
    for path in (Path(folder) / CARD, Path(folder) / "merged" / CARD):
        if path.exists() and not is_own_card(path):
            raise UserError(
                f"--output_dir {folder}: {path} is no card that finetune.py wrote, or was changed since, and would be "
                "replaced; move it"
            )


def base_names(name_or_path: str) -> list[str]:
    """The names on the hub of the model that training starts from; empty for a folder that does not say them.

    For a folder they are the `base_model` of its own card, else what its config.json was loaded from. A path is none.
    """
    if not os.path.exists(name_or_path):
        return [at_revision(name_or_path)[0]]
    for said in (_said_by_card(Path(name_or_path)), _said_by_config(Path(name_or_path))):
        names = said if isinstance(said, list) else [said]
        if all(map(_is_hub_name, names)):
            return names
    return []


def _said_by_card(folder: Path) -> Any:
    try:
        return (metadata_load(folder / CARD) or {}).get("base_model")
    except Exception:  # of a file that is not there, and of YAML that is none: they share no class
        return None


def _said_by_config(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None


def _is_hub_name(said: Any) -> bool:
    """Whether this is OWNER/NAME, and no path: a model without an owner may as well be a folder's name."""
    if not isinstance(said, str) or said.count("/") != 1 or HUB_NAME.fullmatch(said) is None:
        return False
    return said.partition("/")[0].lower() not in _USUAL_FOLDERS and not os.path.exists(said)


def card_text(facts: CardFacts) -> str:
    """The card: metadata, and sections for people."""
    what, index = _what_it_is(facts), _index(facts)
    parts = [f"# {facts.name}", what, index, facts.note, _measures(facts), _usage(facts), _training(facts)]
    text = "\n\n".join(filter(None, parts))
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{text}\n").content


def _metadata(facts: CardFacts) -> ModelCardData:
    measured = facts.measured
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=facts.base[0] if len(facts.base) == 1 else list(facts.base) or None,
        tags=[
            *("sentence-transformers", "sentence-similarity", "feature-extraction", f"dataset_size:{facts.rows}"),
            *(f"loss:{loss}" for loss in facts.losses),
        ],
        model_name=None if measured is None else facts.name,
        eval_results=None if measured is None else _results(measured),
    )


def _results(measured: Measured) -> list[EvalResult]:
    """The measures of the model, and those of its base under names of their own."""
    named = [(name.lower(), name, value) for name, value in measured.after.items()]
    for name, value in (measured.before or {}).items():
        named.append((f"{name.lower()}_before_training", f"{name} before training", value))
    return [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type="unknown",
            dataset_name=measured.described,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, name, value in named
    ]


def _what_it_is(facts: CardFacts) -> str:
    links = " and ".join(f"[{name}]({_HUB}/{name})" for name in facts.base)
    at = "" if facts.revision is None else f" at revision `{facts.revision}`"
    base = f"It is {links}{at}, finetuned" if links else "It was finetuned"
    cut = "Texts" if facts.passage_model is None else "Questions"
    length = "" if facts.config.max_seq_length is None else f" {cut} are cut to {facts.config.max_seq_length} tokens."
    scaled = "scaled to length 1" if facts.config.normalized else "not scaled"
    return (
        f"This model turns questions and passages into vectors of {facts.dimensions} numbers, so that a search finds "
        f"the passages that answer a question. {base} on {facts.rows} rows of questions and passages. Its pooling is "
        f"{facts.config.pooling}, and vectors are {scaled}.{length}"
    )


def _index(facts: CardFacts) -> str:
    if facts.passage_model is None:
        return ""
    return (
        "Only the model of queries was trained. Passages keep the embeddings of the model before training, so an index "
        "made with it stays valid; `passage_model.json` says which model that is, and with which settings. Its "
        f"weights have the SHA-256 `{facts.passage_model['weights_sha256']}`, and passages are cut to "
        f"{facts.passage_model['max_seq_length']} tokens. Queries and passages go through two models: "
        "sentence-transformers 5 or later loads them. `encode_query` takes that of queries; `encode` alone takes that "
        "of passages."
    )


def _measures(facts: CardFacts) -> str:
    measured = facts.measured
    if measured is None:
        return ""
    before = measured.before or {}
    rows = [
        f"| {name} | {f'{before[name]:.4f}' if name in before else 'not measured'} | {value:.4f} |"
        for name, value in measured.after.items()
    ]
    lines = ["| measure | before training | this model |", "|---|---|---|", *rows]
    verdict = f"\n\n{measured.verdict}" if measured.verdict else ""
    table = "\n".join(lines)
    return f"## Measured\n\nMeans over {measured.described}.\n\n{table}{verdict}"


def _usage(facts: CardFacts) -> str:
    name = facts.repository or "."
    folder = "" if facts.repository else "`.` stands for this folder, or for the name that you give it on the hub.\n\n"
    peft = "These are the weights of an adapter alone: install `peft` too.\n\n" if facts.adapter_alone else ""
    own_code = ", trust_remote_code=True" if facts.runs_own_code else ""
    prompts = {"query": facts.config.query_instruction, "document": facts.config.passage_instruction}
    said = json.dumps(prompts, ensure_ascii=False)
    return f"""## Use

{folder}{peft}With [sentence-transformers](https://sbert.net):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{own_code})
queries = model.encode_query(["When is the office open?"])
passages = model.encode_document(["The office opens at nine.", "The gate is green."])
print(model.similarity(queries, passages))
```

These methods put the model's instructions before texts:

```json
{said}
```

With the scripts that trained it:

```bash
python evaluate.py --model_name {name} --query_file_jsonl_path queries.jsonl --index_file_jsonl_path passages.jsonl
python mine_hard_neg.py --model_name_or_path {name} --input_file pairs.jsonl --output_file mined.jsonl
```"""


def _training(facts: CardFacts) -> str:
    settings = "\n".join(f"--{flag} {_shown(value)}" for flag, value in facts.settings.items())
    versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
    losses = ", ".join(facts.losses)
    return f"""## Training

Rows: {facts.rows}. Steps: {facts.steps}. Epochs: {facts.epochs:.4g}. Loss, as sentence-transformers names it: {losses}.

```
{settings}
```

{versions}"""


def _shown(value: Any) -> str:
    """A flag's value on one line."""
    if isinstance(value, list | tuple):
        return ("-" if isinstance(value, tuple) else " ").join(map(_shown, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | dict) else str(value)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
