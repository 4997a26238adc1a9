"""What a card says of a run: flags that decide, none that could hold a path or a secret; the outcome in words."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
from helpers.data import write_jsonl
from helpers.training import train, write_rows
from huggingface_hub import ModelCard

from embedding_finetune import __version__
from embedding_finetune.mining.arguments import SelectionOptions
from embedding_finetune.model.card import CardFacts
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.run_card import SHOWN_TEXTS, losses_of, settings_of, told, with_outcome
from embedding_finetune.training.verdict import verdict_on

FACTS = CardFacts(config=EmbeddingConfig(), dimensions=8, rows=12, losses=[], settings={}, versions={})
ARGS = SimpleNamespace(max_steps=-1, world_size=1, matryoshka_dims=None, distillation_weight=0.0)


def settings(given, **args):
    return settings_of(given, SimpleNamespace(**{**vars(ARGS), **args}))


def test_no_flag_shows_a_text_but_those_that_are_named():
    kinds = (ModelArguments, DataArguments, RetrieverTrainingArguments, SelectionOptions)
    for value in ("/data/secret", ["/data/secret"], ("a", "/data/secret")):
        given = {field.name: value for kind in kinds for field in fields(kind) if field.init}
        assert settings(given).keys() <= SHOWN_TEXTS


def test_the_length_is_said_once_and_processes_where_there_are_several():
    given = {"num_train_epochs": 3.0, "max_steps": -1, "output_dir": "x", "save_steps": 5, "debug": []}
    assert settings(given) == {"num_train_epochs": 3.0}
    assert settings(given | {"max_steps": 9}, max_steps=9, world_size=2) == {"max_steps": 9, "processes": 2}


def test_losses_have_the_names_of_sentence_transformers():
    from sentence_transformers import sentence_transformer

    args = SimpleNamespace(matryoshka_dims=[2], distillation_weight=0.5)
    names = losses_of(args)
    assert names == ["MatryoshkaLoss", "MultipleNegativesRankingLoss", "DistillKLDivLoss"]
    assert all(hasattr(sentence_transformer.losses, name) for name in names)


def test_the_verdict_is_told_without_the_name_of_the_file_that_judges():
    import numpy as np

    verdict = verdict_on(np.zeros(40), np.full(40, 0.5), what="questions of /data/secret.jsonl", seed=0)
    assert "secret" in verdict.line
    said = told(verdict)
    assert said.startswith("Beside the model before training: better. MRR@10 differs by +0.5000 (95% interval +0.5000")
    assert "secret" not in said


def test_where_the_base_is_kept_the_card_says_so():
    trainer = SimpleNamespace(base_kept=True, judges=lambda: (SimpleNamespace(queries=["a", "b"]), "eval"))
    summary = {"metrics_before": {"MRR@10": 0.5}, "metrics_after": {"MRR@10": 0.5}}
    data_args = SimpleNamespace(eval_query_file_jsonl_path=None, hold_out_by="question")
    card = with_outcome(FACTS, trainer, data_args, summary, None)
    assert "so these are the weights of the base" in card.note
    assert card.measured.described == "2 new questions about passages that training may know"
    nothing = with_outcome(FACTS, trainer, data_args, {"metrics_before": None, "metrics_after": None}, None)
    assert nothing.measured is None


def test_a_file_of_queries_measures_and_is_not_named(tiny_bert, tmp_path):
    rows = write_rows(tmp_path)
    secret = write_jsonl(tmp_path / "secret.jsonl", [{"query": "who do i call?", "pos": ["Call the alarm desk."]}])
    flags = ["--eval_query_file_jsonl_path", secret, "--eval_strategy", "steps", "--eval_steps", 2]
    folder = train(tiny_bert, rows, tmp_path / "tuned", *flags, "--load_best_model_at_end", "True", "--bf16", "True")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].dataset_name == "1 question of an evaluation file"
    assert "which measured best" in card.text
    assert "secret" not in card.content
    assert "--bf16 True" in card.text
    assert f"embedding_finetune {__version__}" in card.text


@pytest.mark.parametrize("flag", ["matryoshka_dims", "lora_rank"])
def test_flags_that_decide_are_shown(tiny_bert, tmp_path, flag):
    folder = train(tiny_bert, write_rows(tmp_path), tmp_path / "tuned", f"--{flag}", 4, "--merge_with_base", 0.25)
    assert f"--{flag} 4" in ModelCard.load(folder / "README.md").text
    merged = ModelCard.load(folder / "merged" / "README.md").text
    assert "These are 0.25 of the tuned and 0.75 of the base's weights." in merged
