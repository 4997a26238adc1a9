"""The outcome of an evaluation as one document and as tables, on made-up values."""

import numpy as np
import pytest

from embedding_finetune import __version__
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.metrics import compare, holm
from embedding_finetune.evaluation.summary import evaluation_tables, summarize, table

TASK = RetrievalTask(
    queries=["q", "r", "s", "t"],
    corpus=Corpus(["a", "b", "a "]),
    relevant=[{0: 1}, {1: 1, 2: 1}, {0: 1, 1: 1}, {3: 1}],
    ids=["0", "1", "2", "3"],
    groups=["odd", "even", "odd", None],
)
VALUES = {
    "base": {"MRR@1": np.array([1.0, 0.0, 0.0, 0.0]), "Hit@5": np.array([1.0, 1.0, 0.0, 0.0])},
    "tuned": {"MRR@1": np.array([1.0, 1.0, 0.5, 0.0]), "Hit@5": np.array([1.0, 1.0, 0.0, 1.0])},
}
OPTIONS = EvaluationOptions(
    model_name=["base", "tuned"], index_file_jsonl_path="c.jsonl", query_file_jsonl_path="q.jsonl", seed=3
)


def document():
    return summarize(
        VALUES, TASK, OPTIONS, weights_digests={"base": "ab", "tuned": "cd"}, trained_queries={"base": 0, "tuned": 2}
    )


def test_the_document_has_means_of_all_queries_and_of_each_group_and_counts():
    found = document()
    assert found["metrics"] == {"base": {"MRR@1": 0.25, "Hit@5": 0.5}, "tuned": {"MRR@1": 0.625, "Hit@5": 0.75}}
    assert found["groups"] == {
        "even": {
            "queries": 1,
            "metrics": {"base": {"MRR@1": 0.0, "Hit@5": 1.0}, "tuned": {"MRR@1": 1.0, "Hit@5": 1.0}},
        },
        "odd": {
            "queries": 2,
            "metrics": {"base": {"MRR@1": 0.5, "Hit@5": 0.5}, "tuned": {"MRR@1": 0.75, "Hit@5": 0.5}},
        },
    }
    counts = {
        "queries": 4,
        "passages": 2,
        "duplicate_passages": 1,
        "positives_not_in_corpus": 2,
        "queries_without_findable_positive": 1,
        "queries_in_training_data": {"base": 0, "tuned": 2},
        "weights_sha256": {"base": "ab", "tuned": "cd"},
        "version": __version__,
    }
    assert {name: found[name] for name in counts} == counts
    assert found["settings"]["seed"] == 3
    assert "model_name" not in found["settings"]


def test_every_model_but_the_first_is_compared_with_it():
    differences = document()["differences"]
    assert list(differences) == ["tuned"]
    for measure, difference in differences["tuned"].items():
        expected = compare(VALUES["base"][measure], VALUES["tuned"][measure], seed=3)._asdict()
        assert difference == {**expected, "p_holm": difference["p_holm"]}
    # MRR@1 and Hit@1 are one measure. The others are not the same for every query.
    distinct = [name for name in differences["tuned"] if name != "Hit@1"]
    expected = holm([differences["tuned"][name]["p_value"] for name in distinct])
    assert [differences["tuned"][name]["p_holm"] for name in distinct] == expected
    assert differences["tuned"]["MRR@1"]["mean"] == pytest.approx(0.375)


def test_tables_are_aligned_the_first_column_left_and_numbers_right():
    assert table([["model", "MRR@10"], ["a", "0.5"], ["longer name", "0.25"]]).splitlines() == [
        "model        MRR@10",
        "-----------  ------",
        "a               0.5",
        "longer name    0.25",
    ]


def test_the_tables_are_models_then_differences_then_groups():
    models, differences, groups = evaluation_tables(document()).split("\n\n")
    assert models.splitlines() == [
        "model   MRR@1   Hit@5",
        "-----  ------  ------",
        "base   0.2500  0.5000",
        "tuned  0.6250  0.7500",
    ]
    assert differences.splitlines()[0].split() == ["tuned", "-", "base", "difference", "95%", "interval", "p"]
    assert differences.splitlines()[2].split()[:2] == ["MRR@1", "+0.3750"]
    assert [line.split() for line in groups.splitlines()[2:]] == [
        ["even", "1", "base", "0.0000", "1.0000"],
        ["even", "1", "tuned", "1.0000", "1.0000"],
        ["odd", "2", "base", "0.5000", "0.5000"],
        ["odd", "2", "tuned", "0.7500", "0.5000"],
    ]
    alone = {**document(), "differences": {}, "groups": {}}
    assert evaluation_tables(alone) == models
