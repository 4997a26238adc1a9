"""Training rows on disk, and their columns."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import write_beir, write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.training.rows import (
    flatten_column,
    instructions_of,
    list_lengths,
    load_rows,
    numbers_of_files,
    rows_digest,
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


def test_the_digest_tells_every_text_and_score_and_where_they_stand(tmp_path):
    row = {"query": "q", "pos": ["ab", "c"], "neg": ["n"], "pos_scores": [0.5, 1.0], "neg_scores": [0.25]}
    changes = [
        {},
        {"query": "Q"},
        {"pos": ["a", "bc"]},
        {"pos": ["abc"], "pos_scores": [0.5]},
        {"neg": ["m"]},
        {"neg": ["n", "ab"], "neg_scores": [0.25, 0.25]},
        {"neg": [], "neg_scores": []},
        {"neg_scores": [0.26]},
        {"pos_scores": [1.0, 0.5]},
        {"pos_scores": None},
        {"instruction": ""},
        {"instruction": "find: "},
    ]
    filler = [{"query": f"filler {n}", "pos": ["p"]} for n in range(150)]  # more than are written at once

    def digest(rows, **how):
        return rows_digest(load_rows(str(write_jsonl(tmp_path / "rows.jsonl", rows)), **how))

    digests = {digest([*filler, {**row, **change}]) for change in changes}
    digests |= {digest([{**row}, *filler]), digest(filler)}
    assert len(digests) == len(changes) + 2
    assert digest([*filler, row], max_rows_per_file=20) == digest([*filler, row], max_rows_per_file=20)
    assert digest([*filler, row]) in digests


def test_several_files_and_folders_are_one_data_set_in_the_order_given(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, query in (("b", "second"), ("a", "first")):
        write_jsonl(folder / f"{name}.jsonl", [{"query": query, "pos": ["p"]}])
    last = write_jsonl(tmp_path / "0.jsonl", [{"query": "third", "pos": ["p"]}, {"query": "fourth", "pos": ["p"]}])
    rows = load_rows([str(folder), str(last)])
    assert list(rows["query"]) == ["first", "second", "third", "fourth"]
    assert numbers_of_files(rows).tolist() == [0, 1, 2, 2]
    assert list(load_rows([str(last), str(folder)])["query"]) == ["third", "fourth", "first", "second"]


def test_at_most_so_many_rows_are_drawn_of_each_of_several_files(tmp_path):
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", many(20))) for name in "ab"]
    rows = load_rows(paths, max_rows_per_file=7, seed=1)
    assert numbers_of_files(rows).tolist() == [0] * 7 + [1] * 7


@pytest.mark.parametrize("again", ["a.jsonl", "./folder/../a.jsonl", "link.jsonl", "folder"])
def test_a_file_that_is_given_twice_is_refused_in_one_line(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", many(1))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.jsonl").symlink_to("../a.jsonl")
    with pytest.raises(UserError, match=r"^--train_data: \S+ is given twice(, as a\.jsonl too)?; give it once$"):
        load_rows(["a.jsonl", again])


def test_a_bad_row_of_a_later_file_is_named(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", many(3))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"query": "a", "pos": ["p"]}, {"query": "b", "pos": []}])
    with pytest.raises(UserError, match=r"bad\.jsonl:2: "):
        load_rows([str(good), str(bad)])


def test_instructions_are_kept_as_they_are_written(tmp_path):
    written = [" find:  ", "", None, "Cafe\u0301: "]
    data = [{"query": "q", "pos": ["p"], "instruction": text} for text in written]
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", [*data, {"query": "q", "pos": ["p"]}])))
    assert list(instructions_of(rows)) == [*written, None]
    prompts = [{"query": "q", "pos": ["p"], "prompt": "find: "}]  # FlagEmbedding's name
    assert list(instructions_of(load_rows(str(write_jsonl(tmp_path / "rows.jsonl", prompts))))) == ["find: "]


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
    assert numbers_of_files(rows).tolist() == [0, 1, 1]
    assert len(load_rows([str(folder), str(folder / "qrels" / "dev.tsv")])) == 4
    with pytest.raises(UserError, match=r"train\.tsv is given twice, as \S+beir too; give it once"):
        load_rows([str(folder), str(folder / "qrels" / "train.tsv")])
