"""Retrieval tasks: which passages answer a query, by the data and by judgements."""

import pytest
from helpers.data import write_beir, write_jsonl

from embedding_finetune.data.corpus import Corpus, read_corpus
from embedding_finetune.data.judgements import Judgements
from embedding_finetune.data.task import load_task, make_task


def test_answers_are_found_by_canonical_text_and_counted_once(tmp_path, caplog):
    rows = write_jsonl(
        tmp_path / "queries.jsonl",
        [{"query": "q", "pos": ["e\u0301", "\u00e9 ", "absent"]}, {"query": "r", "pos": ["absent"]}],
    )
    task = load_task(rows, Corpus(["x", "\u00e9", "x "]))
    assert task.relevant == [{1: 1, 2: 1}, {3: 1}]
    assert (task.missing, task.unanswerable, task.corpus.duplicates) == (2, 1, 1)
    assert "2 positives are not in the corpus" in caplog.text


def test_judgements_make_passages_of_the_corpus_answers_or_known_not_to_be(tmp_path, caplog):
    rows = [{"query": "q", "pos": ["a"]}, {"query": "r", "pos": ["b"]}]
    judgements = Judgements(
        [("q", "b ", True), ("q", "absent", True), ("q", "c", False), ("q", "a", False), ("r", "gone", False)]
    )
    with caplog.at_level("INFO"):
        task = load_task(write_jsonl(tmp_path / "q.jsonl", rows), Corpus("abcd"), judgements=judgements)
    assert task.relevant == [{0: 1, 1: 1}, {1: 1}]
    assert task.not_relevant == {0: {2}, 1: set()}
    assert task.missing == 0
    assert "5 of 5 judgements are about its queries, and add 1 positives; 2 are about passages" in caplog.text
    assert "warning: " in caplog.text
    assert "1 judgements say that a positive of the data answers nothing" in caplog.text


def test_a_question_without_an_answer_has_one_when_it_was_judged(tmp_path):
    rows = [{"query": "q", "pos": ["a"]}, {"query": "r", "pos": []}, {"query": "s", "pos": []}]
    queries = write_jsonl(tmp_path / "q.jsonl", rows)
    judgements = Judgements([("r", "b", True), ("s", "c", False)])
    task = load_task(queries, Corpus("abc"), may_lack_answers=True, judgements=judgements)
    assert (task.queries, task.ids, task.relevant) == (["q", "r"], ["0", "1"], [{0: 1}, {1: 1}])
    assert (task.unanswered.queries, task.unanswered.ids) == (["s"], ["2"])


def test_a_judged_text_is_that_of_all_documents_of_a_beir_folder(tmp_path, caplog):
    documents = {"d1": "pump", "d2": "valve", "d3": "valve ", "d4": "gate", "d5": "panel", "d6": "alarm"}
    qrels = {"q1": {"d1": 2, "d4": 0, "d5": 0}, "q2": {"d1": 0}}
    folder = write_beir(tmp_path / "beir", documents, {"q1": "one", "q2": "two"}, test=qrels)
    judgements = Judgements(
        [
            *(("one", text, True) for text in ("valve", "panel", "pump")),
            ("one", "alarm", False),
            *(("two", text, True) for text in ("gate", "not there")),
        ]
    )
    with caplog.at_level("INFO"):
        task = load_task(folder, read_corpus(folder), judgements=judgements)
    assert task.ids == ["q1", "q2"]
    assert task.relevant == [{0: 2, 1: 1, 2: 1, 4: 1}, {3: 1}]
    assert task.not_relevant == {0: {3, 5}, 1: {0}}
    assert "6 of 6 judgements are about its queries, and add 3 positives; 1 are about passages" in caplog.text
    assert load_task(folder, read_corpus(folder)).ids == ["q1"]


def test_what_a_judgement_says_of_a_label_or_of_an_unknown_query_changes_nothing(tmp_path):
    rows = [{"query": "q", "pos": ["a"]}]
    plain = make_task(rows, Corpus("ab"))
    judged = make_task(rows, Corpus("ab"), Judgements([("q", "a", False), ("x", "b", False)]))
    assert (judged.relevant, judged.not_relevant) == (plain.relevant, {0: set()})


@pytest.mark.parametrize("name", ["relevant", "not_relevant"])
def test_judged_positions_are_those_of_the_corpus(name):
    judgements = Judgements([("q", "nowhere", name == "relevant")])
    task = make_task([{"query": "q", "pos": ["a"]}], Corpus("ab"), judgements)
    assert (task.relevant, task.missing) == ([{0: 1}], 0)
    assert not task.not_relevant.get(0)
