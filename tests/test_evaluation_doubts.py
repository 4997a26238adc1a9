"""Doubts of an evaluation, and the way back: they are judged, and the next evaluation counts what they say."""

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_beir, write_jsonl

import evaluate
from embedding_finetune.data.corpus import Corpus, read_corpus
from embedding_finetune.data.judgements import Judgements
from embedding_finetune.data.task import load_task, make_task
from embedding_finetune.evaluation.doubts import doubts_of
from embedding_finetune.retrieval.top_k import Ranking


def ranking(*rows):
    return Ranking(np.array(rows), np.tile(np.linspace(1, 0.1, len(rows[0]), dtype=np.float32), (len(rows), 1)))


def test_what_is_labelled_judged_or_the_query_itself_is_not_in_doubt():
    rows = [{"query": "q", "pos": ["a", "b"]}, {"query": "r", "pos": ["nowhere"]}]
    judgements = Judgements([("q", "c", False), ("q", "d", True), ("q", "e", True), ("q", "e", False)])
    task = make_task([{**rows[0], "pos": ["a", "b", "d"]}, rows[1]], Corpus([*"abcdefg", "q "]), judgements)
    found = doubts_of({"m": ranking([7, 2, 3, 5, 4, 1, 6, 0], [0, 1, 2, 3, 4, 5, 6, 7])}, task)
    assert [(doubt.query, doubt.passage, doubt.positive) for doubt in found] == []  # 3 is an answer, and stands above
    found = doubts_of({"m": ranking([7, 2, 5, 4, 1, 6, 0, 3], [0, 1, 2, 3, 4, 5, 6, 7])}, task)
    assert [(doubt.query, doubt.passage, doubt.positive) for doubt in found] == [(0, 5, 1)]


def test_the_right_passage_beside_a_doubt_is_the_last_models_best():
    task = make_task([{"query": "q", "pos": ["a", "b"]}], Corpus("abcd"))
    (doubt, *_) = doubts_of({"one": ranking([2, 0, 3, 1]), "two": ranking([2, 1, 3, 0])}, task)
    assert (doubt.passage, doubt.positive) == (2, 1)
    assert [one.positive_rank for one in doubt.standings.values()] == [4, 2]


def test_documents_with_a_score_of_0_are_settled(tmp_path):
    documents = {f"d{n}": text for n, text in enumerate("abcd")}
    folder = write_beir(tmp_path / "beir", documents, {"q": "query"}, test={"q": {"d2": 1, "d0": 0}})
    task = load_task(folder, read_corpus(folder))
    assert [doubt.passage for doubt in doubts_of({"m": ranking([0, 1, 2, 3])}, task)] == [1]


@pytest.fixture
def files(tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": passage_about(topic)} for topic in TOPICS])
    rows = [{"query": f"reset the {topic}", "pos": [passage_about(topic)]} for topic in TOPICS]
    return ["--index_file_jsonl_path", corpus, "--query_file_jsonl_path", write_jsonl(tmp_path / "q.jsonl", rows)]


def run(model, files, *flags):
    return evaluate.main(["--model_name", *map(str, [*model, *files, *flags])])


def test_doubts_that_are_judged_change_the_next_evaluation_and_are_asked_no_more(
    tiny_bert, other_bert, files, tmp_path, capsys, caplog
):
    models, doubts = [tiny_bert, other_bert], tmp_path / "doubts.jsonl"
    before = run(models, files, "--doubts_file", doubts, "--cutoffs", "1", "10")
    lines = read_jsonl(doubts)
    assert len(lines) > 10
    assert all(line["relevant"] is None and set(line["models"]) == {str(model) for model in models} for line in lines)
    assert "Judged@1" not in capsys.readouterr().out
    answers = [{**line, "relevant": number % 2 == 0} for number, line in enumerate(lines[:10])]
    judgements = write_jsonl(tmp_path / "judgements.jsonl", [*answers, lines[10]])
    with caplog.at_level("INFO"):
        after = run(models, files, "--judgements", judgements, "--doubts_file", doubts, "--cutoffs", "1", "10")
    assert "10 of 10 judgements are about its queries, and add 5 positives" in caplog.text
    assert after[str(tiny_bert)]["MRR@10"] > before[str(tiny_bert)]["MRR@10"]
    settled = {(line["query"], line["passage"]) for line in answers}
    asked = {(line["query"], line["passage"]) for line in read_jsonl(doubts)}
    assert not settled & asked
    assert (lines[10]["query"], lines[10]["passage"]) in asked
    assert "judged or labelled" in (told := capsys.readouterr().out)
    assert "Judged@1" in told


def test_fusions_do_not_bear_witness_beside_models(tiny_bert, files, tmp_path):
    doubts = tmp_path / "doubts.jsonl"
    run(["bm25", tiny_bert, f"bm25+{tiny_bert}"], files, "--doubts_file", doubts)
    assert set(read_jsonl(doubts)[0]["models"]) == {"bm25", str(tiny_bert)}
    run([f"bm25+{tiny_bert}"], files, "--doubts_file", doubts)
    assert set(read_jsonl(doubts)[0]["models"]) == {f"bm25+{tiny_bert}"}


def test_a_file_is_not_read_and_replaced_at_once(tiny_bert, files, tmp_path, capsys):
    path = write_jsonl(tmp_path / "j.jsonl", [{"query": "q", "passage": "p", "relevant": None}])
    with pytest.raises(SystemExit) as stop:
        run([tiny_bert], files, "--judgements", path, "--doubts_file", path)
    assert stop.value.code == 2
    assert "is also the file of --judgements" in capsys.readouterr().err
