"""All formats through one door: the same rows, whatever they are called and however they are stored."""

import csv
import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.data import formats, jsonl, records

GOOD = b'{"query": "q", "pos": ["p"]}\n'


def read_rows(path):
    return list(records.read_training_rows(path))


def test_a_folder_means_its_visible_json_files_in_sorted_order(tmp_path, caplog):
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", "._a.jsonl", ".DS_Store", "notes.txt", "a.jsonl~"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "sub.jsonl").mkdir()
    with caplog.at_level("INFO"):
        assert [path.name for path in formats.data_files(tmp_path)] == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert "notes.txt" in caplog.text


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


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), "the file is compressed; give it a name that ends in .gz"),
        (b'{"text": "a", "text": "b"}', ':1: not valid JSON ("text" is there twice); expected one object per line'),
        (b"question,answer\n", ":1: not valid JSON (Expecting value: column 1 (char 0)); expected one object per line"),
    ],
    ids=["gzip", "twice", "csv"],
)
def test_files_of_other_formats_are_told_for_what_they_are(tmp_path, content, complaint):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(complaint)):
        list(records.read_passages(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is empty"):
        read_rows(path)
