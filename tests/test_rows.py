"""Training rows on disk, and their columns."""

import numpy as np
import pytest
from helpers.data import write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.training.rows import (
    all_passages,
    flatten_column,
    keep_rows,
    list_lengths,
    load_rows,
    read_column,
)


def many(count):
    return [{"query": f"q{n}", "pos": [f"p{n}", f"other p{n}"]} for n in range(count)]


def test_at_most_so_many_rows_of_each_file_are_drawn_by_seed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", many(50))
    write_jsonl(folder / "b.jsonl", many(3))
    draw = lambda seed: load_rows(str(folder), max_rows_per_file=10, seed=seed)["query"]  # noqa: E731
    assert len(list(draw(0))) == 13
    assert list(draw(0)) == list(draw(0))
    assert list(draw(0)) != list(draw(1))


def test_a_changed_file_is_read_anew(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": "old", "pos": ["p"]}])
    assert list(load_rows(str(path))["query"]) == ["old"]
    write_jsonl(path, [{"query": "new", "pos": ["p"]}])
    assert list(load_rows(str(path))["query"]) == ["new"]


def test_a_bad_row_is_named_by_path_and_line(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": "a", "pos": ["p"]}, {"query": "b", "pos": "p"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: \"pos\" is a str"):
        load_rows(str(path))


def test_texts_are_mapped_with_offsets_that_do_not_overflow_at_2_gib(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p" * 3_000_000], "neg": ["n"]}] * 3)
    rows = load_rows(str(data))
    schema = rows.data.schema
    assert [str(schema.field(name).type) for name in ("query", "pos")] == ["large_string", "list<item: large_string>"]
    assert rows[2]["pos"] == ["p" * 3_000_000]


def test_columns_of_lists_are_flat_with_their_row_numbers(tmp_path):
    data = [{"query": "a", "pos": ["x"], "neg": ["n", "m"]}, {"query": "b", "pos": ["y", "x", "z"]}]
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", data)))
    row_numbers, ids = flatten_column(rows, "pos_ids")
    assert row_numbers.tolist() == [0, 1, 1, 1]
    assert ids.tolist() == [id for row in rows for id in row["pos_ids"]]
    assert ids[0] == ids[2]
    assert list_lengths(rows, "neg").tolist() == [2, 0]


def test_columns_of_drawn_rows_are_those_of_the_draw(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": f"q{n}", "pos": ["p"] * (n + 1)} for n in range(9)])
    rows = load_rows(str(path), max_rows_per_file=4, seed=3)
    lengths = [len(texts) for texts in rows["pos"]]
    assert list_lengths(rows, "pos").tolist() == lengths
    assert flatten_column(rows, "pos_ids")[0].tolist() == [
        row for row, count in enumerate(lengths) for _ in range(count)
    ]


def test_rows_that_are_kept_are_those_rows_in_their_order_from_several_files_too(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", many(2500))
    write_jsonl(tmp_path / "data" / "b.jsonl", [{"query": "b", "pos": ["p"], "neg": ["n"]}])
    rows = load_rows(str(tmp_path / "data"))
    kept = np.random.default_rng(0).random(2501) < 0.3
    kept[1000:2000], kept[-1] = False, True
    found = keep_rows(rows, kept)
    assert found.to_list() == [row for row, keep in zip(rows, kept) if keep]
    assert read_column(found, "query_id").tolist() == found["query_id"][:]
    assert list(all_passages(found)) == [text for row in found for text in (*row["pos"], *row["neg"])]


def test_long_rows_are_written_a_few_at_a_time(tmp_path):
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p" * 1_000_000]}] * 7)))
    assert [len(batch) for batch in rows.data["query"].chunks] == [3, 3, 1]
