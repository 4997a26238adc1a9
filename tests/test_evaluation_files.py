"""What evaluate.py leaves in --output_dir, on a made-up ranking; test_evaluate.py does it with models."""

import json

import numpy as np
import pytest
from helpers.data import read_jsonl
from helpers.running import evaluation

import evaluate
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.arguments import EvaluationOptions
from embedding_finetune.evaluation.files import (
    per_query_records,
    qrels_lines,
    run_lines,
    write_evaluation,
    write_lines,
)
from embedding_finetune.evaluation.ranking import values_per_query
from embedding_finetune.evaluation.summary import summarize
from embedding_finetune.retrieval.top_k import Ranking

TEXTS = [f"passage {number}" for number in range(11)]
TASK = RetrievalTask(
    queries=["first", "second", "third"],
    corpus=Corpus(TEXTS),
    relevant=[{10: 1, 2: 1, 11: 1}, {12: 1}, {4: 1}],  # of the first two queries, an answer is not in the corpus
    ids=["a", "b", "c"],
    groups=["x", None, None],
)
RANKING = Ranking(
    positions=np.array([[2, 0, 10], [1, 4, 0], [0, -1, -1]]),
    scores=np.array([[0.5, 0.25, 0.1], [1, 0.5, -1], [2, -np.inf, -np.inf]], dtype=np.float32),
)


def document_of_task():
    options = EvaluationOptions(model_name=["m"], index_file_jsonl_path="c", query_file_jsonl_path="q")
    values = {"m": values_per_query(RANKING, TASK, options.measures, options.cutoffs)}
    return summarize(values, TASK, options, weights_digests={"m": "ab"}, trained_queries={"m": 0})


def test_a_record_per_query_has_the_ranks_of_all_answers_and_the_best_passages():
    first, second, third = per_query_records(TASK, {"m": RANKING})
    assert first == {
        "id": "a",
        "query": "first",
        "group": "x",
        "models": {
            "m": {
                "ranks": [1, 3, None],
                "top": [
                    {"position": 2, "score": 0.5, "text": "passage 2"},
                    {"position": 0, "score": 0.25, "text": "passage 0"},
                    {"position": 10, "score": pytest.approx(0.1), "text": "passage 10"},
                ],
            }
        },
    }
    assert "group" not in second
    assert second["models"]["m"]["ranks"] == [None]
    assert third["models"]["m"] == {"ranks": [None], "top": [{"position": 0, "score": 2.0, "text": "passage 0"}]}


def test_ten_passages_are_kept_of_a_longer_ranking():
    ranking = Ranking(np.arange(11)[None].repeat(3, 0), np.linspace(1, 0, 11)[None].repeat(3, 0))
    record = next(per_query_records(TASK, {"m": ranking}))
    assert [passage["position"] for passage in record["models"]["m"]["top"]] == list(range(10))
    assert record["models"]["m"]["ranks"] == [3, 11, None]


def test_questions_without_an_answer_come_last_and_are_in_no_trec_file(tmp_path):
    others = RetrievalTask(["why", "who"], TASK.corpus, [{}, {}], ["d", "e"], groups=[None, "y"])
    of_others = Ranking(np.array([[7, 3], [1, -1]]), np.array([[0.5, 0.25], [0.75, -np.inf]], dtype=np.float32))
    document = document_of_task()
    write_evaluation(tmp_path / "without", document, TASK, {"m": RANKING})
    task = TASK._replace(unanswered=others)
    write_evaluation(tmp_path / "with", document, task, {"m": RANKING}, {"m": of_others})
    without, all_records = ((tmp_path / name / "per_query.jsonl").read_bytes() for name in ("without", "with"))
    assert all_records.startswith(without)
    assert [json.loads(line) for line in all_records.removeprefix(without).splitlines()] == [
        {
            "id": "d",
            "query": "why",
            "answerable": False,
            "models": {
                "m": {
                    "ranks": [],
                    "top": [
                        {"position": 7, "score": 0.5, "text": "passage 7"},
                        {"position": 3, "score": 0.25, "text": "passage 3"},
                    ],
                }
            },
        },
        {
            "id": "e",
            "query": "who",
            "group": "y",
            "answerable": False,
            "models": {"m": {"ranks": [], "top": [{"position": 1, "score": 0.75, "text": "passage 1"}]}},
        },
    ]
    for name in ("run.m.trec", "qrels.trec"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_runs_and_answers_are_lines_as_trec_has_them():
    assert list(run_lines(TASK, RANKING, "my model")) == [
        "a Q0 02 1 0.5 my_model",
        "a Q0 00 2 0.25 my_model",
        "a Q0 10 3 0.10000000149011612 my_model",  # the float32 in full
        "b Q0 01 1 1.0 my_model",
        "b Q0 04 2 0.5 my_model",
        "b Q0 00 3 -1.0 my_model",
        "c Q0 00 1 2.0 my_model",
    ]
    assert list(qrels_lines(TASK)) == ["a 0 02 1", "a 0 10 1", "a 0 missing11 1", "b 0 missing12 1", "c 0 04 1"]


def test_any_number_of_lines_is_written_each_with_its_end(tmp_path):
    for count in (0, 1, 1000, 2500):
        write_lines(tmp_path / "lines", (f"ä{number}" for number in range(count)))
        assert (tmp_path / "lines").read_bytes() == b"".join(b"\xc3\xa4%d\n" % number for number in range(count))


def test_docids_sort_as_positions_do():
    ids = list(map(Corpus(map(str, range(1000))).docid, range(1000)))
    assert sorted(ids) == ids
    assert len(set(map(len, ids))) == 1


def test_a_model_in_a_deep_folder_gets_a_run_file(tiny_bert, candidates, pairs, tmp_path):
    deep = tmp_path
    for number in range(6):
        deep = deep / (f"{number}" * 100)
    deep.parent.mkdir(parents=True)
    deep.symlink_to(tiny_bert)
    evaluate.main([*evaluation(deep, candidates, pairs), "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").glob("run.*")] == [f"run.{'5' * 50}.trec"]


def test_all_files_are_written_into_a_folder_that_is_made(tmp_path):
    document = document_of_task()
    out = tmp_path / "new" / "out"
    write_evaluation(out, document, TASK, {"m": RANKING})
    names = ["metrics.json", "per_query.jsonl", "qrels.trec", "report.html", "run.m.trec"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "metrics.json").read_text()) == document
    assert document["metrics"]["m"]["MRR@1"] == pytest.approx(1 / 3)  # the first query's answer comes first
    assert [record["id"] for record in read_jsonl(out / "per_query.jsonl")] == ["a", "b", "c"]
    assert (out / "run.m.trec").read_text().splitlines() == list(run_lines(TASK, RANKING, "m"))
    assert (out / "qrels.trec").read_text().splitlines() == list(qrels_lines(TASK))
