import gzip
import os
import re

import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.data import formats, jsonl, records

GOOD = b'{"query": "q", "pos": ["p"]}\n'


def read_rows(path):
    return list(records.read_training_rows(path))


def test_blank_lines_a_byte_order_mark_and_gzip_are_read(tmp_path):
    content = b"\xef\xbb\xbf" + GOOD + b"\n   \n" + GOOD
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert read_rows(plain) == read_rows(packed) == [{"query": "q", "pos": ["p"]}] * 2


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "a\u2028b", "pos": ["p\u0085"]}\n', encoding="utf-8")
    assert read_rows(path) == [{"query": "a\u2028b", "pos": ["p\u0085"]}]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{nonsense\n", "not valid JSON"),
        (b'["a list"]\n', "expected an object"),
        (b'{"pos": ["p"]}\n', '"query" is missing'),
        (b'{"query": 3, "pos": ["p"]}\n', '"query" is a int'),
        (b'{"query": "  ", "pos": ["p"]}\n', '"query" is an empty string'),
        (b'{"query": "q"}\n', '"pos" is missing'),
        (b'{"query": "q", "pos": "p"}\n', '"pos" is a str, expected a list'),
        (b'{"query": "q", "pos": []}\n', '"pos" is empty'),
        (b'{"query": "q", "pos": ["p", ""]}\n', '"pos"[1] is an empty string'),
        (b'{"query": "q", "pos": ["p"], "neg": ["n", 5]}\n', '"neg"[1] is a int'),
        (b'{"query": "q", "pos": ["p"], "neg": "n"}\n', '"neg" is a str'),
        (b'{"query": "q", "pos": ["\\ud800"]}\n', "surrogate"),
        (b'{"query": "q\xff", "pos": ["p"]}\n', "not UTF-8"),
    ],
)
def test_a_wrong_line_is_named_by_path_and_number(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is empty"):
        read_rows(path)


def test_a_truncated_gzip_file_is_an_error_not_a_shorter_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(os.urandom(5000).hex().encode() + GOOD * 100)[:-20])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz"):
        read_rows(path)


def test_candidates_and_pool_lines_give_the_same_passages(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"context": ["a", "b"]}\n{"text": "c"}\n')
    assert list(records.read_passages(path)) == ["a", "b", "c"]
    path.write_text('{"texts": "c"}\n')
    with pytest.raises(UserError, match=r'pool\.jsonl:1: neither "context" nor "text"'):
        list(records.read_passages(path))


def test_a_folder_means_its_visible_json_files_in_sorted_order(tmp_path, caplog):
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", "._a.jsonl", ".DS_Store", "notes.txt", "a.jsonl~"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "sub.jsonl").mkdir()
    with caplog.at_level("INFO"):
        assert [path.name for path in formats.data_files(tmp_path)] == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert "notes.txt" in caplog.text


def test_unknown_fields_and_unicode_survive_a_round_trip(tmp_path):
    path = tmp_path / "out.jsonl"
    rows = [{"id": 7, "query": "q 日本 \u2028", "pos": ["é"], "nested": {"a": [1.5, None, True]}}]
    jsonl.write(path, rows)
    assert read_rows(path) == rows
    assert "日本" in path.read_text(encoding="utf-8")


def test_windows_line_ends_and_files_of_several_gzip_members_are_read(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": "b"}', b'{"text": "c"}']
    (tmp_path / "windows.jsonl").write_bytes(b"\r\n".join(lines) + b"\r\n")
    (tmp_path / "members.jsonl.gz").write_bytes(b"".join(gzip.compress(line + b"\n") for line in lines))
    for name in ("windows.jsonl", "members.jsonl.gz"):
        assert list(records.read_passages(tmp_path / name)) == ["a", "b", "c"]


def test_odd_characters_of_texts_are_kept(tmp_path):
    texts = ["\u0000 nul", "\u2028 separator", "\ufeff mark", "👩‍🔬 joined", "ﷺ", "\u202e turned", "é é"]
    path = tmp_path / "out.jsonl"
    jsonl.write(path, [{"text": text} for text in texts])
    assert list(records.read_passages(path)) == texts


def test_null_is_the_same_as_missing_where_a_field_may_be_missing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "pos": ["p"], "neg": null, "pos_scores": null}\n')
    assert [row.get("neg", []) for row in read_rows(path)] == [[]]
    path.write_text('{"query": "q", "pos": ["p"], "id": null, "group": null}\n')
    assert list(records.read_queries(path)) == [{"query": "q", "pos": ["p"]}]
    path.write_text('{"context": null, "text": "a"}\n{"context": ["b"], "text": null}\n')
    assert list(records.read_passages(path)) == ["a", "b"]
    for line in ('{"query": null, "pos": ["p"]}', '{"query": "q", "pos": null}', '{"query": "q", "pos": [null]}'):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=r"a\.jsonl:1: .*NoneType, expected"):
            read_rows(path)


@pytest.mark.parametrize(
    "score", ["1" + "0" * 400, "-1" + "0" * 400, "NaN", "Infinity", "-Infinity", "1e300", "3.5e38"]
)
def test_scores_that_float32_cannot_hold_are_named(tmp_path, score):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "pos": ["p", "r"], "pos_scores": [3.4e38, ' + score + "]}\n")
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(f'{path}:1: "pos_scores"[1] is ')
    assert len(str(error.value)) < len(str(path)) + 100


def test_fields_that_are_not_used_are_counted_once_for_a_file(tmp_path, caplog):
    train, queries, pool = tmp_path / "train.jsonl", tmp_path / "queries.jsonl", tmp_path / "pool.jsonl"
    row = {"query": "q", "pos": ["p"]}
    jsonl.write(
        train,
        [{**row, "prompt": "x", "neg": [], "neg_scores": []}] * 29 + [{**row, "type": "y"}, {**row, "type": None}],
    )
    jsonl.write(queries, [{**row, "id": 1, "group": "g", "neg": ["n"]}])
    jsonl.write(pool, [{"text": "a", "title": "t"}, {"context": ["b"], "text": "c"}, {"text": "d"}])
    with caplog.at_level("INFO"):
        assert len(read_rows(train)) == 31
        list(records.read_queries(queries))
        list(records.read_passages(pool))
    assert [record.getMessage().removeprefix(f"{tmp_path}/") for record in caplog.records] == [
        'train.jsonl: ignored: "prompt" in 29 rows, "neg_scores" in 29 rows, "type" in 1 rows',
        'queries.jsonl: ignored: "neg" in 1 rows',
        'pool.jsonl: ignored: "title" in 1 rows, "text" in 1 rows',
    ]
    caplog.clear()
    with caplog.at_level("INFO"):
        list(records.read_training_rows(train, known=records.SCORE_FIELDS, unused="kept"))
    assert caplog.messages == [f'{train}: kept: "prompt" in 29 rows, "type" in 1 rows']
    caplog.clear()
    jsonl.write(train, [{**row, **dict.fromkeys(map(str, range(12)), 0), "a\nb": 1}])
    with caplog.at_level("INFO"):
        read_rows(train)
    assert caplog.messages[0].endswith('"9" in 1 rows, and 3 other fields')


def test_folders_in_a_folder_of_data_are_a_warning_with_the_number_of_their_files(tmp_path, caplog):
    for name in ("a.jsonl", "de/b.jsonl", "de/more/c.json.gz", "de/._b.jsonl", "notes/d.txt", ".cache/e.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    with caplog.at_level("INFO"):
        assert [path.name for path in formats.data_files(tmp_path)] == ["a.jsonl"]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"warning: {tmp_path}: subfolders are not read: de (2 data files)"),
        ("INFO", f"{tmp_path}: not read: .cache, notes"),
    ]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=rf"holds no .* file; subfolders are not read: give {tmp_path}/de"):
        formats.data_files(tmp_path)


def test_half_a_surrogate_pair_in_a_field_that_is_passed_on_survives(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q \u65e5", "pos": ["p"], "title": "x\\ud800"}\n', encoding="utf-8")
    rows = read_rows(path)
    jsonl.write(path, rows)
    assert read_rows(path) == rows


def test_an_id_that_no_file_can_hold_is_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "pos": ["p"], "id": "\\ud800"}\n')
    with pytest.raises(UserError, match=r'a\.jsonl:1: "id" holds half a surrogate pair'):
        list(records.read_queries(path))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), "the file is compressed; give it a name that ends in .gz"),
        (b'[\n  {"text": "a"}\n]', ":1: the file is one JSON array; expected one object per line"),
        (b'{"text": "a", "text": "b"}', ':1: not valid JSON ("text" is there twice); expected one object per line'),
        (b"question,answer\n", ":1: not valid JSON (Expecting value: column 1 (char 0)); expected one object per line"),
    ],
    ids=["gzip", "array", "twice", "csv"],
)
def test_files_of_other_formats_are_told_for_what_they_are(tmp_path, content, complaint):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(complaint)):
        list(records.read_passages(tmp_path / "a.jsonl"))
