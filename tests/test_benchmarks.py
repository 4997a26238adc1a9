"""The benchmarks' data can be made, and what the benchmarks import is there. Their numbers are not measured here."""

import ast
import importlib
import json
import sys
from pathlib import Path

import pytest
from helpers.data import REPOSITORY, read_jsonl, write_jsonl
from helpers.quick_python import quick_python

from embedding_finetune.command_line import UserError
from embedding_finetune.data import jsonl

BENCHMARKS = REPOSITORY / "benchmarks"
OURS = {"embedding_finetune", "mine_hard_neg", "finetune", "evaluate", "helpers"}


@pytest.fixture
def make_debian(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # common.py adds to it
    return importlib.import_module("make_debian")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_every_name_of_ours_that_a_benchmark_imports_exists(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
        if isinstance(node, ast.Import):
            for name in node.names:
                assert name.name.split(".")[0] not in OURS or importlib.import_module(name.name)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_no_benchmark_reads_a_folder_outside_the_repository(path):
    texts = [n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and "../" in text]


def test_a_description_becomes_one_line_and_short_ones_are_left_out(make_debian):
    long = "word " * 29 + "end."  # 149 characters
    paragraph = "Package: a\nDescription-md5: 0\nDescription-en: a  tool\n {}\n .\n  * {}"
    assert list(make_debian.parse_description(paragraph.format(long, "x"))) == [
        {"query": "a  tool", "pos": [f"{long} * x"]}
    ]
    assert list(make_debian.parse_description(paragraph.format("short", "x"))) == []
    assert list(make_debian.parse_description("Package: a\nDescription-md5: 0")) == []


def test_packages_that_begin_alike_are_taken_for_one(make_debian):
    opening = "o" * make_debian.OPENING
    rows = [{"query": q, "pos": [p]} for q, p in [("a", opening + "1"), ("b", opening + "2"), ("a", "x"), ("c", "x")]]
    assert list(make_debian.distinct(rows)) == [rows[0], rows[3]]


def make(make_debian, monkeypatch, rows, folder, *flags):
    argv = ["make_debian.py", "--rows", str(rows), "--output_dir", str(folder), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    make_debian.main()
    return [read(folder / f"{name}.jsonl.gz") for name in ("train", "test", "candidates", "pool")]


def read(path: Path) -> list[dict]:
    return [record for _, record in jsonl.read(path)]


def test_test_queries_share_no_text_with_training_and_their_choice_does_not_depend_on_the_order_of_rows(
    make_debian, monkeypatch, tmp_path
):
    rows = read_jsonl(REPOSITORY / "example.jsonl")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    train, test, candidates, pool = make(make_debian, monkeypatch, data, tmp_path / "a", "--test_queries", "50")
    assert len(test) == 50
    assert not {text for row in train for text in row["pos"]} & {text for row in test for text in row["pos"]}
    texts = [record["text"] for record in pool]
    assert len(texts) == len(set(texts)) == len({text for row in train + test for text in row["pos"]})
    assert [record["context"] for record in candidates] == [[text] for text in texts]
    data = write_jsonl(tmp_path / "rows.jsonl", rows[::-1])
    assert make(make_debian, monkeypatch, data, tmp_path / "b", "--test_queries", "50")[:2] == [train, test]


def test_a_split_without_training_rows_is_refused(make_debian):
    rows = [{"query": "a", "pos": ["x"]}, {"query": "b", "pos": ["x"]}]
    with pytest.raises(UserError, match=r"--test_queries 1: of 2 rows none"):
        make_debian.split(rows, 1)


@pytest.fixture
def activations(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("activations")


@pytest.mark.parametrize(("dropout", "multiple"), [(0.0, 40), (0.1, 42)])
def test_a_layer_of_bert_saves_40_bytes_a_token_for_each_dimension_and_two_masks_of_dropout(
    activations, dropout, multiple
):
    """h = 64. In bfloat16 the inputs of six products (q, k, v: h each, then h, h, 4h), GELU's 4h, q, k and v.

    In float32 the inputs of two layer norms, two numbers of each, and one of each of four heads.
    """
    memory = activations.memory_of({"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}, dropout)
    in_bfloat16 = 2 * (3 * 64 + 64 + 64 + 4 * 64 + 4 * 64 + 3 * 64)
    assert memory.token_and_layer == in_bfloat16 + 4 * (2 * 64 + 4 + 4) + (2 * 64 if dropout else 0)
    assert memory.token_and_layer == multiple * 64 + 32
    assert 3 * memory.token_and_layer < memory.token < 4 * memory.token_and_layer


def test_memory_is_that_of_the_parameters_and_of_the_tokens_that_are_held(activations, monkeypatch, capsys):
    monkeypatch.setattr(activations, "MODELS", {"small": {"hidden_size": 64, "num_hidden_layers": 2}})
    monkeypatch.setattr(activations, "memory_of", lambda *_: activations.Memory(3 * 10**9, 10**5, 640))
    flags = "--batches 100x4 --query_tokens 10 --passage_tokens 20 --tokens_per_sub_batch 5000"
    monkeypatch.setattr(sys, "argv", ["activations.py", *flags.split()])
    activations.main()
    out = capsys.readouterr().out
    assert "- small: 10.0 without dropout, 10.0 with it" in out
    assert "100 x 4, 9,000 tokens" in out
    assert out.splitlines()[-1] == "| small | 3.0 | 100 | 3.9 (3.5) |"


def test_a_benchmark_without_its_data_names_the_command_that_makes_it(make_debian, tmp_path):
    common = importlib.import_module("common")
    with pytest.raises(SystemExit, match=r"train\.jsonl\.gz does not exist: run python benchmarks/make_debian\.py"):
        next(common.records(tmp_path, "train"))


@pytest.fixture
def evaluation_scale(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("evaluation_scale")


def test_made_up_rankings_repeat_no_passage_and_have_the_right_ones_at_many_ranks(evaluation_scale):
    relevant = [{number % 100: 1, **({(number + 1) % 100: 1} if number % 2 else {})} for number in range(500)]
    positions, scores = evaluation_scale.made_up_ranking(relevant, 100, 20, 0.6, seed=0)
    assert positions.shape == scores.shape == (500, 20)
    assert all(len(set(row)) == 20 and set(row) <= set(range(100)) for row in positions.tolist())
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    ranks = [[row.index(answer) for answer in one if answer in row] for row, one in zip(positions.tolist(), relevant)]
    first = [min(found, default=None) for found in ranks]
    assert 0.6 < first.count(0) / 500 < 0.85
    assert len({*first, *(rank for found in ranks for rank in found)}) == 21  # each of 20, and none


@pytest.mark.slow
def test_an_evaluation_with_made_up_rankings_tells_what_each_stage_took(evaluation_scale, monkeypatch, tmp_path, capfd):
    flags = "--queries 30 --passages 90 --ranks 20 --measures MRR nDCG --folder"
    monkeypatch.setattr(sys, "argv", ["evaluation_scale.py", *flags.split(), str(tmp_path)])
    evaluation_scale.main()
    rows = [line.split(" | ") for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    stages = [row[0].removeprefix("| ") for row in rows]
    assert stages[1:4] == ["imports", "read passages", "read queries"]
    assert {evaluation_scale.MADE_UP, "measures", "thresholds", "per_query.jsonl", "report.html"} < set(stages)
    assert float(rows[-1][1]) > 0
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert list(metrics["differences"]) == [str(tmp_path / "tuned")]
    assert len((tmp_path / "results" / "per_query.jsonl").read_text().splitlines()) == metrics["queries"] == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["libraries", "attention", "train", "encode", "agreement", "search", "large", "profile"]
)
def test_the_sections_about_a_gpu_run_in_reduced_form_without_one(name, monkeypatch, tmp_path_factory):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # common.py adds to it
    gpu = importlib.import_module("gpu")
    folder = tmp_path_factory.getbasetemp() / "gpu"  # the models are made once
    folder.mkdir(exist_ok=True)
    rows = list(gpu.SECTIONS[name](folder))
    assert rows
    assert not [row for row in rows if "failed" in row]
    assert gpu.table(rows).startswith("| ")


def test_tables_of_a_gpu_are_joined_where_their_columns_are_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu = importlib.import_module("gpu")
    rows = [{"a": 1.23456, "b": "x|y"}, {"a": 12345.6, "b": None}, {"c": 1}]
    assert gpu.table(rows) == "| a | b |\n| --- | --- |\n| 1.23 | x/y |\n| 12346 | None |\n\n| c |\n| --- |\n| 1 |"


def test_what_killed_runs_lost_is_told(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # common.py adds to it
    kill_encoding = importlib.import_module("kill_encoding")
    jsonl.write(tmp_path / "pool.jsonl.gz", [{"text": f"the pump is {'a ' * number}desk"} for number in range(50)])
    argv = ["kill_encoding.py", "--model", str(tiny_bert), "--data", str(tmp_path), "--kills", "1", "--texts", "50"]
    monkeypatch.setattr(sys, "argv", [*argv, "--seconds", "0.01"])
    monkeypatch.setattr(kill_encoding, "_PYTHON", quick_python())
    kill_encoding.main()
    _, killed, last = capsys.readouterr().out.splitlines()
    _, _, encoded, kept, _, lost, _ = killed.split()
    assert int(lost) == max(int(encoded) - int(kept), 0)
    assert last.startswith("not killed: ")
