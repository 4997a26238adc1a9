"""BEIR folders: what they mean to each flag, graded and by ids, and the line that names what is wrong with one."""

import gzip
import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.data import REPOSITORY, TOPICS, passage_about, read_jsonl, write_beir, write_jsonl
from helpers.running import argv_of
from helpers.vectors import encoder_of
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.data.beir import is_beir, read_qrels
from embedding_finetune.data.corpus import Documents, read_corpus
from embedding_finetune.data.records import read_passages, read_training_rows
from embedding_finetune.data.task import load_task
from embedding_finetune.evaluation.files import per_query_records, qrels_lines, run_lines
from embedding_finetune.evaluation.metrics import MEASURES
from embedding_finetune.evaluation.ranking import rank_corpus, values_per_query

DOCUMENTS = {"d2": ("Pump", "reset it"), "d1": ("", " valve "), "d10": "valve", "d3": ("", ""), "é": "filter"}
QUERIES = {"q2": "where is the valve?", "q1": "how to reset?", "q3": "nothing answers this", "q4": "not judged"}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TRAIN = {"q1": {"d2": 2, "d1": 0}, "q2": {"d1": 1, "d10": 1, "é": -1, "d3": 1}, "q3": {"d1": 0}}


@pytest.fixture
def folder(tmp_path):
    return write_beir(tmp_path / "beir", DOCUMENTS, QUERIES, train=TRAIN, test={"q2": {"é": 1}})


def replace_line(path, number, line):
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1 : number] = [line] if isinstance(line, str) else [json.dumps(line)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_training_rows_are_the_queries_with_a_document_above_0(folder, caplog):
    with caplog.at_level("INFO"):
        rows = list(read_training_rows(folder, known={"id"}))
    assert rows == [
        {"query": "where is the valve?", "pos": ["valve"], "id": "q2"},  # two documents, one text
        {"query": "how to reset?", "pos": ["Pump reset it"], "id": "q1"},
    ]
    assert "1 documents have neither title nor text" in caplog.text
    assert "train.tsv: 1 of 3 queries have no document with a score above 0 and are left out" in caplog.text
    assert [row["pos"] for row in read_training_rows(folder / "qrels" / "test.tsv")] == [["filter"]]


def test_a_folder_is_known_by_two_of_its_three_parts(folder, tmp_path):
    assert is_beir(folder)
    assert is_beir(folder / "qrels" / "train.tsv")
    for other in (folder / "qrels", folder / "corpus.jsonl", tmp_path, tmp_path / ("x" * 300), "", "/dev/stdin"):
        assert not is_beir(other)
    (folder / "queries.jsonl").unlink()
    assert is_beir(folder)
    (folder / "corpus.jsonl").unlink()
    assert not is_beir(folder)


def test_as_passages_a_folder_means_its_corpus(folder):
    expected = ["Pump reset it", "valve", "valve", "filter"]
    assert list(read_passages(folder)) == expected
    assert list(read_passages(folder / "qrels" / "test.tsv")) == expected


def test_compressed_files_byte_order_marks_and_trec_columns_are_read(folder):
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        path = folder / name
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
        path.unlink()
    assert is_beir(folder)
    rows = list(read_training_rows(folder))
    assert len(rows) == 2
    trec = "".join(f"{q} 0  {d}\t{score}\r\n\n" for q, judged in TRAIN.items() for d, score in judged.items())
    (folder / "qrels" / "mine.tsv").write_text(trec, encoding="utf-8")
    assert list(read_training_rows(folder / "qrels" / "mine.tsv")) == rows
    assert read_qrels(folder / "qrels" / "mine.tsv") == TRAIN


@pytest.mark.parametrize(
    ("name", "number", "line", "complaint"),
    [
        ("qrels/train.tsv", 3, "q1\td9\t1", "train.tsv:3: the document 'd9' is not in "),
        ("qrels/train.tsv", 3, "q1\td9\t0", "train.tsv:3: the document 'd9' is not in "),
        ("qrels/train.tsv", 2, "q9\td1\t1", "train.tsv:2: the query 'q9' is not in "),
        ("qrels/train.tsv", 3, "q1\td2\t1", "train.tsv:3: query 'q1' and document 'd2' have the score 1, and 2"),
        ("qrels/train.tsv", 3, "q1\td1\t0.5", "train.tsv:3: the score '0.5' is no whole number"),
        ("qrels/train.tsv", 3, "q1\td1\t", "train.tsv:3: the score '' is no whole number"),
        ("qrels/train.tsv", 3, f"q1\td1\t{2**31}", "train.tsv:3: the score '2147483648' is no whole number"),
        ("qrels/train.tsv", 1, "a\tb\tc", "train.tsv:1: the score 'c' is no whole number"),
        ("qrels/train.tsv", 4, "q1\td1", "train.tsv:4: 2 columns, expected query-id, corpus-id and score"),
        ("qrels/train.tsv", 4, "q1 0 d1 1", "train.tsv:4: 1 columns, expected"),
        ("qrels/train.tsv", 4, "q1\td 1\t1", "train.tsv:4: corpus-id is 'd 1'"),
        ("qrels/train.tsv", 4, "\td1\t1", "train.tsv:4: query-id is ''"),
        ("corpus.jsonl", 4, {"_id": "d2", "text": "x"}, "corpus.jsonl:4: \"_id\" 'd2' is already in line 1"),
        ("corpus.jsonl", 4, {"_id": "d 3", "text": "x"}, "corpus.jsonl:4: \"_id\" is 'd 3'"),
        ("corpus.jsonl", 4, {"text": "x"}, 'corpus.jsonl:4: "_id" is missing'),
        ("corpus.jsonl", 4, {"_id": "d3", "text": ["x"]}, 'corpus.jsonl:4: "text" is a list, expected a string'),
        ("corpus.jsonl", 4, {"_id": "d3", "title": 3}, 'corpus.jsonl:4: "title" is a int, expected a string'),
        ("corpus.jsonl", 4, {"_id": "d3", "text": "\ud800"}, 'corpus.jsonl:4: "text" holds half a surrogate pair'),
        ("corpus.jsonl", 4, "not JSON", "corpus.jsonl:4: not valid JSON"),
        ("queries.jsonl", 2, {"_id": "q2", "text": "x"}, "queries.jsonl:2: \"_id\" 'q2' is already in line 1"),
        ("queries.jsonl", 2, {"_id": "q1", "text": " "}, 'queries.jsonl:2: "text" is missing or empty'),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_by_file_and_line(folder, name, number, line, complaint):
    replace_line(folder / name, number, line)
    with pytest.raises(UserError) as training:
        list(read_training_rows(folder))
    with pytest.raises(UserError) as evaluation:
        load_task(folder / "qrels" / "train.tsv", read_corpus(folder))
    for error in (training, evaluation):
        assert str(error.value).startswith(f"{folder}/")
        assert complaint in str(error.value)
        assert "\n" not in str(error.value)


def test_parts_that_are_missing_are_named_with_those_that_are_there(folder):
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    with pytest.raises(UserError, match=r"qrels/test\.tsv is not there; .*has dev\.tsv, train\.tsv: give .*/dev\.tsv"):
        load_task(folder, read_corpus(folder))
    (folder / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"queries\.jsonl is not there"):
        list(read_training_rows(folder))


def test_a_split_without_any_answer_and_an_empty_one_are_refused(folder):
    replace_line(folder / "qrels" / "test.tsv", 2, "q2\té\t0")
    with pytest.raises(UserError, match=r"test\.tsv: no query has a document with a score above 0"):
        load_task(folder, read_corpus(folder))
    with pytest.raises(UserError, match="no query has"):
        list(read_training_rows(folder / "qrels" / "test.tsv"))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(UserError, match=r"test\.tsv: the file is empty"):
        load_task(folder, read_corpus(folder))


def test_ids_and_texts_do_not_mix(folder, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "q", "pos": ["valve"]}])
    passages = write_jsonl(tmp_path / "passages.jsonl", [{"text": "valve"}])
    with pytest.raises(UserError, match=r"give .*beir as the passages too"):
        load_task(folder, read_corpus(passages))
    with pytest.raises(UserError, match=r"pairs\.jsonl: is no BEIR folder, .* or .*corpus\.jsonl as the passages"):
        load_task(pairs, read_corpus(folder))
    with pytest.raises(UserError, match=r"queries\.jsonl:1: .*give the folder itself"):
        load_task(folder / "queries.jsonl", read_corpus(folder / "corpus.jsonl"))
    task = load_task(pairs, read_corpus(folder / "corpus.jsonl"))  # texts, not documents
    assert (len(task.corpus), task.relevant) == (3, [{1: 1}])


def test_a_task_holds_documents_sorted_by_id_and_grades(folder, caplog):
    with caplog.at_level("INFO"):
        task = load_task(folder / "qrels" / "train.tsv", read_corpus(folder))
    assert isinstance(task.corpus, Documents)
    assert task.corpus.texts[:] == ["valve", "valve", "Pump reset it", "filter"]
    assert [task.corpus.docid(position) for position in range(5)] == ["d1", "d10", "d2", "é", "d3"]
    assert (task.ids, task.relevant) == (["q2", "q1"], [{0: 1, 1: 1, 4: 1}, {2: 2}])
    assert (task.missing, task.unanswerable, task.findable_answers) == (1, 0, {0, 1, 2})
    assert (task.corpus.duplicates, task.corpus.distinct.tolist()) == (1, [1, 2, 3])
    assert "1 positives are not in the corpus" in caplog.text
    assert list(qrels_lines(task)) == ["q2 0 d1 1", "q2 0 d10 1", "q2 0 d3 1", "q1 0 d2 2"]


IDS = st.text(st.sampled_from("aAzé\U0001f600-19"), min_size=1, max_size=3)


@settings(max_examples=60)
@given(data=st.data())
def test_pytrec_eval_gives_our_numbers_for_the_run_and_qrels_that_we_write(data, tmp_path_factory):
    """Ids of any characters, repeated texts, many ties, grades from -1 to 3, small and large cutoffs."""
    import pytrec_eval

    names = data.draw(st.lists(IDS, min_size=1, max_size=12, unique=True))
    vectors = {"a": [2, 0], "b": [1, 1], "c": [1, 1], "d": [0, 1], "q": [1, 0], "r": [1, 1], "s": [-1, 1]}
    documents = {name: data.draw(st.sampled_from(["a", "b", "c", "d", ""])) for name in names}
    documents[names[0]] = "b"
    grades = st.dictionaries(st.sampled_from(names), st.integers(-1, 3), min_size=1)
    judged = {query: data.draw(grades) for query in ("q", "r", "s")}
    judged["q"][names[0]] = 2
    folder = write_beir(
        tmp_path_factory.mktemp("beir") / "f", documents, {query: query for query in judged}, test=judged
    )
    cutoff = data.draw(st.sampled_from([1, 3, 10, 100]))
    task = load_task(folder, read_corpus(folder))
    ranking = rank_corpus(encoder_of(vectors), task, cutoff)
    ours = values_per_query(ranking, task, list(MEASURES), [cutoff])

    run: dict[str, dict] = {}
    order: dict[str, list] = {}
    for line in run_lines(task, ranking, "tag"):
        query, _, document, _, score, _ = line.split(" ")
        run.setdefault(query, {})[document] = float(score)
        order.setdefault(query, []).append(document)
    for query, scores in run.items():
        assert len(order[query]) == min(cutoff, sum(map(bool, documents.values())))
        assert order[query] == sorted(scores, key=lambda name: (scores[name], name.encode()), reverse=True)
        exact = {name: float(np.dot(vectors[query], vectors[text])) for name, text in documents.items() if text}
        assert scores == {name: exact[name] for name in order[query]}
        best = sorted(exact, key=lambda name: (exact[name], name.encode()), reverse=True)[:cutoff]
        assert order[query] == best
    qrels: dict[str, dict] = {}
    for line in qrels_lines(task):
        query, _, document, grade = line.split(" ")
        qrels.setdefault(query, {})[document] = int(grade)
    names_of = {"MRR": "recip_rank", "Hit": "success", "Recall": "recall", "nDCG": "ndcg_cut", "MAP": "map_cut"}
    names_of["Precision"] = "P"
    asked = {name if name == "recip_rank" else f"{name}.{cutoff}" for name in names_of.values()}
    answered = {query: grades for query, grades in judged.items() if max(grades.values()) > 0}
    assert list(answered) == task.ids == list(qrels)
    for known in (qrels, answered):  # what we wrote, and what the folder says
        theirs = pytrec_eval.RelevanceEvaluator(known, asked).evaluate(run)
        for number, query in enumerate(task.ids):
            for name, trec in names_of.items():
                expected = theirs[query][trec if trec == "recip_rank" else f"{trec}_{cutoff}"]
                assert ours[f"{name}@{cutoff}"][number] == pytest.approx(expected, abs=1e-9), (name, query)


def test_a_text_that_documents_share_is_encoded_once(tmp_path):
    documents = {f"d{number}": "a" if number % 2 else "b" for number in range(50)}
    folder = write_beir(tmp_path / "beir", documents, {"q": "q"}, test={"q": {"d3": 1}})
    task = load_task(folder, read_corpus(folder))
    encoder = encoder_of({"q": [1, 0], "a": [1, 0], "b": [0, 1]})
    passages = []
    encode = encoder.encode_passages
    encoder.encode_passages = lambda texts, *rest: passages.extend(texts) or encode(texts, *rest)
    positions = rank_corpus(encoder, task, 30).positions[0].tolist()
    assert sorted(passages) == ["a", "b"]
    expected = sorted((name for name in documents if documents[name] == "a"), reverse=True)
    assert [task.corpus.docid(position) for position in positions[:25]] == expected


def test_per_query_results_carry_ids(folder):
    task = load_task(folder / "qrels" / "train.tsv", read_corpus(folder))
    vectors = {text: [1, number] for number, text in enumerate(["valve", "Pump reset it", "filter"])}
    encoder = encoder_of({**vectors, **{text: [0, 1] for text in QUERIES.values()}})
    first, second = per_query_records(task, {"m": rank_corpus(encoder, task, 10)})
    assert (first["id"], first["answers"]) == ("q2", {"d1": 1, "d10": 1, "d3": 1})
    assert first["models"]["m"]["ranks"] == [4, 3, None]
    assert [passage["id"] for passage in second["models"]["m"]["top"]] == ["é", "d2", "d10", "d1"]
    assert second["answers"] == {"d2": 2}


@pytest.fixture
def manual(tmp_path):
    """Ten documents, two of them with one text; a query about each; grades."""
    documents = {f"MED-{n}": (topic, passage_about(topic)) for n, topic in enumerate(TOPICS)}
    documents["MED-99"] = documents["MED-0"]
    documents["EMPTY"] = ("", " ")
    train = {f"PLAIN-{n}": {f"MED-{n}": 2, f"MED-{(n + 1) % 10}": 0} for n in range(10)}
    test = {f"PLAIN-{n}": {f"MED-{n - 10}": 2, f"MED-{n - 9}": 1} for n in range(10, 18)}
    queries = {f"PLAIN-{n}": f"how do i reset the {topic}?" for n, topic in enumerate(TOPICS)}
    queries |= {f"PLAIN-{n + 10}": f"who do i call for the {topic}" for n, topic in enumerate(TOPICS)}
    test["PLAIN-18"] = {"MED-99": 0}
    return write_beir(tmp_path / "manual", documents, queries, train=train, test=test, dev=test)


def test_a_folder_goes_the_whole_way_as_every_flag(manual, tiny_bert, tmp_path, caplog):
    import pytrec_eval

    caplog.set_level("INFO")
    mined, tuned, out = tmp_path / "mined.jsonl", tmp_path / "tuned", tmp_path / "out"
    flags = {"range_for_sampling": "0-5", "negative_number": 2, "candidate_pool": manual, "dtype": "float32"}
    mine_hard_neg.main(argv_of(model_name_or_path=tiny_bert, input_file=manual, output_file=mined, **flags))
    rows = read_jsonl(mined)
    assert [row["id"] for row in rows] == [f"PLAIN-{n}" for n in range(10)]
    assert rows[3]["pos"] == [f"motor {passage_about('motor')}"]
    assert all(len(row["neg"]) == 2 and not set(row["neg"]) & set(row["pos"]) for row in rows)

    training = {"max_steps": 1, "per_device_train_batch_size": 4, "train_group_size": 1, "overwrite_output_dir": True}
    test = {"index_file_jsonl_path": manual, "query_file_jsonl_path": manual}
    for data in (mined, manual):
        given = {f"eval_{name}": path for name, path in test.items()} if data == mined else {}
        given = given or {"eval_query_file_jsonl_path": manual / "qrels" / "dev.tsv"}
        finetune.main(argv_of(model_name_or_path=tiny_bert, train_data=data, output_dir=tuned, **training, **given))
        summary = json.loads((tuned / "training_summary.json").read_text())
        metrics = evaluate.main(argv_of(model_name=tuned, **test, output_dir=out))
        assert (summary["rows"], summary["metrics_after"]) == (10, metrics)
        assert read_jsonl(out / "per_query.jsonl")[0]["answers"] == {"MED-0": 2, "MED-1": 1}
    assert "test.tsv: 1 of 9 queries have no document with a score above 0" in caplog.text

    (path,) = out.glob("run.*.trec")
    with path.open() as run, (out / "qrels.trec").open() as qrels:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(qrels), {"recip_rank"})
        theirs = evaluator.evaluate(pytrec_eval.parse_run(run))
    assert metrics["MRR@10"] == pytest.approx(np.mean([value["recip_rank"] for value in theirs.values()]), abs=1e-9)
    assert set(theirs) == {f"PLAIN-{n}" for n in range(10, 18)}


def test_the_commands_of_the_documents_run_on_a_folder(manual, tiny_bert, tmp_path, monkeypatch):
    section = (
        (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8").split("## A BEIR folder\n")[1].split("\n## ")[0]
    )
    commands = re.findall(r"^```\npython (.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    manual.rename("scifact")
    for command in commands:
        script, *argv = shlex.split(command.replace("\\\n", " ").replace(MINILM, str(tiny_bert)))
        scripts = {"mine_hard_neg.py": mine_hard_neg, "finetune.py": finetune, "evaluate.py": evaluate}
        scripts[script].main([*argv, *(("--max_steps", "1") if script == "finetune.py" else ())])
    assert len(commands) == 3
    document = json.loads(Path("scifact_results/metrics.json").read_text())
    assert list(document["metrics"]) == [str(tiny_bert), "scifact_tuned"]
    assert "nDCG@10" in document["metrics"]["scifact_tuned"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (mine_hard_neg, {"model_name_or_path": "none", "output_file": "out.jsonl", "input_file": "{}"}),
        (finetune, {"model_name_or_path": "none", "output_dir": "out", "train_data": "{}"}),
        (evaluate, {"model_name": "none", "index_file_jsonl_path": "{}", "query_file_jsonl_path": "{}"}),
    ],
)
def test_scripts_refuse_a_bad_folder_before_they_look_for_a_model(manual, script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        replace_line(manual / "qrels" / f"{split}.tsv", 2, "PLAIN-0\tMED-404\t1")
    with pytest.raises(SystemExit) as stop:
        script.main(argv_of(**{name: value.format(manual) for name, value in flags.items()}))
    assert stop.value.code == 2
    assert ".tsv:2: the document 'MED-404' is not in " in capsys.readouterr().err.splitlines()[-1]


def test_no_output_replaces_a_file_of_a_folder(manual, tmp_path, capsys):
    flags = {"model_name_or_path": "none", "input_file": manual, "output_file": manual / "queries.jsonl"}
    with pytest.raises(SystemExit) as stop:
        mine_hard_neg.main(argv_of(**flags))
    assert stop.value.code == 2
    assert "would replace it" in capsys.readouterr().err
    assert len(read_jsonl(manual / "queries.jsonl")) == 20


@pytest.mark.slow
def test_two_hundred_thousand_documents_are_read_in_seconds(tmp_path):
    documents = {f"{number:x}-doc": ("title", f"text {number} " * 40) for number in range(200_000)}
    queries = {f"q{number}": f"question {number}" for number in range(1000)}
    judged = {f"q{number}": {f"{number:x}-doc": 1} for number in range(1000)}
    folder = write_beir(tmp_path / "beir", documents, queries, test=judged, train=judged)
    began = time.monotonic()
    task = load_task(folder, read_corpus(folder))
    assert (len(task.corpus), len(task.queries)) == (200_000, 1000)
    middle = time.monotonic()
    assert len(list(read_training_rows(folder))) == 1000
    assert middle - began < 20
    assert time.monotonic() - middle < 20


def test_judgements_are_known_from_within_their_folder_too(folder, monkeypatch):
    monkeypatch.chdir(folder / "qrels")
    assert is_beir("train.tsv")
    assert list(read_training_rows("train.tsv")) == list(read_training_rows(folder))
