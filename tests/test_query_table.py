"""What the report's table of queries is made from: whole texts first, cut ones behind, and no more than fits."""

import json

import numpy as np

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.judgements import Judgements
from embedding_finetune.data.task import make_task
from embedding_finetune.evaluation import query_table as module
from embedding_finetune.evaluation.query_table import beyond_all, embedded, query_table
from embedding_finetune.retrieval.top_k import Ranking

COUNT, DEPTH = 30, 4


def table(monkeypatch, *, judgements=(), whole=1_000_000, most=4_500_000):
    """Query q's answer is passage q, at rank 3, behind two others of 400 characters."""
    monkeypatch.setattr(module, "_WHOLE_BYTES", whole)
    monkeypatch.setattr(module, "_MOST_BYTES", most)
    corpus = Corpus(f"passage {n} " + "x" * 390 for n in range(2 * COUNT))
    rows = [{"query": f"question {n} " + "y" * 290, "pos": [corpus.texts[n]]} for n in range(COUNT)]
    lines = [(rows[query]["query"], corpus.texts[passage], False) for query, passage in judgements]
    task = make_task(rows, corpus, Judgements(lines))
    positions = np.array([[COUNT + n, (n + 1) % COUNT, n, (n + 2) % COUNT] for n in range(COUNT)])
    ranking = Ranking(positions, np.tile(np.float32([0.9, 0.8, 0.7, 0.6]), (COUNT, 1)))
    return task, query_table(task, {"m": ranking}, {"m": np.full(COUNT, 3)}, DEPTH, "m")


def test_texts_are_whole_where_they_fit_and_each_is_there_once(monkeypatch):
    task, found = table(monkeypatch, judgements=[(2, COUNT + 2)])
    assert (found["total"], found["cut"], len(found["queries"])) == (COUNT, [], COUNT)
    assert sorted(found["passages"]) == sorted(task.corpus.texts[:])
    for number, (name, text, group, ranks, right, above, whole) in enumerate(found["queries"]):
        assert (name, text, group, ranks, whole) == (task.ids[number], task.queries[number], None, [3], 1)
        assert [found["passages"][place] for place in right] == [task.corpus.texts[number]]
        known = int(number == 2)
        shown = [(found["passages"][place], rank, score, judged) for place, rank, score, judged in above]
        first, second = task.corpus.texts[COUNT + number], task.corpus.texts[(number + 1) % COUNT]
        assert shown == [(first, 1, 0.9, known), (second, 2, 0.8, 0)]


def test_behind_the_whole_ones_texts_are_cut_and_marked(monkeypatch):
    task, found = table(monkeypatch, whole=5000)
    whole = [entry[6] for entry in found["queries"]]
    assert whole == sorted(whole, reverse=True)
    assert 0 < sum(whole) < COUNT
    for place, text in enumerate(found["passages"]):
        assert (len(text) == 300) == (place in found["cut"])
        assert text in task.corpus.texts[:] or (text.endswith("…") and place in found["cut"])
    assert all(len(entry[1]) == 200 for entry in found["queries"] if not entry[6])


def test_queries_are_left_out_where_the_table_is_full_with_their_passages(monkeypatch):
    _, all_of_it = table(monkeypatch, whole=0)
    _, part = table(monkeypatch, whole=0, most=10_000)
    assert 0 < len(part["queries"]) < COUNT
    assert part["queries"] == all_of_it["queries"][: len(part["queries"])]
    used = {place for entry in part["queries"] for place in [*entry[4], *(above[0] for above in entry[5])]}
    assert used == set(range(len(part["passages"])))
    assert part["cut"] == list(range(len(part["passages"])))


def test_no_text_can_end_the_script_element():
    assert "<" not in embedded(["</script>"])
    assert json.loads(embedded(["</script>"])) == ["</script>"]
    assert beyond_all(np.array([1, 0]))[1] > 10**9
