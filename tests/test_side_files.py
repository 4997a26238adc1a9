import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.model.side_files import POSITIVE, SHARE, SWITCH, TEXT, SideFile, read_json


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (TEXT, ["", "a"], [1, True, ["a"]]),
        (SWITCH, [True, False], [0, 1, "true"]),
        (POSITIVE, [1, 512], [0, -1, 1.0, True, "1"]),
        (SHARE, [0, 0.5], [1, -0.1, "0", False]),
    ],
)
def test_a_field_is_what_it_has_to_be_or_an_error_names_it(kind, good, bad):
    for value in good:
        assert SideFile("f", {"x": value}).field("x", kind) == value
    for value in bad:
        with pytest.raises(UserError, match=r'^f: "x" is .*, expected '):
            SideFile("f", {"x": value}).field("x", kind)


def test_what_is_missing_or_null_is_the_default_where_there_is_one():
    for content in ({}, {"x": None}):
        assert SideFile("f", content).field("x", TEXT, "default") == "default"
        with pytest.raises(UserError, match=r'f: "x" is (missing|null), expected a string'):
            SideFile("f", content).field("x", TEXT)


def test_a_file_that_is_no_json_or_no_object_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(str(path))
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read: No such file"):
        read_json(str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match="f: a JSON list, expected an object"):
        SideFile("f", [])
