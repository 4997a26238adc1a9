"""Columns by the suite's names, by --columns, and by the names of other tools."""

import csv
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.data import columns as roles
from embedding_finetune.data import records


def read_rows(path):
    return list(records.read_training_rows(path))


def write_table(path, names, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([names, *rows])
    return path


def test_columns_of_sentence_transformers_are_known(tmp_path):
    rows = [["a1", "p1", "n2", "n10", "n1", "kept"], ["a2", "p2", "", "", "", ""]]
    names = ["anchor", "positive", "negative_2", "negative_10", "negative_1", "note"]
    expected = [
        {"query": "a1", "pos": ["p1"], "neg": ["n1", "n2", "n10"], "note": "kept"},
        {"query": "a2", "pos": ["p2"], "neg": []},
    ]
    path = write_table(tmp_path / "a.csv", names, rows)
    assert [dict(row) for row in read_rows(path)] == expected
    records_ = [{name: text or None for name, text in zip(names, row)} for row in rows]
    pq.write_table(pa.Table.from_pylist(records_), tmp_path / "a.parquet")
    kept = [expected[0], {**expected[1], "note": None}]
    for table in (tmp_path / "a.parquet", write_jsonl(tmp_path / "a.jsonl", records_)):
        assert list(records.read_training_rows(table, others_are_kept=True)) == kept
    write_jsonl(tmp_path / "b.jsonl", [{"anchor": "a", "positive": "p", "negative": "n", "negative_1": "m"}])
    assert read_rows(tmp_path / "b.jsonl") == [{"query": "a", "pos": ["p"], "neg": ["n", "m"]}]


@pytest.mark.parametrize("name", ["label", "score"])
@pytest.mark.parametrize("value", [1, 0.5, True, "1", "-0,5", "1e-3", "True"])
@pytest.mark.parametrize("file", ["a.csv", "a.jsonl", "a.parquet"])
def test_numbers_that_say_how_good_a_pair_is_are_refused(tmp_path, name, value, file):
    path = tmp_path / file
    write = lambda row: (  # noqa: E731
        write_table(path, list(row), [row.values()])
        if file == "a.csv"
        else pq.write_table(pa.Table.from_pylist([row]), path)
        if file == "a.parquet"
        else write_jsonl(path, [row])
    )
    write({"anchor": "a", "positive": "p", name: value})
    place = r":1" if file == "a.jsonl" else rf": row {1 + (file == 'a.csv')}"
    complaint = rf'{place}: a number in "{name}" beside "positive" .* keep the pairs that are right, without the column'
    with pytest.raises(UserError, match=complaint):
        read_rows(path)
    write({"anchor": "a", "positive": "p", name: "good"})
    assert read_rows(path)[0]["pos"] == ["p"]
    write({"query": "a", "pos": "p" if file == "a.csv" else ["p"], name: value})
    assert read_rows(path)[0]["pos"] == ["p"]


def test_columns_are_named_by_role_and_written_with_the_suites_names(tmp_path):
    columns = ["query=question", "pos=answer", "neg=distractors", "text=body", "id=key"]
    names = ["key", "question", "answer", "body", "distractors"]
    path = write_table(tmp_path / "a.csv", names, [["7", "q", "p", "kept", "n"]])
    expected = {"id": "7", "query": "q", "pos": ["p"], "body": "kept", "neg": ["n"]}
    [row] = records.read_training_rows(path, columns)
    assert row == expected
    assert list(row) == list(expected)
    assert list(records.read_passages(path, columns)) == ["kept"]
    assert list(records.read_passages(path, ["text=answer", "pos=answer"])) == ["p"]
    assert next(records.read_queries(path, columns))["id"] == "7"
    own = write_table(tmp_path / "own.csv", ["query", "pos"], [["q", "p"]])
    assert list(records.read_training_rows(own, columns)) == [{"query": "q", "pos": ["p"]}]
    swapped = write_jsonl(tmp_path / "a.jsonl", [{"query": ["p"], "pos": "q"}])
    assert list(records.read_training_rows(swapped, ["query=pos", "pos=query"])) == [{"pos": ["p"], "query": "q"}]


def test_a_column_that_is_in_no_record_is_told(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "pos": ["p"]}])
    with caplog.at_level("INFO"):
        list(records.read_training_rows(path, ["query=question", "neg=distractor", "text=body"]))
    assert caplog.messages == [f'{path}: there is no "distractor": --columns neg=distractor is not used']


@pytest.mark.parametrize(
    ("row", "columns", "complaint"),
    [
        ({"q": "a", "pos": "p"}, ["query=question"], 'neither "question" nor "query" is there, expected a string'),
        ({"q": "a", "pos": "p"}, [], '"query" is missing, expected a string'),
        ({"question": "", "pos": "p"}, ["query=question"], '"question" is e'),
        ({"question": " ", "pos": "p"}, ["query=question"], '"question" is an empty string'),
        (
            {"question": "a", "query": "b", "pos": "p"},
            ["query=question"],
            '"question", which --columns makes the query, stands beside "query"; rename one',
        ),
        ({"anchor": "a", "positive": ""}, [], '"positive" is empty'),
        ({"anchor": "a", "positive": "p", "negative": " "}, [], '"negative"[0] is an empty string'),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_errors_use_the_names_of_the_file(tmp_path, row, columns, complaint, name):
    path = tmp_path / name
    if name == "a.csv":
        write_table(path, list(row), [row.values()])
    else:
        record = {key: [value] if key == "pos" else value or None for key, value in row.items()}
        if name == "a.jsonl":
            write_jsonl(path, [record])
            complaint = complaint.replace('"question" is e', '"question" is a NoneType')
        else:
            pq.write_table(pa.Table.from_pylist([record]), path)
    with pytest.raises(UserError) as error:
        list(records.read_training_rows(path, columns))
    place = {"a.csv": ": row 2: ", "a.jsonl": ":1: ", "a.parquet": ": row 1: "}[name]
    if "stands beside" in complaint and name != "a.jsonl":
        place = ": "  # it is about the whole table
    assert str(error.value).startswith(f"{path}{place}{complaint}")
    if "missing" in complaint and name != "a.jsonl":
        assert str(error.value).endswith('; the columns are "q", "pos": --columns query=COLUMN says which it is')


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        (["query"], "--columns query: expected ROLE=COLUMN"),
        (["query="], "--columns query=: expected ROLE=COLUMN"),
        (["passage=x"], "--columns passage=x: expected ROLE=COLUMN, such as query=question; the roles are query, pos"),
        (["query=x", "query=y"], "--columns query=y: that role is given twice"),
        (["query=x", "pos=x"], "--columns pos=x: that column is given twice"),
        (["text=x", "id=x"], "--columns id=x: that column is given twice"),
    ],
)
def test_what_is_no_role_and_column_is_refused(columns, complaint):
    with pytest.raises(UserError, match=f"^{re.escape(complaint)}"):
        roles.parse_columns(columns)


def test_a_text_named_as_the_passage_beside_a_context_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "a", "context": ["b"]}])
    with pytest.raises(UserError, match=r'a\.jsonl:1: "body", which --columns makes the text, stands beside "context"'):
        list(records.read_passages(path, ["text=body"]))


def test_the_prompt_of_flag_embedding_is_the_instruction_of_a_query_and_no_field_of_a_passage(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": ["p"], "prompt": "Find: ", "text": "t"}])
    assert read_rows(path) == [{"query": "q", "pos": ["p"], "instruction": "Find: ", "text": "t"}]
    with caplog.at_level("INFO"):
        assert list(records.read_passages(path)) == ["t"]
    assert '"prompt" in 1 rows' in caplog.text


def test_records_of_very_many_different_names_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(roles, "_MOST_KNOWN", 3)
    rows = [{"anchor": "a", "positive": "p", f"x{n}": n} for n in range(20)]
    read = read_rows(write_jsonl(tmp_path / "a.jsonl", rows))
    assert read == [{"query": "a", "pos": ["p"], f"x{n}": n} for n in range(20)]
