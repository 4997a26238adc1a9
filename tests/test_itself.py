"""Corpora that hold the queries: none finds itself, in any ranking, and what ranks below moves up."""

import json
from collections import defaultdict
from itertools import count

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_beir, write_jsonl
from helpers.running import argv_of
from helpers.vectors import encoder_of

import evaluate
from embedding_finetune.command_line import UserError
from embedding_finetune.data.corpus import Corpus, Documents
from embedding_finetune.data.task import RetrievalTask
from embedding_finetune.evaluation.arguments import EvaluationOptions, run_file
from embedding_finetune.evaluation.itself import leave_out_queries, warn_of_queries_among_passages
from embedding_finetune.evaluation.ranking import fuse_rankings, rank_corpus
from embedding_finetune.evaluation.sizes import Embedded, sizes_of

VECTORS = {"q": [2, 0], " q": [2, 0], "r": [0, 2], "a": [3, 0], "b": [1, 1], "c": [0, 1], "why": [1, 0]}
ENCODER = encoder_of(VECTORS)
QUESTIONS = [f"how do i reset the {topic}" for topic in TOPICS]


def task_of(corpus, queries, relevant, unanswered=None, ids=None):
    ids = ids or [f"q{number}" for number in range(len(queries))]
    return RetrievalTask(queries, corpus, relevant, ids, [None] * len(queries), unanswered=unanswered)


def test_what_ranks_below_the_query_moves_up_and_a_query_that_is_its_own_answer_stays():
    task = leave_out_queries(task_of(Corpus(["a", " q", "r", "b", "c"]), ["q", "r", "b"], [{3: 1}, {2: 1}, {0: 1}]))
    assert task.left_out == {0: {1}, 2: {3}}  # r is labelled as its own answer
    positions, scores = rank_corpus(ENCODER, task, 3)
    assert positions.tolist() == [[0, 3, 4], [2, 4, 3], [0, 2, 1]]
    assert scores.tolist() == [[6, 2, 0], [4, 2, 2], [3, 2, 2]]
    everything = rank_corpus(ENCODER, task, 5)
    assert everything.positions.tolist() == [[0, 3, 4, 2, -1], [2, 4, 3, 1, 0], [0, 2, 1, 4, -1]]
    assert everything.scores[0, 4] == -np.inf
    fused = fuse_rankings([rank_corpus(ENCODER, task, 4)] * 2).positions
    assert fused[0, :4].tolist() == [0, 3, 4, 2]
    assert 1 not in fused[0]


def test_questions_without_an_answer_do_not_find_themselves_either():
    corpus = Corpus(["a", "q", "why"])
    task = task_of(corpus, ["q"], [{0: 1}], unanswered=task_of(corpus, ["c", "why"], [{}, {}]))
    asked = leave_out_queries(task).asked()
    assert asked.left_out == {0: {1}, 2: {2}}
    asked = asked._replace(instructions=None)
    assert rank_corpus(ENCODER, asked, 2).positions.tolist() == [[0, 2], [2, 1], [0, 1]]


def test_in_a_beir_folder_all_documents_of_the_querys_text_or_id_are_the_query(tmp_path):
    texts = {"1": "q", "2": "a", "3": "q", "4": "q", "7": "b", "8": "b", "9": "c"}
    corpus = Documents(write_beir(tmp_path / "beir", texts, {"7": "q"}) / "corpus.jsonl")
    task = leave_out_queries(task_of(corpus, ["q"], [{2: 1}], ids=["7"]))  # document 3 is labelled
    assert {corpus.docid(position) for position in task.left_out[0]} == {"1", "4", "7"}
    for top_k, wanted in ((2, ["2", "3"]), (4, ["2", "3", "8", "9"])):
        positions, _ = rank_corpus(ENCODER, task, top_k)
        assert [corpus.docid(position) for position in positions[0].tolist()] == wanted


def test_each_size_of_an_index_is_measured_without_the_query():
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, 32)).astype(np.float32)
    passages = np.concatenate([queries, queries + 0.01 * rng.standard_normal((20, 32)).astype(np.float32)])
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)  # each query finds itself first, then its answer
    names = [f"text {number}" for number in range(40)]
    task = task_of(Corpus(names), names[:20], [{20 + number: 1} for number in range(20)])
    options = EvaluationOptions(
        model_name=["m"], index_file_jsonl_path="c", query_file_jsonl_path="q", cutoffs=[1], sizes=True
    )

    def found(task):
        records = sizes_of(Embedded(passages[:20], passages, False), task, options)
        return {record["precision"]: record["metrics"]["MRR@1"] for record in records}

    assert found(task)["float32"] == 0
    assert set(found(leave_out_queries(task)).values()) == {1}


def test_a_corpus_of_nothing_but_the_query_is_refused():
    with pytest.raises(UserError, match="--ignore_query_itself: the corpus holds nothing but the query 'q'"):
        leave_out_queries(task_of(Corpus(["q"]), ["q"], [{1: 1}]))


@pytest.mark.parametrize(("among", "of", "warns"), [(1, 100, True), (1, 101, False), (2, 3, True), (0, 3, False)])
def test_a_warning_tells_that_a_hundredth_of_the_queries_are_passages(among, of, warns, caplog):
    queries = [f"query {number}" for number in range(of)]
    answers = [{0: 1} for _ in queries]
    task = task_of(Corpus(["answer", *queries[:among], *queries[-1:]]), queries, answers)
    task.relevant[-1][among + 1] = 1  # the last query is its own answer
    warn_of_queries_among_passages(task)
    told = f"warning: {among} of {of} queries are passages too"
    assert [record.message.startswith(told) for record in caplog.records] == [True] * warns


@pytest.fixture
def duplicates(tmp_path):
    """Ten passages and ten questions to search in; each question's answer is the passage, and of one it is itself."""
    corpus = [passage_about(topic) for topic in TOPICS] + QUESTIONS
    rows = [{"query": f" {query}", "pos": [passage_about(topic)]} for query, topic in zip(QUESTIONS, TOPICS)]
    rows[3]["pos"].append(rows[3]["query"])
    rows.append({"query": QUESTIONS[9] + " now", "pos": []})
    index = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in corpus])
    return argv_of(index_file_jsonl_path=index, query_file_jsonl_path=write_jsonl(tmp_path / "queries.jsonl", rows))


def read_run(path):
    """(query, document) -> score, in the order of the file."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {(query, document): float(score) for query, _, document, _, score, _ in lines}


def reciprocal_ranks(run):
    """(query, document) -> 1 / (60 + rank)."""
    ranks: dict = defaultdict(lambda: count(1))
    return {(query, document): 1 / (60 + next(ranks[query])) for query, document in run}


def mean_reciprocal_rank_by_trec_eval(run, folder):
    import pytrec_eval

    with (folder / "qrels.trec").open() as file:
        qrels = pytrec_eval.parse_qrel(file)
    by_query: dict = {query: {} for query, _ in run}
    for (query, document), score in run.items():
        by_query[query][document] = score
    found = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(by_query)
    return np.mean([value["recip_rank"] for value in found.values()])


def test_every_ranking_is_the_one_with_the_query_less_the_query_and_trec_eval_gives_its_numbers(
    tiny_bert, duplicates, tmp_path, caplog
):
    names = ["bm25", str(tiny_bert), f"bm25+{tiny_bert}"]
    flags = ["--model_name", *names, "--dtype", "float32", "--thresholds", "--cutoffs", "1", "20", "--sizes"]
    with_queries, without = tmp_path / "with", tmp_path / "without"
    evaluate.main([*flags, *duplicates, "--output_dir", str(with_queries)])
    assert "warning: 9 of 11 queries are passages too" in caplog.text
    caplog.clear()
    measured = evaluate.main([*flags, *duplicates, "--output_dir", str(without), "--ignore_query_itself", "True"])
    assert "warning: 9 of 11" not in caplog.text
    own = {(f"{number:02d}", f"{10 + number:02d}") for number in range(10) if number != 3}
    runs = {}
    for name in names:
        before, runs[name] = (read_run(folder / run_file(name, names)) for folder in (with_queries, without))
        assert own < before.keys()
        if name != names[-1]:
            assert list(runs[name].items()) == [pair for pair in before.items() if pair[0] not in own]
        mean = mean_reciprocal_rank_by_trec_eval(runs[name], without)
        assert measured[name]["MRR@20"] == pytest.approx(mean)
    parts = [reciprocal_ranks(runs[name]) for name in names[:2]]
    fused = {pair: sum(part.get(pair, 0) for part in parts) for part in parts for pair in part}
    assert runs[names[-1]] == pytest.approx(fused)
    document = json.loads((without / "metrics.json").read_text())
    assert document["settings"]["ignore_query_itself"] is True
    sizes = {record["precision"]: record["metrics"] for record in document["sizes"][str(tiny_bert)]}
    assert sizes["float32"]["MRR@20"] == measured[str(tiny_bert)]["MRR@20"]
    for record in read_jsonl(without / "per_query.jsonl"):
        shown = [top["text"] for model in record["models"].values() for top in model["top"]]
        assert (record["query"].strip() in shown) == (record["id"] == "03")
