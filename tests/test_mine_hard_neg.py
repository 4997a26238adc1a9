"""mine_hard_neg.py: filters, scores, several retrievers, a reranker, and the audit, on tiny models."""

import datetime
import decimal
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.mining import SENTENCES, mine, reference, similarity, write_data

import mine_hard_neg
from embedding_finetune.data.records import SCORE_FIELDS, read_training_rows


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ((), lambda score, positive: True),
        (("--max_score", "0.94"), lambda score, positive: score <= 0.94),
        (("--min_score", "0.94"), lambda score, positive: score >= 0.94),
        (("--absolute_margin", "0.003"), lambda score, positive: score <= positive - 0.003),
        (("--relative_margin", "0.002"), lambda score, positive: score <= positive - 0.002 * abs(positive)),
    ],
)
def test_negatives_are_those_that_the_definition_allows(tiny_bert, data, tmp_path, flags, allowed):
    top = ("--sampling_strategy", "top", "--range_for_sampling", "1-15", "--negative_number", "20")
    mined, audit = mine(tiny_bert, data, tmp_path, *top, *flags)
    expected = reference(tiny_bert, data, window=(1, 15), allowed=allowed)
    fills = 0
    for row, negatives in zip(mined, expected):
        assert row["neg"][: len(negatives)] == negatives
        fills += len(row["neg"]) - len(negatives)
        # Random fills come from outside the retrieved ranks: never what a filter or the window refused.
        assert len(row["neg"]) <= len(negatives) + len(SENTENCES) - 15
    assert audit["negatives_drawn_at_random"] == fills
    if flags:
        unfiltered = sum(map(len, reference(tiny_bert, data, window=(1, 15), allowed=lambda *_: True)))
        assert audit["left_out"][flags[0]] == unfiltered - sum(map(len, expected)) > 0


def test_saved_scores_are_parallel_to_texts_and_replace_old_ones(tiny_bert, data, tmp_path):
    rows = [
        {**row, "neg": ["old one"], "neg_scores": [7], "pos_scores": [5] * len(row["pos"])}
        for row in read_jsonl(data[0])
    ]
    data = write_jsonl(tmp_path / "scored.jsonl", rows), data[1]
    flags = ("--range_for_sampling", "2-6", "--negative_number", "6")
    mined, audit = mine(tiny_bert, data, tmp_path, *flags, "--save_scores")
    assert audit["negatives_drawn_at_random"] > 0
    scores = similarity(tiny_bert, [row["query"] for row in mined], SENTENCES)
    for row, own in zip(mined, scores):
        for field in ("pos", "neg"):
            assert row[f"{field}_scores"] == pytest.approx(
                [own[SENTENCES.index(text)] for text in row[field]], abs=2e-6
            )
    bare, _ = mine(tiny_bert, data, tmp_path, *flags)
    assert [row["neg"] for row in bare] == [row["neg"] for row in mined]
    assert not any("pos_scores" in row or "neg_scores" in row for row in bare)


def test_existing_negatives_are_kept_first_but_never_a_positive_or_a_repeat(tiny_bert, data, tmp_path):
    rows = read_jsonl(data[0])
    rows[0]["neg"] = ["a text of nowhere", SENTENCES[0] + " ", SENTENCES[7], "a text of nowhere"]
    data = write_jsonl(tmp_path / "kept.jsonl", rows), data[1]
    flags = ("--range_for_sampling", "0-10", "--negative_number", "4", "--save_scores")
    mined, audit = mine(tiny_bert, data, tmp_path, *flags, "--keep_existing_negatives")
    assert mined[0]["neg"][:2] == ["a text of nowhere", SENTENCES[7]]
    assert len(set(mined[0]["neg"])) == len(mined[0]["neg"]) == 4
    own = similarity(tiny_bert, [mined[0]["query"]], ["a text of nowhere"])[0, 0]
    assert mined[0]["neg_scores"][0] == pytest.approx(own, abs=2e-6)
    assert audit["negatives_kept"] == 2
    assert audit["left_out"]["negatives of the input that are positives or repeats"] == 2
    replaced, _ = mine(tiny_bert, data, tmp_path, *flags)
    assert "a text of nowhere" not in replaced[0]["neg"]


def test_kept_negatives_that_nearly_equal_a_positive_of_the_same_query_in_any_row_are_left_out(
    tiny_bert, data, tmp_path
):
    rows = read_jsonl(data[0])
    rows[1]["query"] = rows[0]["query"]
    doubled = [SENTENCES[number].replace(" ", "  ") for number in (0, 2, 4)]  # the same tokens, in no pool
    for row in rows[:2]:
        row["neg"] = doubled
    data = write_jsonl(tmp_path / "kept.jsonl", rows), data[1]
    flags = ("--range_for_sampling", "0-4", "--negative_number", "9", "--keep_existing_negatives")
    mined, audit = mine(tiny_bert, data, tmp_path, *flags, "--near_duplicate_threshold", "0.9999")
    for row in mined[:2]:
        assert row["neg"][0] == doubled[2]
        assert not set(row["neg"]) & {*doubled[:2], SENTENCES[0], SENTENCES[2]}
    assert audit["left_out"]["near-duplicate of a positive (of the input)"] == 4


def test_rows_without_negatives_are_written_or_dropped_and_counted(tiny_bert, data, tmp_path, capsys):
    flags = ("--range_for_sampling", "0-20", "--relative_margin", "0.012")
    mined, audit = mine(tiny_bert, data, tmp_path, *flags)
    empty = sum(not row["neg"] for row in mined)
    assert 0 < empty == audit["rows_without_negatives"] < len(mined) == 10
    dropped, audit = mine(tiny_bert, data, tmp_path, *flags, "--drop_rows_without_negatives")
    assert dropped == [row for row in mined if row["neg"]]
    assert audit["rows_dropped"] == empty
    with pytest.raises(SystemExit) as stop:
        mine(tiny_bert, data, tmp_path, *flags, "--max_score", "-1", "--drop_rows_without_negatives")
    assert stop.value.code == 2
    assert "no row has a negative" in capsys.readouterr().err
    assert read_jsonl(tmp_path / "out.jsonl") == dropped


def test_the_audit_counts_what_is_in_the_file_and_warns_of_false_negatives(tiny_bert, data, tmp_path, caplog):
    flags = ("--range_for_sampling", "0-8", "--negative_number", "5", "--save_scores", "--show_examples", "3")
    mined, audit = mine(tiny_bert, data, tmp_path, *flags)
    assert (audit["rows"], audit["candidates"]) == (10, 20)
    assert (audit["settings"]["dtype"], audit["precision"]) == ("float32", "float32")
    assert audit["negatives"] == sum(len(row["neg"]) for row in mined)
    pairs = [(min(row["pos_scores"]), score) for row in mined for score in row["neg_scores"]]
    above = np.mean([score > positive for positive, score in pairs])
    assert audit["negatives_above_their_positive"] == pytest.approx(above)
    assert audit["scores"]["negatives"]["p50"] == pytest.approx(np.median([score for _, score in pairs]), abs=1e-5)
    assert audit["scores"]["positive - negative"]["p50"] == pytest.approx(
        np.median([p - n for p, n in pairs]), abs=1e-5
    )
    assert audit["settings"]["range_for_sampling"] == [0, 8]
    assert {"encode", "search", "total"} <= set(audit["seconds"])
    assert above > 0.1
    assert "of the negatives score above their positive" in caplog.text
    shown = [line for line in caplog.text.splitlines() if line.startswith("  - ")]
    assert len(shown) == 15


def test_the_same_file_whatever_batch_block_or_hash_seed(tiny_bert, other_bert, data, tmp_path, monkeypatch):
    from embedding_finetune.retrieval import tower as towers

    flags = (
        "--range_for_sampling",
        "0-6",
        "--negative_number",
        "8",
        "--save_scores",
        "--near_duplicate_threshold",
        "0.99",
    )
    outputs = []
    for block, batch in ((8192, 4096), (3, 4096), (8192, 1)):
        monkeypatch.setattr(towers, "TEXTS_PER_BLOCK", block)
        mine([tiny_bert, other_bert], data, tmp_path, *flags, "--tokens_per_batch", batch)
        outputs.append((tmp_path / "out.jsonl").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (("--max_score", "0.94"), lambda score, positive: score <= 0.94),
        (("--min_score", "0.94"), lambda score, positive: score >= 0.94),
        (("--absolute_margin", "0.003"), lambda score, positive: score <= positive - 0.003),
        (("--relative_margin", "0.002"), lambda score, positive: score <= positive - 0.002 * abs(positive)),
    ],
)
def test_filters_hold_for_random_and_for_kept_negatives(tiny_bert, data, tmp_path, caplog, flags, allowed):
    """A pool in which half of all passages break the filter, and a window that gives hardly anything."""
    rows = read_jsonl(data[0])
    elsewhere = [f"my {topic} is red" for topic in TOPICS]
    for row, own in zip(rows, elsewhere):
        row["neg"] = [SENTENCES[5], own, SENTENCES[11], SENTENCES[16]]
    data = write_jsonl(tmp_path / "kept.jsonl", rows), data[1]
    flags = ("--range_for_sampling", "0-2", "--negative_number", "24", "--keep_existing_negatives", *flags)
    with caplog.at_level("INFO"):
        mined, audit = mine(tiny_bert, data, tmp_path, *flags)
    texts = [*SENTENCES, *elsewhere]
    scores = similarity(tiny_bert, [row["query"] for row in rows], texts)
    kept = fills = 0
    for old, row, own in zip(rows, mined, scores):
        lowest = min(own[texts.index(text)] for text in row["pos"])
        good = {text for text in texts if allowed(own[texts.index(text)], lowest)} - set(row["pos"])
        top = {texts[place] for place in np.argsort(-own[:20], kind="stable")[:2]}
        stay = [text for text in old["neg"] if text in good]
        assert row["neg"][: len(stay)] == stay
        # The pool is small enough for every passage to be tried.
        assert set(row["neg"]) == set(stay) | (good - set(elsewhere))
        kept, fills = kept + len(stay), fills + len(set(row["neg"]) - set(stay) - top)
    assert (audit["negatives_kept"], audit["negatives_drawn_at_random"]) == (kept, fills)
    assert audit["left_out"][f"{flags[-2]} (of the input)"] == 39 - kept > 0  # one is a positive
    assert audit["left_out"][f"{flags[-2]} (drawn at random)"] > 0
    assert "embeddings_dir" not in caplog.text
    scored, _ = mine(tiny_bert, data, tmp_path, *flags, "--save_scores")
    assert [row["neg"] for row in scored] == [row["neg"] for row in mined]
    for row, own in zip(scored, scores):
        assert row["neg_scores"] == pytest.approx([own[texts.index(text)] for text in row["neg"]], abs=2e-6)


def test_filters_look_at_the_rerankers_scores_of_random_and_kept_negatives(tiny_bert, tiny_reranker, data, tmp_path):
    rows = [{**row, "neg": [SENTENCES[4], SENTENCES[9]]} for row in read_jsonl(data[0])]
    data = write_jsonl(tmp_path / "kept.jsonl", rows), data[1]
    flags = ("--range_for_sampling", "0-2", "--negative_number", "15", "--keep_existing_negatives", "--save_scores")
    flags += ("--reranker_name_or_path", tiny_reranker)
    plain, _ = mine(tiny_bert, data, tmp_path, *flags)
    mined, audit = mine(tiny_bert, data, tmp_path, *flags, "--absolute_margin", "0.05")

    def broken(rows):
        return sum(score > min(row["pos_scores"]) - 0.05 + 1e-6 for row in rows for score in row["neg_scores"])

    assert broken(plain) > 20
    assert broken(mined) == 0
    assert 0 < audit["negatives_kept"] < 20
    assert audit["negatives_drawn_at_random"] > 0


def test_the_parts_of_a_real_run_add_up_to_what_the_clock_says(tiny_bert, data, tmp_path):
    import time

    began = time.monotonic()
    _, audit = mine(tiny_bert, data, tmp_path, "--range_for_sampling", "0-6", "--relative_margin", "0.001")
    took = time.monotonic() - began
    total = audit["seconds"].pop("total")
    assert sum(audit["seconds"].values()) == pytest.approx(total)
    assert 0.8 * took < total <= took


def test_a_range_beyond_the_corpus_gives_no_negatives_and_says_so(tiny_bert, data, tmp_path, caplog):
    flags = ("--range_for_sampling", "1000000000-2000000000", "--negative_number", "2000000000")
    mined, _ = mine(tiny_bert, data, tmp_path, *flags)
    assert not any(row["neg"] for row in mined)
    assert "--range_for_sampling starts at rank 1000000000 of 20 candidates" in caplog.text


def test_fields_that_mining_does_not_use_are_kept_and_told(tiny_bert, data, tmp_path, caplog):
    rows = read_jsonl(data[0])
    for row in rows[:3]:
        row |= {"remark": "Find:", "neg": None, "pos_scores": [1.0]}
    rows[0]["title"] = "half a pair: \ud800"
    write_ascii = (tmp_path / "fields.jsonl").write_text
    write_ascii("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "fields.jsonl", data[1]
    with caplog.at_level("INFO"):
        mined, _ = mine(tiny_bert, data, tmp_path, "--range_for_sampling", "0-6")
    told = 'fields.jsonl: kept and written, but not used: "remark" in 3 rows, "title" in 1 rows'
    assert told in caplog.text
    assert "scores in 3 rows are left out" in caplog.text
    assert [row.get("remark") for row in mined] == ["Find:"] * 3 + [None] * 7
    assert mined[0]["title"] == rows[0]["title"]
    assert "pos_scores" not in mined[0]
    assert all(isinstance(row["neg"], list) for row in mined)


KEPT = {
    "made": datetime.date(2026, 1, 2),
    "price": decimal.Decimal("1.10"),
    "thumbnail": b"\xff\x00",
    "tags": ["a", "b"],
    "when": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
    "rank": 7,
}


def test_parquet_comes_back_as_parquet_with_its_order_and_its_columns(tiny_bert, data, tmp_path):
    rows = [{"question": row["query"], **KEPT, "pos": row["pos"]} for row in read_jsonl(data[0])]
    source = pa.Table.from_pylist(rows)
    types = {"rank": pa.int16(), "made": pa.date32(), "when": pa.timestamp("ms", "UTC"), "tags": pa.list_(pa.string())}
    for name, type_ in types.items():
        source = source.set_column(source.column_names.index(name), name, source[name].cast(type_))
    (tmp_path / "shards").mkdir()
    pq.write_table(source.slice(0, 4), tmp_path / "shards" / "1.parquet")
    pq.write_table(source.slice(4), tmp_path / "shards" / "2.parquet")
    data = tmp_path / "shards", data[1]
    flags = ("--columns", "query=question", "--range_for_sampling", "2-6", "--negative_number", "3", "--save_scores")
    flags += ("--show_examples", "2")
    mined, _ = mine(tiny_bert, data, tmp_path, *flags)
    output = tmp_path / "mined.parquet"
    parquet = mine_to(output, tiny_bert, data, tmp_path, *flags)
    assert pq.read_schema(output).names == ["query", *KEPT, "pos", "neg", "pos_scores", "neg_scores"]
    stored = pq.read_schema(tmp_path / "shards" / "1.parquet")
    assert all(pq.read_schema(output).field(name).type == stored.field(name).type for name in KEPT)
    assert [{**row, **KEPT} for row in mined] == parquet
    as_json = {"made": "2026-01-02", "price": "1.10", "thumbnail": "/wA=", "when": "2026-01-02T03:04:00+00:00"}
    assert all(row.items() >= as_json.items() for row in mined)
    loaded = datasets.load_dataset("parquet", data_files=str(output), cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["neg"] for row in loaded] == [row["neg"] for row in parquet]


def mine_to(output, model, data, tmp_path, *flags):
    """The rows of a run that writes parquet."""
    argv = ["--model_name_or_path", model, "--input_file", data[0], "--candidate_pool", data[1], "--dtype", "float32"]
    argv += ["--output_file", output, "--sentence_pooling_method", "mean", *flags]
    mine_hard_neg.main([str(part) for part in argv])
    return list(read_training_rows(output, known=SCORE_FIELDS, others_are_kept=True))


def test_a_column_that_parquet_cannot_hold_and_a_format_that_is_not_written_are_told_before_a_model_is_loaded(
    data, tmp_path, capsys
):
    rows = [{**row, "note": note} for row, note in zip(read_jsonl(data[0]), [1, "one"] * 5)]
    data = write_jsonl(tmp_path / "mixed.jsonl", rows), data[1]
    for name, complaint in (
        ("out.parquet", '"note" holds values that one column of a parquet file cannot'),
        ("out.csv", "such files are not written; give a name that ends in .jsonl or .parquet"),
        ("out.tsv.gz", "such files are not written"),
    ):
        with pytest.raises(SystemExit) as stop:
            mine_to(tmp_path / name, "no/such-model", data, tmp_path)
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / name).exists()


def test_rows_with_instructions_are_mined_like_queries_that_have_them_written_out(tiny_bert, tmp_path):
    own = [None, "", "open the ", "how do i "]
    topics = [(own[n % 4], topic) for n, topic in enumerate(TOPICS)]
    instructed = [{"query": t, "pos": [passage_about(t)], "instruction": i} for i, t in topics]
    written = [{"query": ("my " if i is None else i) + t, "pos": [passage_about(t)]} for i, t in topics]
    mined = {}
    for name, rows, flag in (("instructed", instructed, "my "), ("written", written, "")):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        argv = [
            "--model_name_or_path",
            tiny_bert,
            "--input_file",
            data,
            "--output_file",
            tmp_path / f"{name}.out.jsonl",
        ]
        argv += [
            "--range_for_sampling",
            "0-4",
            "--negative_number",
            "3",
            "--save_scores",
            "--absolute_margin",
            "0.0001",
        ]
        for store in ("store", "store"):
            flags = ["--query_instruction_for_retrieval", flag, "--embeddings_dir", tmp_path / store]
            mine_hard_neg.main([str(part) for part in (*argv, *flags)])
        mined[name] = read_jsonl(tmp_path / f"{name}.out.jsonl")
    fields = ("neg", "pos_scores", "neg_scores")
    assert [[row[f] for f in fields] for row in mined["instructed"]] == [
        [row[f] for f in fields] for row in mined["written"]
    ]
    assert [row.get("instruction") for row in mined["instructed"]] == [i for i, _ in topics]
