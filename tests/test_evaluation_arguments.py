"""The flags of evaluate.py as a value: its defaults are the parser's, and it refuses what contradicts itself."""

import pytest
from helpers.running import argv_of

import evaluate
from embedding_finetune.command_line import UserError
from embedding_finetune.evaluation.arguments import EvaluationOptions, run_file


@pytest.fixture
def required(tmp_path):
    for name in ("c.jsonl", "q.jsonl"):
        (tmp_path / name).touch()
    return {
        "index_file_jsonl_path": str(tmp_path / "c.jsonl"),
        "query_file_jsonl_path": str(tmp_path / "q.jsonl"),
    }


def test_without_flags_the_options_are_their_own_defaults(required):
    parsed = evaluate.parse_arguments([*argv_of(**required), "--model_name", "m"])
    assert parsed == EvaluationOptions(model_name=["m"], **required)


@pytest.mark.parametrize(
    ("flags", "most", "fewer"),
    [
        ("", None, []),
        ("--truncate_dim 64", 64, []),
        ("--truncate_dim 64 64", 64, []),
        ("--sizes --truncate_dim 64 384 192 64", 384, [192, 64]),
        ("--sizes --truncate_dim 64 --truncate_dim 384", 384, [64]),
    ],
)
def test_embeddings_are_cut_to_the_largest_value_of_truncate_dim_and_sizes_has_the_others(required, flags, most, fewer):
    parsed = evaluate.parse_arguments([*argv_of(**required), "--model_name", "m", *flags.split()])
    assert (parsed.truncate_dim, parsed.smaller_dimensions) == (most, fewer)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_name": ["a", "b", "a/"]}, "--model_name: the same model is named twice, as a/"),
        ({"fail_if_worse": True}, "--fail_if_worse: there is only one --model_name"),
        (
            {"fail_below": [("MRR@7", 0.5)]},
            "--fail_below: MRR@7 is not measured; these are: MRR@1, Hit@1, MRR@5, Hit@5, MRR@10",
        ),
        (
            {"fail_below": [("nDCG@5", 0.5)], "measures": ["MRR"]},
            "--fail_below: nDCG@5 is not measured; these are: MRR@1, MRR@5",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_when_the_options_are_made(required, changes, complaint):
    with pytest.raises(UserError, match=f"^{complaint}"):
        EvaluationOptions(**{"model_name": ["m"], **required, **changes})
    EvaluationOptions(model_name=["m", "n"], **required, fail_if_worse=True, fail_below=[("Hit@5", 0.5)])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"query_file_jsonl_path": "nowhere"}, "--query_file_jsonl_path: nowhere does not exist"),
        ({"index_file_jsonl_path": ".", "output_dir": "."}, "--output_dir: metrics.json .* is in the folder"),
        ({"output_dir": __file__}, "--output_dir .* is a file; give a folder"),
        ({"embeddings_dir": __file__}, "--embeddings_dir .* is a file; give a folder"),
    ],
)
def test_paths_are_checked_before_anything_is_read(required, changes, complaint):
    EvaluationOptions(model_name=["m"], **required).check_paths()
    with pytest.raises(UserError, match=f"^{complaint}"):
        EvaluationOptions(**{"model_name": ["m"], **required, **changes}).check_paths()


def test_no_file_of_the_output_replaces_an_input(required, tmp_path):
    queries = tmp_path / "per_query.jsonl"
    queries.touch()
    options = EvaluationOptions(
        model_name=["m"], **{**required, "query_file_jsonl_path": str(queries), "output_dir": str(tmp_path)}
    )
    with pytest.raises(
        UserError, match=r"per_query\.jsonl is also the file of --query_file_jsonl_path, and would replace"
    ):
        options.check_paths()


@pytest.mark.parametrize("name", ["run.m.trec", "qrels.trec", "report.html"])
def test_the_folder_of_embeddings_and_no_input_may_stand_where_a_file_is_written(required, tmp_path, name):
    (tmp_path / name).touch()
    paths = {"query_file_jsonl_path": str(tmp_path / name), "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match=f"--output_dir: {name} .* is also the file of --query_file_jsonl_path"):
        EvaluationOptions(model_name=["m"], **{**required, **paths}).check_paths()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a+b", ["a+b"]),
        ("a+b+bm25", ["a+b", "bm25"]),
        ("bm25+a+b", ["bm25", "a+b"]),
        ("a+c", ["a", "c"]),
        ("a+b+c", ["a+b+c"]),  # the longest, not a+b and c
        ("a+b+c+a+b", ["a+b+c", "a+b"]),
        ("x+a+b+c+y", ["x", "a+b+c", "y"]),
        ("b+c+d", ["b", "c+d"]),
        ("b+c+d+e", ["b", "c+d", "e"]),
        ("sub/p+q+bm25", ["sub/p+q", "bm25"]),
        ("bm25", ["bm25"]),
        ("bm25+", ["bm25", ""]),
        ("a++b", ["a", "", "b"]),
    ],
)
def test_a_path_that_exists_is_one_part_of_a_fusion_the_longest_from_the_left(
    required, tmp_path, monkeypatch, name, parts
):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "a+b", "a+b+c", "c+d", "sub/p+q"):
        (tmp_path / folder).mkdir(parents=True)
    assert EvaluationOptions(model_name=["m"], **required).parts_of(name) == parts


def test_names_of_models_become_names_of_files_that_differ():
    models = ["./models/a b", "models/a_b", "models_a_b.2", "BAAI/bge-base-en-v1.5", "é/" + "x" * 60]
    names = [run_file(model, models) for model in models]
    assert names == [
        f"run.{name}.trec"
        for name in ("models_a_b.1", "models_a_b.2_", "models_a_b.2", "BAAI_bge-base-en-v1.5", "x" * 50)
    ]
