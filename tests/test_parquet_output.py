"""Rows as a parquet file."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tables import TABLE, rows_of

from embedding_finetune.command_line import UserError
from embedding_finetune.data import parquet_output


def test_types_of_kept_columns_survive_and_columns_of_texts_are_texts(tmp_path):
    source, path = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(TABLE, source)
    rows = [{"query": "q", "pos": ["p"], **row} for _, row in rows_of(source)]
    names = ["query", "pos", *TABLE.column_names, "neg", "neg_scores"]
    schema = parquet_output.schema_of(path, names, rows, like=[source])
    parquet_output.write_parquet(path, [{**row, "neg": ["n"], "neg_scores": [1]} for row in rows], schema)
    written = pq.read_table(path)
    assert written.column_names == names
    stored = pq.read_table(source).schema
    assert all(written.schema.field(name).type == stored.field(name).type for name in TABLE.column_names)
    assert repr(written.select(TABLE.column_names).to_pylist()) == repr(pq.read_table(source).to_pylist())
    assert str(written.schema.field("neg").type).startswith("list<")
    assert written["neg_scores"].to_pylist() == [[1.0]] * 4


@pytest.mark.parametrize(
    ("values", "complaint"),
    [([1, "a"], "int"), ([2**70, 1], "int"), ([{}, {}], "struct"), (["\ud800", ""], "surrogate"), ([[1], 2], "list")],
)
def test_a_column_that_parquet_cannot_hold_is_refused(tmp_path, values, complaint):
    rows = [{"x": value} for value in values]
    with pytest.raises(UserError, match=r'"x" holds values that one column of a parquet file cannot: .*\.jsonl$') as e:
        parquet_output.schema_of(tmp_path / "a.parquet", ["x"], rows, like=[])
    assert complaint in str(e.value).lower()


def test_types_that_rows_of_json_need_are_found_over_all_rows(tmp_path):
    rows = [{"x": None}, {"x": 1}, {"x": 2.5}, {}]
    path = tmp_path / "a.parquet"
    parquet_output.write_parquet(path, rows, parquet_output.schema_of(path, ["x"], rows, like=[]))
    assert pq.read_table(path)["x"].to_pylist() == [None, 1.0, 2.5, None]


@pytest.mark.parametrize(
    ("known", "values"),
    [
        ([pa.int32(), pa.float64()], [1, 2.5]),
        ([pa.float32(), pa.float64()], [0.5, 0.1]),
        ([pa.date32(), pa.timestamp("us")], [datetime.datetime(2026, 1, 2, 3, 4)] * 2),
        ([pa.struct([("a", pa.int64())])], [{"a": 1}, {"a": 2, "b": 3}]),
        ([pa.duration("s"), pa.duration("us")], [datetime.timedelta(microseconds=5)]),
        ([pa.int64(), pa.int64()], [1, None, 3]),
    ],
)
def test_a_column_gets_a_type_that_changes_no_value(tmp_path, known, values):
    files = []
    for number, type_ in enumerate(known):
        pq.write_table(pa.table({"x": pa.array([None], type_)}), tmp_path / f"{number}.parquet")
        files.append(tmp_path / f"{number}.parquet")
    rows = [{"x": value} for value in values]
    schema = parquet_output.schema_of(tmp_path / "out.parquet", ["x"], rows, like=files)
    parquet_output.write_parquet(tmp_path / "out.parquet", rows, schema)
    written = pq.read_table(tmp_path / "out.parquet")["x"].to_pylist()
    if isinstance(values[0], dict):
        written = [{name: value for name, value in row.items() if value is not None} for row in written]
    assert written == values
