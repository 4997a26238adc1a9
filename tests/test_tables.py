"""csv, tsv and parquet: the cells are those of Python's csv module and of pyarrow, and errors name the row."""

import csv
import gzip
import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tables import TABLE, rows_of
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.data import tables


def filled(path):
    return [(number, row) for number, row in rows_of(path) if any(row.values())]


CELL = st.text(st.sampled_from('ab,;"\t\n\r é\u2028'), max_size=6)


@given(
    rows=st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=5),
    form=st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_ALL, "\n")]),
    mark=st.sampled_from(["", "\ufeff"]),
    delimiter=st.sampled_from(",;\t"),
)
def test_cells_are_those_that_the_csv_module_reads(tmp_path_factory, rows, form, mark, delimiter):
    quoting, end = form
    file = io.StringIO(newline="")
    csv.writer(file, quoting=quoting, lineterminator=end, delimiter=delimiter).writerows([["x", "y", "z"], *rows])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes((mark + file.getvalue()).encode())
    oracle = list(csv.reader(io.StringIO(file.getvalue(), newline=""), delimiter=delimiter))[1:]
    expected = [(number, dict(zip("xyz", row))) for number, row in enumerate(oracle, start=2) if any(row)]
    read = [(number, {name: cell or "" for name, cell in row.items()}) for number, row in filled(path)]
    assert read == expected


@given(text=st.text(st.sampled_from('ab,"\n'), max_size=12))
def test_of_any_text_the_cells_are_those_of_the_csv_module_or_it_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("x,y\n" + text, newline="")
    oracle = list(csv.reader(io.StringIO("x,y\n" + text, newline="")))[1:]
    try:
        read = [[cell or "" for cell in row.values()] for _, row in filled(path)]
    except UserError as error:
        quote_is_open = list(csv.reader(io.StringIO("x,y\n" + text + "\nend,", newline="")))[-1:] != [["end", ""]]
        goes_on = "goes on after its closing quote" in str(error)  # Python's module, strictly
        assert quote_is_open or goes_on or any(len(row) not in (0, 2) for row in oracle)
    else:
        assert read == [row for row in oracle if any(row)]


def test_rows_are_numbered_as_spreadsheets_number_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf\r\nx,y\r\n1,"two\r\nlines"\r\n\r\n,\r\n3,4')
    assert filled(path) == [(3, {"x": "1", "y": "two\r\nlines"}), (6, {"x": "3", "y": "4"})]
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert filled(packed) == filled(path)


@pytest.mark.parametrize(
    ("name", "header", "names"),
    [
        ("a.csv", "x,y", ["x", "y"]),
        ("a.csv", "x;y", ["x", "y"]),
        ("a.csv", '"a,b,c";y', ["a,b,c", "y"]),
        ("a.csv", "x\ty", ["x", "y"]),
        ("a.CSV", "x", ["x"]),
        ("a.tsv", "x,z\ty", ["x,z", "y"]),
        ("a.tsv.gz", "x\ty", ["x", "y"]),
        ("a.csv", '"x\n1";y', ["x\n1", "y"]),
        ("a.csv", ",x,", ["x"]),
        ("a.csv", "\ufeff\n\nx;y", ["x", "y"]),
    ],
)
def test_the_separator_is_that_of_the_header_and_columns_without_a_name_are_not_read(tmp_path, name, header, names):
    path = tmp_path / name
    content = f"{header}\n".encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert tables.column_names(path) == names


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"x,y\n1,2\n\n3,4,5\n", "row 4: expected 2 cells, as the header has, but there are 3;"),
        (b"x,y\n1\n", "row 2: expected 2 cells, as the header has, but there are 1"),
        (b'x,y\n1,"a\n2,3\n4,5\n', "row 2: a quote is opened there and never closed"),
        (b'x,y\n1,5" pipe\n2,"a', "row 3: a quote is opened there and never closed"),
        (b"x,y,x\n1,2,3\n", 'the column "x" is there twice; rename one'),
        (b"x,y\n1,2\n3,\xff\n", 'row 3: "y" is not UTF-8; save the file as UTF-8'),
        (b"x,\xff\n1,2\n", "row 1: not UTF-8; save the file as UTF-8"),
        ("x,y\n1,2\n".encode("utf-16"), "row 1: not UTF-8; save the file as UTF-8"),
        (gzip.compress(b"x,y\n1,2\n", mtime=0), "the file is compressed; give it a name that ends in .gz"),
        (b"x,y\n1," + b"a" * 5000 + b"\n", "row 2 or one after it is longer than"),
    ],
)
def test_what_is_wrong_in_a_table_of_text_is_named_by_row(tmp_path, monkeypatch, content, complaint):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", (200, 2000))
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"{path}: {complaint}")
    assert "\n" not in str(error.value)


def test_a_quote_within_an_unquoted_cell_is_a_character(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'x,y\n5" pipe,"two\nlines"\n')
    assert rows_of(path)[0] == (2, {"x": '5" pipe', "y": "two\nlines"})


def test_rows_of_many_blocks_keep_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", (50,))
    monkeypatch.setattr(tables, "_ROWS_PER_BATCH", 2)
    path = tmp_path / "a.csv"
    path.write_text("x,y\n" + "".join(f'{n},"{n}\n{n}"\n\n' for n in range(100)))
    assert [(number, row["x"]) for number, row in filled(path)] == [(2 + 2 * n, str(n)) for n in range(100)]
    path.write_text(path.read_text() + "1,2,3\n")
    with pytest.raises(UserError, match="row 202: expected 2 cells"):
        rows_of(path)


def test_a_cut_gzip_file_is_an_error(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"x,y\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(5000)))[:-3000])
    with pytest.raises(UserError, match=r"a\.csv\.gz: .*Compressed file ended"):
        rows_of(path)


@pytest.mark.parametrize("rows_per_group", [1, 3, 100])
def test_values_of_parquet_are_those_of_pyarrow(tmp_path, rows_per_group):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=rows_per_group)
    expected = list(enumerate(pq.read_table(path).to_pylist(), start=1))
    assert repr(rows_of(path)) == repr(expected)  # NaN is not equal to itself
    assert rows_of(path, ["list", "text"])[3] == (4, {"list": ["b", None], "text": "d"})


def test_a_slice_of_lists_has_the_items_of_its_rows():
    lists = pa.array([["a"], ["b", "c"], None, ["d"], []])
    assert tables._as_python(lists.slice(1, 3)) == [["b", "c"], None, ["d"]]


def test_of_a_large_row_group_a_batch_is_held(tmp_path):
    path = tmp_path / "a.parquet"
    text = np.random.default_rng(0).bytes(500).hex()
    pq.write_table(
        pa.table({"x": [f"{n}{text}" for n in range(40_000)]}), path, use_dictionary=False, compression="none"
    )
    before = pa.total_allocated_bytes()
    peak, count = 0, 0
    for _, batch in tables.read_columns(path, ["x"]):
        peak = max(peak, pa.total_allocated_bytes() - before)
        count += len(batch["x"])
    assert count == 40_000
    assert peak < 10_000_000 < path.stat().st_size


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"x": [f"text {n * n}" for n in range(50_000)]})
    pq.write_table(table, path, row_group_size=10_000, write_page_checksum=True)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    with pytest.raises(UserError, match=r"a\.parquet: row 2\d001 or one after it cannot be read: "):
        rows_of(path)
    for content, complaint in (
        (whole[:-100], "cannot be read: "),
        (whole.replace(b"\x01x", b"\x01\xff"), "cannot be read: "),
        (b"", "the file is empty; expected rows"),
        (b"query,pos\n", "cannot be read: "),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(f"{path}: {complaint}")) as error:
            rows_of(path)
        assert "\n" not in str(error.value)


def test_a_parquet_value_that_python_cannot_hold_is_named_by_row_and_column(tmp_path):
    path = tmp_path / "a.parquet"
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], dtype=np.int32).tobytes()), pa.py_buffer(b"a\xff")]
    )
    for column in (not_utf8, pa.array([1, 2**55], pa.timestamp("ms"))):
        pq.write_table(pa.table({"x": ["a", "b"], "y": column}), path)
        with pytest.raises(UserError, match=r'a\.parquet: row 2: "y" cannot be read: .*; leave the column out'):
            rows_of(path)


def test_a_parquet_file_that_names_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), path)
    with pytest.raises(UserError, match=r'a\.parquet: the column "a" is there twice; rename one'):
        tables.column_names(path)


def test_of_rows_of_megabytes_a_batch_holds_few(tmp_path):
    path = tmp_path / "a.parquet"
    random = np.random.default_rng(0)
    pq.write_table(pa.table({"x": [random.bytes(500_000).hex() for _ in range(100)]}), path, use_dictionary=False)
    sizes = [len(batch["x"]) for _, batch in tables.read_columns(path, ["x"])]
    assert sum(sizes) == 100
    assert max(sizes) == 33  # of 1 MB each


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_row_longer_than_a_block_is_read_and_the_rows_around_it_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", (100, 1000, 10_000))
    monkeypatch.setattr(tables, "_ROWS_PER_BATCH", 2)
    path = tmp_path / name
    cells = ["a", "b" * 300, "c", "d" * 3000, "e"] * 5
    content = "x,y\n\n" + "".join(f'{n},"{cell}"\n' for n, cell in enumerate(cells))
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert filled(path) == [(3 + n, {"x": str(n), "y": cell}) for n, cell in enumerate(cells)]


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("a.tsv", 'x\ty\n"foo bar\tp1\nq2\tp2\nsay "hi" now\tp4\n', 2),
        ("a.csv", 'x,y\nq0,p0\n"foo bar,p1\nq2,p2\nq3" z,p3\nq4,p4\n', 3),
    ],
)
def test_rows_that_a_stray_quote_would_join_are_an_error(tmp_path, name, content, row):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: row {row}: a quoted cell goes on after its closing quote"):
        rows_of(tmp_path / name)


def test_quotes_and_line_breaks_within_quoted_cells_are_no_stray_quotes(tmp_path):
    cells = [['say "hi",\nthen go', "p"], ['5" pipe', "a,b"], ["x" * 200_000 + '"\n', "p"]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["x", "y"], *cells])
    found = [list(row.values()) for _, row in rows_of(tmp_path / "a.csv")]
    assert [row for row in found if any(row)] == cells
