"""The types of flags, and an argparse that loses nothing it was given."""

import argparse
import re

import pytest

from embedding_finetune import parser as flag_types
from embedding_finetune.parser import add_switch, new_parser, repeated_model


def test_what_a_parse_was_given_is_its_own():
    parser = new_parser("")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1])
    parser.add_argument("--switch", action="store_false")
    assert parser.parse_args([]) == argparse.Namespace(numbers=[1], switch=True)
    assert parser.given == {}
    for _ in range(2):
        assert parser.parse_args(["--numbers", "2", "--numbers=3", "--switch"]).numbers == [2, 3]
        assert parser.given == {"numbers": [2, 3], "switch": False}


def test_a_folder_is_the_same_model_whatever_way_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for again in ("model/", "./model", str(tmp_path / "model"), "../" + tmp_path.name + "/model"):
        assert repeated_model(["model", "other", again]) == again
    assert repeated_model(["model", "other", "models"]) is None


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("boolean", {"True": True, "yes": True, "1": True, "FALSE": False, "no": False, "0": False}, "2 on t"),
        ("positive_int", {"1": 1, "+0010": 10, "2147483647": 2147483647}, "0 -1 1.5 2147483648 1_000 \uff11"),
        ("seed", {"0": 0, "4294967295": 4294967295}, "-1 4294967296 0x1 1e3"),
        ("finite_number", {"-1.5": -1.5, "1e3": 1000.0}, "nan inf -inf 1e999 one"),
        ("margin", {"0": 0.0, "0.05": 0.05}, "-0.1 nan"),
        ("cosine_threshold", {"1": 1.0, "0.5": 0.5}, "0 1.01 -1 nan"),
        (
            "rank_range",
            {"0-1": (0, 1), "002-10": (2, 10), "0-2147483647": (0, 2147483647)},
            "5-5 10-2 5 -1-5 a-b 2-3-4",
        ),
    ],
)
def test_each_type_of_flag_takes_what_has_a_meaning(kind, good, bad):
    read = getattr(flag_types, kind)
    assert {text: read(text) for text in good} == good
    for text in bad.split():
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text)):
            read(text)


def test_a_switch_is_off_unless_it_is_given_alone_or_with_a_value():
    parser = new_parser("")
    add_switch(parser, "--quick", "be quick")
    given = {(): False, ("--quick",): True, ("--quick", "True"): True, ("--quick", "false"): False}
    assert {flags: parser.parse_args(flags).quick for flags in given} == given


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--number", "1", "--number", "2"], "argument --number: given twice; give it once"),
        (["--number="], "argument --number: its value is empty"),
        (["--text", "\udce9"], "argument --text: '\\udce9' is not UTF-8"),
        (["--text", "a\0b"], "argument --text: 'a\\x00b' holds a null character"),
        (["--num", "1"], "unrecognized arguments: --num 1"),
    ],
)
def test_an_error_is_one_line(flags, complaint, capsys):
    parser = new_parser("")
    parser.prog = "script.py"
    parser.add_argument("--number", type=int)
    parser.add_argument("--text")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"script.py: error: {complaint}")
    assert error.endswith(" (--help lists the flags)\n")
    assert error.count("\n") == 1


def test_help_keeps_the_lines_of_the_docstring_and_names_defaults_once():
    parser = new_parser("Two\n    lines.")
    parser.add_argument("--number", default=3, help="a number")
    parser.add_argument("--other", default=4, help="another (default: what fits)")
    parser.add_argument("--nothing", help="nothing")
    text = parser.format_help()
    assert "Two\n    lines." in text
    assert "a number (default: 3)" in text
    assert text.count("default") == 2
