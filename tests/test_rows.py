"""Training rows on disk."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import write_beir, write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.training.row_columns import read_column
from embedding_finetune.training.rows import all_passages, keep_rows, load_rows


def many(count):
    return [{"query": f"q{n}", "pos": [f"p{n}", f"other p{n}"]} for n in range(count)]


@pytest.mark.parametrize("again", ["a.jsonl", "./folder/../a.jsonl", "link.jsonl", "hard.jsonl", "folder"])
def test_a_file_that_is_given_twice_is_refused_in_one_line(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", many(1))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to("a.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.jsonl").symlink_to("../a.jsonl")
    with pytest.raises(UserError, match=r"^--train_data: \S+ is given twice(, as a\.jsonl too)?; give it once$"):
        load_rows(["a.jsonl", again])


def test_a_bad_row_of_a_later_file_is_named(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", many(3))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"query": "a", "pos": ["p"]}, {"query": "b", "pos": []}])
    with pytest.raises(UserError, match=r"bad\.jsonl:2: "):
        load_rows([str(good), str(bad)])


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


def test_several_files_and_folders_are_one_data_set_in_the_order_given(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, query in (("b", "second"), ("a", "first")):
        write_jsonl(folder / f"{name}.jsonl", [{"query": query, "pos": ["p"]}])
    last = write_jsonl(tmp_path / "0.jsonl", [{"query": "third", "pos": ["p"]}, {"query": "fourth", "pos": ["p"]}])
    rows = load_rows([str(folder), str(last)])
    assert list(rows["query"]) == ["first", "second", "third", "fourth"]
    assert read_column(rows, "file").tolist() == [0, 1, 2, 2]
    assert list(load_rows([str(last), str(folder)])["query"]) == ["third", "fourth", "first", "second"]


def test_at_most_so_many_rows_are_drawn_of_each_of_several_files(tmp_path):
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", many(20))) for name in "ab"]
    rows = load_rows(paths, max_rows_per_file=7, seed=1)
    assert read_column(rows, "file").tolist() == [0] * 7 + [1] * 7


def test_rows_of_tables_are_those_of_json_lines(tmp_path):
    data = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}"] if n % 2 else []} for n in range(250)]

    def read(path, columns=()):
        return load_rows(str(path), columns).remove_columns("file").to_list()

    expected = read(write_jsonl(tmp_path / "a.jsonl", data))
    lines = [f"{row['query']};{row['pos'][0]};{''.join(row['neg'])}\n" for row in data]
    (tmp_path / "a.csv").write_text("anchor;positive;negative\n" + "".join(lines))
    table = pa.table({name: [row[name] for row in data] for name in ("query", "pos", "neg")})
    pq.write_table(table.rename_columns(["question", "pos", "neg"]), tmp_path / "a.parquet", row_group_size=70)
    assert read(tmp_path / "a.csv") == expected
    assert read(tmp_path / "a.parquet", ["query=question"]) == expected
    shards = tmp_path / "shards"
    shards.mkdir()
    for start in (0, 100, 200):
        pq.write_table(table.slice(start, 100), shards / f"{start:03d}.parquet")
    assert read(shards) == expected
    pq.write_table(pa.table({"query": ["q", "r"], "pos": [["p"], []]}), shards / "300.parquet")
    with pytest.raises(UserError, match=r'300\.parquet: row 2: "pos" is empty'):
        load_rows(str(shards))


def test_a_beir_folder_is_one_file_and_is_refused_beside_its_own_judgements(tmp_path):
    judged = {"q1": {"d1": 1}, "q2": {"d2": 1}}
    folder = write_beir(tmp_path / "beir", {"d1": "a", "d2": "b"}, {"q1": "x", "q2": "y"}, train=judged, dev=judged)
    rows = load_rows([str(write_jsonl(tmp_path / "rows.jsonl", many(1))), str(folder)])
    assert list(rows["query"]) == ["q0", "x", "y"]
    assert read_column(rows, "file").tolist() == [0, 1, 1]
    assert len(load_rows([str(folder), str(folder / "qrels" / "dev.tsv")])) == 4
    with pytest.raises(UserError, match=r"train\.tsv is given twice, as \S+beir too; give it once"):
        load_rows([str(folder), str(folder / "qrels" / "train.tsv")])


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
