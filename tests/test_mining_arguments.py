"""The flags of mine_hard_neg.py as a value: its defaults are the parser's, and it refuses what contradicts itself."""

import pytest
from helpers.running import argv_of

import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.mining.arguments import MiningOptions, SelectionOptions


@pytest.fixture
def required(tmp_path):
    (tmp_path / "in.jsonl").touch()
    return {"input_file": str(tmp_path / "in.jsonl"), "output_file": str(tmp_path / "out.jsonl")}


def test_without_flags_the_options_are_their_own_defaults(required):
    parsed = mine_hard_neg.parse_arguments([*argv_of(**required), "--model_name_or_path", "m"])
    assert parsed == MiningOptions(model_name_or_path=["m"], **required)


def test_bounds_that_leave_nothing_are_refused_and_equal_ones_are_not():
    with pytest.raises(UserError, match=r"^--max_score: 0\.2 is below --min_score 0\.3"):
        SelectionOptions(max_score=0.2, min_score=0.3)
    assert SelectionOptions(max_score=0.3, min_score=0.3).negative_number == 15


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_name_or_path": ["a", "a/"]}, "--model_name_or_path: the same model is named twice, as a/"),
        ({"max_score": 0.0, "min_score": 0.1}, "--max_score"),
        ({"input_file": "nowhere"}, "--input_file: nowhere does not exist"),
        (
            {"candidate_pool": ".", "output_file": "out.jsonl"},
            "--output_file out.jsonl is in the folder of --candidate_pool",
        ),
        ({"output_file": "nowhere/out.jsonl"}, "--output_file: the folder .* does not exist"),
        ({"report_file": "."}, r"--report_file: \. is a folder"),
        ({"embeddings_dir": __file__}, "--embeddings_dir .* is a file; give a folder"),
        (
            {"output_file": "{in}", "candidate_pool": "{in}"},
            "--output_file .* is also the file of --candidate_pool, and",
        ),
        ({"report_file": "{in}"}, "--report_file .* is also the file of --input_file, and would replace it"),
        ({"report_file": "{out}"}, "--report_file .* is also the file of --output_file"),
        ({"output_file": "{model}/config.json"}, "--output_file .* is a file of the model"),
        (
            {"report_file": "{model}/config.json", "model_name_or_path": ["m"], "reranker_name_or_path": "{model}"},
            "--report_file .* is a file of the model",
        ),
    ],
)
def test_what_contradicts_itself_or_would_replace_an_input_is_refused(required, tmp_path, changes, complaint):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    places = {"{in}": required["input_file"], "{out}": required["output_file"], "{model}": str(model)}

    def filled(value):
        for name, place in places.items():
            value = value.replace(name, place) if isinstance(value, str) else value
        return value

    flags = {"model_name_or_path": [str(model)], **required}
    MiningOptions(**flags).check_paths()
    with pytest.raises(UserError, match=f"^{complaint}"):
        MiningOptions(**{**flags, **{name: filled(value) for name, value in changes.items()}}).check_paths()


def test_the_input_may_be_replaced_by_the_output(required):
    MiningOptions(model_name_or_path=["m"], **{**required, "output_file": required["input_file"]}).check_paths()
