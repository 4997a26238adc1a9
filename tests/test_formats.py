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
from embedding_finetune.data import formats, records

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


ROWS = [
    {"query": "why?", "pos": ["so, indeed", "é"], "neg": ["no;", 'a "b"']},
    {"query": "who\nis it?", "pos": ["me"], "neg": ["you"]},
    {"query": "日本", "pos": ["x"], "neg": []},
]
SINGLE = [{"query": row["query"], "pos": row["pos"][:1], "neg": row["neg"][:1]} for row in ROWS]


def write_table(path, names, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([names, *rows])
    return path


def flat(rows):
    return [[row["query"], row["pos"][0], *(row["neg"] or [""])[:1]] for row in rows]


def write_as(path, rows):
    """Rows with at most one positive and negative each, in the format of the path's name."""
    name = path.name
    if name.endswith((".csv", ".tsv")):
        return write_table(path, ["query", "pos", "neg"], flat(rows), "\t" if name.endswith(".tsv") else ";")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(write_as(path.with_suffix(""), rows).read_bytes()))
    else:
        write_jsonl(path, rows)
    return path


NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz", "a.CSV"]


def with_negatives(rows):
    return [{**row, "neg": row.get("neg") or []} for row in rows]


@pytest.mark.parametrize("name", NAMES[:-1])
def test_every_format_gives_the_same_rows(tmp_path, name):
    assert with_negatives(read_rows(write_as(tmp_path / name, SINGLE))) == SINGLE


def test_a_folder_gives_the_rows_of_its_files_of_all_formats_and_errors_name_the_file(tmp_path):
    names = ["1.parquet", "2.jsonl", "3.csv", "4.parquet", "5.json"]
    for name, row in zip(names, SINGLE + SINGLE):
        write_as(tmp_path / name, [row])
    (tmp_path / "notes.txt").write_text("no data")
    assert with_negatives(read_rows(tmp_path)) == (SINGLE + SINGLE)[:5]
    write_table(tmp_path / "3.csv", ["query", "pos"], [["q", "p"], ["q", ""]])
    with pytest.raises(UserError, match=r'3\.csv: row 3: "pos" is empty, expected a list of strings'):
        read_rows(tmp_path)
    (tmp_path / "3.csv").write_text("")
    with pytest.raises(UserError, match=r"3\.csv: the file is empty"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", NAMES[:5])
def test_one_bad_row_among_many_is_named(tmp_path, name):
    rows = [{"query": f"q{n}", "pos": ["p"], "neg": ["n"]} for n in range(5000)]
    rows[4321]["pos"] = ["  "]
    path = write_as(tmp_path / name, rows)
    places = {"a.jsonl": ":4322", "a.json": f":{2 + 9 * 4321}", "a.parquet": ": row 4322"}
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value) == f'{path}{places.get(name, ": row 4323")}: "pos"[0] is an empty string, expected text'


def test_a_parquet_column_of_another_type_is_named_as_the_file_calls_it(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": [1, 2], "answer": ["a", "b"]}), path)
    with pytest.raises(UserError, match=r'a\.parquet: row 1: "question" is a int, expected a string'):
        list(records.read_training_rows(path, ["query=question", "pos=answer"]))
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [["x"], ["y", None]]}), path)
    with pytest.raises(UserError, match=r'a\.parquet: row 2: "answer"\[1\] is a NoneType, expected a string'):
        list(records.read_training_rows(path, ["query=question", "pos=answer"]))


def test_columns_of_parquet_that_nobody_uses_are_not_read_where_they_are_not_kept(tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["q"], "image": [b"x"], "pos": ["p"], "source": ["s"]}), path)
    read, opened = formats.tables.read_columns, []
    monkeypatch.setattr(formats.tables, "read_columns", lambda path, names: opened.append(names) or read(path, names))
    with caplog.at_level("INFO"):
        rows = list(records.read_training_rows(path, ["query=question"]))
    assert rows == [{"query": "q", "pos": ["p"]}]
    assert f'{path}: ignored: "image", "source"' in caplog.messages
    rows = list(records.read_training_rows(path, ["query=question"], others_are_kept=True))
    assert rows == [{"query": "q", "image": b"x", "pos": ["p"], "source": "s"}]
    list(records.read_training_rows(path, ["query=question"], known=["source"]))
    assert opened == [["question", "pos"], ["question", "image", "pos", "source"], ["question", "pos", "source"]]


@pytest.mark.parametrize("name", ["a.xlsx", "a.parquet.gz", "a.ZIP"])
def test_files_that_are_not_read_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"such files are not read; save it as one of \.jsonl, \.json"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.parquet.gz", "a.XLSX"])
def test_other_formats_are_not_written(name):
    with pytest.raises(UserError, match=r"^--output_file: .* give a name that ends in \.jsonl or \.parquet"):
        formats.check_can_be_written("--output_file", name)
    for good in ("a.jsonl", "a.parquet", "a.jsonl.gz", "a", "a.txt"):
        formats.check_can_be_written("--output_file", good)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.jsonl.gz"])
def test_written_rows_are_read_again(tmp_path, name):
    rows = [{**row, "extra": number, "note": None} for number, row in enumerate(ROWS)]
    schema = formats.schema_to_write(tmp_path / name, rows, list(rows[0]), source=tmp_path / "in.jsonl")
    assert (schema is None) == (name != "out.parquet")
    formats.write(tmp_path / name, iter(rows), schema)
    assert list(records.read_training_rows(tmp_path / name, others_are_kept=True)) == rows


def test_a_column_of_another_role_keeps_its_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("query,pos,context\nq,p,chapter 1\n")
    [row] = records.read_training_rows(path, others_are_kept=True)
    assert row == {"query": "q", "pos": ["p"], "context": "chapter 1"}
    assert list(records.read_passages(path)) == ["chapter 1"]


def test_a_link_to_a_file_of_another_format_is_not_written_through(tmp_path):
    for target in ("rows.csv", "rows.parquet"):
        link = tmp_path / f"{target}.link.jsonl"
        link.symlink_to(tmp_path / target)
        with pytest.raises(UserError, match=r"^--output_file: "):
            formats.check_can_be_written("--output_file", link)
    (tmp_path / "same.jsonl").symlink_to(tmp_path / "rows.jsonl")
    formats.check_can_be_written("--output_file", tmp_path / "same.jsonl")


def test_an_empty_cell_of_text_is_told_as_such(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nq,p\nq2,\n")
    with pytest.raises(UserError, match=r'row 3: "answer" is empty, expected a string'):
        list(records.read_passages(path, ["text=answer"]))
