"""evaluate.py with BM25 and fusions among its models."""

import json
import subprocess
from pathlib import Path

import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_evaluation, write_jsonl
from helpers.quick_python import quick_python, quick_torchrun

import evaluate


@pytest.fixture
def data(tmp_path):
    return write_evaluation(tmp_path)


def test_evaluate_compares_keywords_a_model_and_their_fusion_with_the_model(tiny_bert, data, capsys, tmp_path):
    model, output = str(tiny_bert), tmp_path / "out"
    names = ["bm25", model, f"bm25+{model}"]
    metrics = evaluate.main(["--model_name", *names, *data, "--output_dir", str(output)])
    assert list(metrics) == names
    assert metrics["bm25"]["MRR@1"] == 1.0  # only one passage has the word
    out = capsys.readouterr().out
    assert f"bm25 - {model}" in out
    assert f"bm25+{model} - {model}" in out
    document = json.loads((output / "metrics.json").read_text())
    assert document["base"] == model
    assert list(document["differences"]) == ["bm25", f"bm25+{model}"]
    assert list(document["weights_sha256"]) == [model]
    alone = evaluate.main(["--model_name", model, *data])
    assert alone == metrics[model]
    assert len(list(output.glob("run.*.trec"))) == 3


def test_each_ranking_of_a_fusion_is_computed_once_and_need_not_stand_alone(tiny_bert, other_bert, data, monkeypatch):
    from embedding_finetune.evaluation import rankings

    loaded = []
    load = rankings.load_encoder
    monkeypatch.setattr(
        rankings, "load_encoder", lambda name, *rest, **named: loaded.append(name) or load(name, *rest, **named)
    )
    one, other = str(tiny_bert), str(other_bert)
    metrics = evaluate.main(["--model_name", one, f"{one}+{other}", f"{other}+bm25", *data])
    assert loaded == [one, other]
    assert list(metrics) == [one, f"{one}+{other}", f"{other}+bm25"]


def test_cutoffs_do_not_change_what_a_fusion_sees(tiny_bert, data):
    names = ["--model_name", str(tiny_bert), f"bm25+{tiny_bert}"]
    few = evaluate.main([*names, *data, "--cutoffs", "1"])
    many = evaluate.main([*names, *data, "--cutoffs", "1", "500"])
    assert few[f"bm25+{tiny_bert}"]["MRR@1"] == many[f"bm25+{tiny_bert}"]["MRR@1"]


def test_a_folder_with_a_plus_in_its_name_is_a_model_and_part_of_a_fusion(tiny_bert, data, tmp_path):
    folder = tmp_path / "a+b"
    folder.symlink_to(tiny_bert)
    names = ["--model_name", str(folder), f"{folder}+bm25"]
    plain = evaluate.main(["--model_name", str(tiny_bert), f"{tiny_bert}+bm25", *data])
    assert list(evaluate.main([*names, *data]).values()) == list(plain.values())


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["bm25+"], "--model_name bm25+: a fusion joins names of different models"),
        (["bm25+bm25"], "--model_name bm25+bm25: a fusion joins names"),
        (["{model}+{model}/"], "--model_name {model}+{model}/: a fusion joins names"),
        (["bm25", "{model}", "--fail_if_worse"], "--fail_if_worse: {model}, the first model, comes last"),
        (["bm25", "bm25"], "--model_name: the same model is named twice, as bm25"),
    ],
)
def test_names_that_make_no_sense_end_in_one_line(tiny_bert, data, capsys, names, complaint):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", *(name.format(model=tiny_bert) for name in names), *data])
    assert exit.value.code == 2
    assert complaint.format(model=tiny_bert) in capsys.readouterr().err


def test_fail_if_worse_compares_with_the_first_model_that_embeds(tiny_bert, other_bert, data, monkeypatch):
    from embedding_finetune.evaluation import metrics, summary

    compared = []

    def worse(base, other, *, seed):
        compared.append((base.tolist(), other.tolist()))
        return metrics.Difference(-0.1, -0.2, -0.05, 0.0001)

    one, other = str(tiny_bert), str(other_bert)
    values = evaluate.main(["--model_name", "bm25", one, other, *data, "--cutoffs", "1", "--measures", "MRR"])
    monkeypatch.setattr(summary, "compare", worse)
    flags = ["--model_name", "bm25", one, other, *data, "--cutoffs", "1", "--measures", "MRR", "--fail_if_worse"]
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags)
    assert exit.value.code == 1
    means = [(sum(base) / len(base), sum(values_of) / len(values_of)) for base, values_of in compared]
    assert means == [(values[one]["MRR@1"], values["bm25"]["MRR@1"]), (values[one]["MRR@1"], values[other]["MRR@1"])]


def test_cutoffs_deeper_than_a_fusion_end_in_a_report_and_a_warning(tiny_bert, tmp_path, caplog):
    texts = [f"{passage_about(topic)} {number}" for number in range(26) for topic in TOPICS]
    corpus = write_jsonl(tmp_path / "many.jsonl", [{"text": text} for text in texts])
    rows = write_jsonl(
        tmp_path / "q.jsonl", [{"query": f"the {topic}", "pos": [texts[n]]} for n, topic in enumerate(TOPICS)]
    )
    names = ["--model_name", "bm25", str(tiny_bert), f"bm25+{tiny_bert}"]
    files = ["--index_file_jsonl_path", str(corpus), "--query_file_jsonl_path", str(rows)]
    evaluate.main([*names, *files, "--cutoffs", "10", "260", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.html").exists()
    assert "fusions look at 100 ranks of each model" in caplog.text


def test_a_misspelt_model_behind_bm25_is_told_before_anything_is_indexed(data, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", "bm25", "no/such/model", *data])
    assert exit.value.code == 2
    told = capsys.readouterr().err
    assert "no/such/model" in told
    assert "Indexing words" not in told


def test_the_report_compares_with_the_base_also_query_by_query(tiny_bert, other_bert, data, tmp_path):
    output = tmp_path / "out"
    evaluate.main(["--model_name", "bm25", str(tiny_bert), str(other_bert), *data, "--output_dir", str(output)])
    page = (output / "report.html").read_text()
    assert '"base":1' in page


def test_without_the_package_one_line_says_what_to_install(tiny_bert, data, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", "bm25", *data])
    assert exit.value.code == 2
    assert "--model_name bm25 needs the package bm25s: pip install bm25s" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tiny_bert, data, tmp_path):
    flags = ["--model_name", "bm25", str(tiny_bert), f"bm25+{tiny_bert}", *data, "--dtype", "float32"]
    rows = read_jsonl(Path(data[3]))
    line = {"query": rows[0]["query"], "passage": rows[1]["pos"][0], "relevant": True}
    judgements = str(write_jsonl(tmp_path / "judgements.jsonl", [line]))
    for name, launcher in (("one", quick_python()), ("two", quick_torchrun(2))):
        (tmp_path / name).mkdir()
        command = [*launcher, evaluate.__file__, *flags, "--thresholds", "--sizes"]
        command += ["--judgements", judgements, "--doubts_file", str(tmp_path / name / "doubts.jsonl")]
        subprocess.run([*command, "--output_dir", str(tmp_path / name)], check=True, capture_output=True)
    documents = []
    for path in (tmp_path / "one").iterdir():
        other = tmp_path / "two" / path.name
        if path.suffix in (".trec", ".jsonl"):
            assert path.read_bytes() == other.read_bytes()
        if path.name == "metrics.json":
            documents = [json.loads(one.read_text()) for one in (path, other)]
    for document in documents:
        del document["settings"]["output_dir"], document["settings"]["doubts_file"]
    assert documents[0] == documents[1]
    assert documents[0]["thresholds"]
    assert documents[0]["sizes"]
    assert documents[0]["judged"]
    assert (tmp_path / "one" / "doubts.jsonl").exists()
