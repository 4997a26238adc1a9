"""JSON Lines and arrays of objects: what is read, and the line of what is wrong."""

import gzip
import json
import os
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.data import jsonl, records

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


def test_a_truncated_gzip_file_is_an_error_not_a_shorter_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(os.urandom(5000).hex().encode() + GOOD * 100)[:-20])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz"):
        read_rows(path)


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


def test_half_a_surrogate_pair_in_a_field_that_is_passed_on_survives(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q \u65e5", "pos": ["p"], "title": "x\\ud800"}\n', encoding="utf-8")
    rows = read_rows(path)
    jsonl.write(path, rows)
    assert read_rows(path) == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6),
    part_bytes=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 30]),
    ascii_only=st.booleans(),
)
def test_an_array_is_read_as_json_reads_it_wherever_its_parts_end(
    tmp_path_factory, rows, part_bytes, indent, ascii_only
):
    path = tmp_path_factory.mktemp("array") / "a.json"
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_PART_BYTES", part_bytes)
        assert [record for _, record in jsonl.read(path)] == json.loads(content)


def test_the_line_of_an_object_of_an_array_is_where_it_begins(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n [\r\n{"a": 1},\r\n\r\n  {"a":\n 2}, {"a": 3}\n]\n \n')
    assert list(jsonl.read(path)) == [(3, {"a": 1}), (5, {"a": 2}), (6, {"a": 3})]
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(jsonl.read(packed)) == list(jsonl.read(path))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'[\n{"a": 1}\n{"a": 2}]', ":3: not valid JSON (expected , or ] after an object)"),
        (b'[{"a": 1},\n\n]', ":3: not valid JSON (a comma before the end of the array)"),
        (b'[,\n{"a": 1}]', ":1: not valid JSON (Expecting value)"),
        (b'[{"a": 1}]\n\n{"a": 2}', ":3: not valid JSON (more text after the end of the array)"),
        (b'[{"a": 1},\n{"a": ', ":2: not valid JSON (Expecting value)"),
        (b'[{"a": 1},\n{"a": "x', ":2: not valid JSON (Unterminated string starting at)"),
        (b'[{"a": 1},\n', ":2: not valid JSON (Expecting value)"),
        (b'[{"a": 1}\n', ":2: not valid JSON (expected , or ] after an object)"),
        (b'[{"a": 1},\n{"a":\n 1 "b"}]', ":3: not valid JSON (Expecting ',' delimiter)"),
        (b'[{"a": 1},\n{"a": "x\x01y"}]', ":2: not valid JSON (Invalid control character at)"),
        (b'[{"a": 1},\n{"a": 1, "a": 2}]', ':2: not valid JSON ("a" is there twice)'),
        (b'[{"a": 1},\n[1]]', ":2: a JSON list, expected an object"),
        (b'[{"a": 1},\n{"a": "\xff"}]', ":2: not UTF-8; save the file as UTF-8"),
        (b'[{"a": 1},\n{"a": "\xc3', ":2: not UTF-8; save the file as UTF-8"),
    ],
)
@pytest.mark.parametrize("part_bytes", [1, 7, 2**20])
def test_what_is_wrong_in_an_array_is_named_by_line(tmp_path, monkeypatch, content, complaint, part_bytes):
    monkeypatch.setattr(jsonl, "_PART_BYTES", part_bytes)
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(jsonl.read(path))
    assert str(error.value).startswith(f"{path}{complaint}")


def test_a_cut_array_that_is_compressed_is_an_error_at_the_line_after_the_last_object(tmp_path):
    path = tmp_path / "a.json.gz"
    lines = ",\n".join(json.dumps({"a": os.urandom(50).hex()}) for _ in range(100))
    path.write_bytes(gzip.compress(f"[{lines}]".encode())[:-3000])
    with pytest.raises(UserError, match=r"a\.json\.gz:\d+: cannot be read: Compressed file ended"):
        list(jsonl.read(path))


def test_of_a_large_array_a_part_is_held_and_an_object_of_several_megabytes_is_whole(tmp_path):
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + json.dumps({"a": "x" * 3_000_000}))
        for _ in range(20_000):
            file.write("," + json.dumps({"a": "y" * 1000}))
        file.write("]")
    tracemalloc.start()
    lengths = [len(record["a"]) for _, record in jsonl.read(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [3_000_000, *[1000] * 20_000]
    assert peak < 20_000_000 < path.stat().st_size


@pytest.mark.parametrize("content", [GOOD * 2, b'[{"query": "q", "pos": ["p"]},\n{"query": "q", "pos": ["p"]}]'])
def test_a_pipe_is_read(tmp_path, content):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[content])
    writer.start()
    assert len(read_rows(path)) == 2
    writer.join()


def test_values_that_json_has_no_type_for_are_written_as_text_or_numbers(tmp_path):
    import datetime
    import decimal
    import uuid

    zone = datetime.timezone(datetime.timedelta(hours=2))
    row = {
        "date": datetime.date(2026, 1, 2),
        "time": datetime.time(3, 4, 5),
        "stamp": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=zone),
        "span": datetime.timedelta(minutes=1, milliseconds=500),
        "decimal": decimal.Decimal("1.10"),
        "bytes": b"\xff\x00",
        "uuid": uuid.UUID(int=1),
        "inside": [{"date": datetime.date(2026, 1, 2)}],
    }
    jsonl.write(tmp_path / "a.jsonl", [row])
    assert next(jsonl.read(tmp_path / "a.jsonl"))[1] == {
        "date": "2026-01-02",
        "time": "03:04:05",
        "stamp": "2026-01-02T03:04:05+02:00",
        "span": 60.5,
        "decimal": "1.10",
        "bytes": "/wA=",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "inside": [{"date": "2026-01-02"}],
    }
    with pytest.raises(TypeError, match="no JSON for a set"):
        jsonl.write(tmp_path / "b.jsonl", [{"a": set()}])
