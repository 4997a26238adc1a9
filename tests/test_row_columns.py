"""Columns of training rows."""

from helpers.data import write_jsonl

from embedding_finetune.training.row_columns import flatten_column, instructions_of, list_lengths, rows_digest
from embedding_finetune.training.rows import load_rows


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


def test_instructions_are_kept_as_they_are_written(tmp_path):
    written = [" find:  ", "", None, "Cafe\u0301: "]
    data = [{"query": "q", "pos": ["p"], "instruction": text} for text in written]
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", [*data, {"query": "q", "pos": ["p"]}])))
    assert list(instructions_of(rows)) == [*written, None]
    prompts = [{"query": "q", "pos": ["p"], "prompt": "find: "}]  # FlagEmbedding's name
    assert list(instructions_of(load_rows(str(write_jsonl(tmp_path / "rows.jsonl", prompts))))) == ["find: "]
