"""evaluate.py: several models, files that other tools read, checks that end a pipeline."""

import json

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl

import evaluate
import finetune
from embedding_finetune.model.encoding_kernels import precision


@pytest.fixture
def files(tmp_path):
    """A corpus with a duplicate, and queries with ids, groups, two answers, an answer that is not there."""
    passages = [passage_about(topic) for topic in TOPICS]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"context": [text]} for text in [*passages, passages[0] + " "]])
    rows = [
        {"id": f"q{n}", "group": "odd" if n % 2 else "even", "query": f"reset the {topic}", "pos": [passages[n]]}
        for n, topic in enumerate(TOPICS)
    ]
    rows[0]["pos"] = [passages[0], passages[1], passages[0] + " "]
    rows[1]["pos"] = ["nowhere to be found"]
    return corpus, write_jsonl(tmp_path / "q.jsonl", rows)


def run(files, *models, flags=()):
    corpus, queries = files
    argv = ["--index_file_jsonl_path", str(corpus), "--query_file_jsonl_path", str(queries)]
    return evaluate.main(["--model_name", *map(str, models), *argv, *map(str, flags)])


def test_every_file_tells_the_same_numbers_and_pytrec_eval_reproduces_them(files, tiny_bert, other_bert, tmp_path):
    import pytrec_eval

    out = tmp_path / "a" / "out"
    flags = ("--output_dir", out, "--cutoffs", 1, 3, 20, "--measures", *evaluate.MEASURES)
    metrics = run(files, tiny_bert, other_bert, flags=flags)
    document = json.loads((out / "metrics.json").read_text())
    assert document["metrics"] == metrics
    assert (document["queries"], document["passages"], document["duplicate_passages"]) == (10, 10, 1)
    assert (document["positives_not_in_corpus"], document["queries_without_findable_positive"]) == (1, 1)
    assert document["settings"]["cutoffs"] == [1, 3, 20]
    assert (document["settings"]["dtype"], document["precision"]) == ("auto", precision("auto"))
    assert f"10 passages; embedded in {precision('auto')}" in (out / "report.html").read_text()
    assert len(set(document["weights_sha256"].values())) == 2

    qrels: dict[str, dict] = {}
    for line in (out / "qrels.trec").read_text().splitlines():
        query, _, docid, relevance = line.split()
        qrels.setdefault(query, {})[docid] = int(relevance)
    assert {query: len(answers) for query, answers in qrels.items()} == {f"q{n}": 2 if n == 0 else 1 for n in range(10)}
    for model, name in ((tiny_bert, "bert"), (other_bert, "other")):
        (path,) = out.glob(f"run.*{name}.trec")
        scores: dict[str, dict] = {}
        for line in path.read_text().splitlines():
            query, _, docid, _, score, _ = line.split()
            scores.setdefault(query, {})[docid] = float(score)
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "recall.3", "ndcg_cut.3"}).evaluate(scores)
        means = {key: np.mean([values[key] for values in theirs.values()]) for key in ("recip_rank", "recall_3")}
        assert metrics[str(model)]["MRR@20"] == pytest.approx(means["recip_rank"], abs=1e-9)
        assert metrics[str(model)]["Recall@3"] == pytest.approx(means["recall_3"], abs=1e-9)

    records = read_jsonl(out / "per_query.jsonl")
    assert [record["id"] for record in records] == [f"q{n}" for n in range(10)]
    for model in (tiny_bert, other_bert):
        ranks = [record["models"][str(model)]["ranks"] for record in records]
        assert (len(ranks[0]), ranks[1]) == (2, [None])
        best = [min((rank for rank in own if rank), default=None) for own in ranks]
        assert metrics[str(model)]["MRR@20"] == pytest.approx(np.mean([1 / rank if rank else 0 for rank in best]))


def test_differences_groups_and_tables(files, tiny_bert, other_bert, capsys):
    run(files, tiny_bert, other_bert, flags=("--json",))
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    base, other = document["metrics"].values()
    difference = document["differences"][str(other_bert)]["MRR@10"]
    assert difference["mean"] == pytest.approx(other["MRR@10"] - base["MRR@10"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    groups = document["groups"]
    assert {name: group["queries"] for name, group in groups.items()} == {"even": 5, "odd": 5}
    halves = [group["metrics"][str(tiny_bert)]["MRR@10"] for group in groups.values()]
    assert np.mean(halves) == pytest.approx(base["MRR@10"])

    run(files, tiny_bert, other_bert)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "MRR@1", "Hit@1", "MRR@5", "Hit@5", "MRR@10", "Hit@10"]
    assert any(line.split()[:3] == ["even", "5", str(tiny_bert)] for line in lines)


def test_the_same_model_twice_under_two_names_is_not_different(files, tiny_bert, tmp_path):
    link = tmp_path / "again"
    link.symlink_to(tiny_bert)
    out = tmp_path / "out"
    run(files, tiny_bert, link, flags=("--output_dir", out))
    document = json.loads((out / "metrics.json").read_text())
    assert set(map(tuple, (d.values() for d in document["differences"][str(link)].values()))) == {(0, 0, 0, 1, 1)}
    assert len(set(document["weights_sha256"].values())) == 1


def test_queries_that_a_model_was_trained_on_are_counted_also_after_further_training(
    files, tiny_bert, tmp_path, caplog
):
    rows = read_jsonl(files[1])
    model = tiny_bert
    for number, part in enumerate((rows[:3], rows[2:5])):
        data = write_jsonl(tmp_path / "train.jsonl", part)
        flags = ("--max_steps", "1", "--per_device_train_batch_size", "3", "--train_group_size", "1")
        tuned = tmp_path / f"tuned{number}"
        argv = ["--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(tuned), *flags]
        finetune.main(argv)
        model = tuned
    out = tmp_path / "out"
    run(files, tiny_bert, tmp_path / "tuned0", model, flags=("--output_dir", out))
    seen = json.loads((out / "metrics.json").read_text())["queries_in_training_data"]
    assert list(seen.values()) == [0, 3, 5]
    assert f"5 of 10 queries are in the training data of {model}" in caplog.text
    assert "5 of 10 queries are in the training data" in (out / "report.html").read_text()

    (model / "training_queries.npy").write_bytes(b"not an array")
    with pytest.raises(SystemExit) as stop:
        run(files, model)
    assert stop.value.code == 2


@pytest.mark.parametrize(("limit", "status"), [("0.0", None), ("1", 1)])
def test_fail_below_ends_with_status_1_after_writing_everything(files, tiny_bert, tmp_path, capsys, limit, status):
    flags = ("--fail_below", f"MRR@10={limit}", "Hit@1=0", "--output_dir", tmp_path / "out")
    if status is None:
        run(files, tiny_bert, flags=flags)
    else:
        with pytest.raises(SystemExit) as stop:
            run(files, tiny_bert, flags=flags)
        assert stop.value.code == status
        assert f"below {limit}" in capsys.readouterr().err
    assert (tmp_path / "out" / "metrics.json").exists()


def test_fail_if_worse_asks_for_significance(files, tiny_bert, other_bert, monkeypatch, capsys):
    from embedding_finetune.evaluation import metrics, summary

    # Of six measures with p = 0.01 each, none is below 0.05 when corrected.
    for p_value, mean, fails in ((0.001, -0.1, True), (0.2, -0.1, False), (0.01, -0.1, False), (0.001, 0.1, False)):
        difference = metrics.Difference(mean, mean - 0.1, mean + 0.1, p_value)
        monkeypatch.setattr(summary, "compare", lambda *_, difference=difference, **__: difference)
        if fails:
            with pytest.raises(SystemExit) as stop:
                run(files, tiny_bert, other_bert, flags=("--fail_if_worse",))
            assert stop.value.code == 1
            assert "0.1000 below" in capsys.readouterr().err
        else:
            run(files, tiny_bert, other_bert, flags=("--fail_if_worse",))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"id": "a"}, {"id": "a"}], "q.jsonl:2: \"id\" 'a' is already in /"),
        ([{"id": "a"}, {}], "q.jsonl:2: some rows have an"),
        ([{}, {"id": 1}], "q.jsonl:2: some rows have an"),
        ([{"id": "a b"}], 'q.jsonl:1: "id"'),
        ([{"id": True}], 'q.jsonl:1: "id"'),
        ([{"id": ""}], 'q.jsonl:1: "id" is an empty string'),
        ([{"group": 5}], 'q.jsonl:1: "group"'),
    ],
)
def test_bad_ids_and_groups_are_named_by_line(files, tmp_path, capsys, rows, complaint):
    write_jsonl(tmp_path / "q.jsonl", [{"query": "q", "pos": ["p"], **row} for row in rows])
    with pytest.raises(SystemExit) as stop:
        run(files, "no-model")
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--fail_below", "MRR@7=0.5"), "MRR@7 is not measured"),
        (("--fail_below", "MRR=0.5"), "MEASURE@K=X"),
        (("--fail_if_worse",), "only one --model_name"),
        (("--output_dir", "q.jsonl"), "--output_dir"),
    ],
)
def test_checks_that_could_never_fail_are_refused(files, tmp_path, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(files, "no-model", flags=flags)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_cutoffs_far_beyond_the_corpus_give_what_the_whole_ranking_gives(files, tiny_bert, tmp_path):
    folders, metrics = [tmp_path / "near", tmp_path / "far"], []
    for folder, cutoff in zip(folders, (10, 10**9)):  # ten passages
        flags = ("--cutoffs", cutoff, "--measures", *evaluate.MEASURES, "--output_dir", folder)
        metrics.append(run(files, tiny_bert, flags=flags))
    near, far = metrics
    for name in evaluate.MEASURES:
        expected = near[f"{name}@10"] * (1e-8 if name == "Precision" else 1)
        assert expected > 0
        assert far[f"{name}@{10**9}"] == pytest.approx(expected)
    for name in ("per_query.jsonl", "qrels.trec", *(path.name for path in folders[0].glob("run.*.trec"))):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    page = (folders[1] / "report.html").read_text()
    assert "MRR at cutoffs from 1 to 10" in page
    assert len(page) < len((folders[0] / "report.html").read_text()) + 1000


@pytest.mark.parametrize("second", ["nowhere/at/all/", "./no_such_folder", "empty"])
def test_a_model_that_is_not_there_is_told_before_another_one_computes(files, tiny_bert, tmp_path, second, capsys):
    (tmp_path / "empty").mkdir()
    second = tmp_path / "empty" if second == "empty" else second
    with pytest.raises(SystemExit) as stop:
        run(files, tiny_bert, second)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"--model_name {second}: there is no such model" in error.splitlines()[-1]
    assert "encoding in" not in error
