"""What --hold_out keeps out of training, what it writes, and what is said about it."""

import json
import random

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.running import argv_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import finetune
from embedding_finetune.command_line import UserError
from embedding_finetune.data.texts import canonical, folded
from embedding_finetune.training.arguments import DataArguments
from embedding_finetune.training.held_out import hold_out, write_held_out
from embedding_finetune.training.rows import load_rows

SPELLINGS = ("{}", "{}?", " {} ", "{}.", "({})")


def split(folder, rows, *, seed=42, name="rows.jsonl", **flags):
    """The records that are held out and the rows that are trained on, as finetune.py gets them."""
    flags = {"hold_out": 0.2, **flags}
    options = DataArguments(train_data=str(write_jsonl(folder / name, rows)), **flags)
    loaded = load_rows(options.train_data, options.columns, may_be_held_out=True, hold_out_field=options.hold_out_field)
    training_rows, held_out = hold_out(loaded, options, seed=seed)
    return held_out, list(training_rows)


def queries_of(rows):
    return {row["query"] for row in rows}


def singles(count, **fields):
    return [{"query": f"question {n}", "pos": [f"passage {n}"], **fields} for n in range(count)]


TEXT = st.tuples(st.integers(0, 60), st.sampled_from(SPELLINGS), st.booleans()).map(
    lambda drawn: drawn[1].format(f"Text {drawn[0]}".upper() if drawn[2] else f"Text {drawn[0]}")
)
ROWS = st.lists(
    st.fixed_dictionaries({"query": TEXT, "pos": st.lists(TEXT, min_size=1, max_size=3)}), min_size=5, max_size=30
)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@in_one_folder
@given(rows=ROWS, asked=st.sampled_from([0.1, 0.3, 0.6, 1, 4]), seed=st.integers(0, 9))
def test_no_positive_of_a_held_out_query_is_a_positive_of_a_training_row(tmp_path, rows, asked, seed):
    try:
        held_out, trained = split(tmp_path, rows, hold_out=asked, seed=seed)
    except UserError:  # one group may hold all rows
        return
    for form in (canonical, folded):
        answers = [{form(text) for row in part for text in row["pos"]} for part in (held_out.records, trained)]
        assert not answers[0] & answers[1]
        questions = [{form(row["query"]) for row in part} for part in (held_out.records, trained)]
        assert not questions[0] & questions[1]
    assert len(held_out.records) <= (asked if asked >= 1 else 1.5 * asked * len({canonical(r["query"]) for r in rows}))
    assert trained
    assert {canonical(row["query"]) for row in rows} == {
        canonical(row["query"]) for part in (held_out.records, trained) for row in part
    }


@in_one_folder
@given(rows=ROWS, data=st.data())
def test_the_order_of_rows_does_not_matter(tmp_path, rows, data):
    try:
        held = {folded(query) for query in queries_of(split(tmp_path, rows)[0].records)}
    except UserError:
        return
    others = data.draw(st.permutations(rows))
    assert {folded(query) for query in queries_of(split(tmp_path, others)[0].records)} == held


@pytest.mark.parametrize("by", ["passage", "question", "customer"])
@pytest.mark.parametrize("appended", [1, 30, 300])
def test_rows_that_are_appended_move_no_others(tmp_path, by, appended):
    rng = random.Random(appended)
    rows = [
        {"query": f"question {n}", "pos": [f"passage {rng.randrange(300)}"], "customer": f"c{n % 100}"}
        for n in range(600)
    ]
    before = queries_of(split(tmp_path, rows, hold_out_by=by)[0].records)
    # New questions about new passages, and new questions about passages and customers that are there.
    more = [
        {"query": f"new {n}", "pos": [f"new {n}"] if n % 2 else rows[n]["pos"], "customer": f"{'cd'[n % 2]}{n % 90}"}
        for n in range(appended)
    ]
    after = queries_of(split(tmp_path, [*rows, *more], hold_out_by=by)[0].records)
    assert {query for query in after if not query.startswith("new")} == before
    assert len(before) == pytest.approx(120, rel=0.5)


def test_a_number_of_queries_is_held_out_exactly(tmp_path):
    held_out, trained = split(tmp_path, singles(50), hold_out=7)
    assert (len(held_out.records), len(trained)) == (7, 43)
    assert (held_out.facts["queries"], held_out.facts["rows"], held_out.facts["rows_trained"]) == (7, 7, 43)
    other, _ = split(tmp_path, singles(50), hold_out=7, seed=1)
    assert queries_of(other.records) != queries_of(held_out.records)


def test_held_out_questions_may_have_known_passages_where_the_question_is_what_is_new(tmp_path):
    rows = [{"query": f"question {n // 2}" + "?" * (n % 2), "pos": ["the handbook"]} for n in range(40)]
    held_out, trained = split(tmp_path, rows, hold_out_by="question")
    assert {row["pos"][0] for row in trained} == {"the handbook"}
    assert not {folded(query) for query in queries_of(held_out.records)} & set(map(folded, queries_of(trained)))
    assert (held_out.facts["answers"], held_out.facts["answers_trained"]) == (1, 1)
    with pytest.raises(UserError, match=r"--hold_out 0\.2: all rows belong together, .* most of all 'the handbook'"):
        split(tmp_path, rows, hold_out_by="passage")


def test_how_much_to_ask_for_is_told_where_all_groups_are_larger(tmp_path):
    rows = [{"query": f"question {n}", "pos": [f"passage {n}"], "customer": f"c{n // 30}"} for n in range(75)]
    with pytest.raises(UserError, match=r"that is 7 of 75 queries, and the smallest of 3 groups .* give --hold_out 15"):
        split(tmp_path, rows, hold_out=0.1, hold_out_by="customer")
    held_out, _ = split(tmp_path, rows, hold_out=15, hold_out_by="customer")
    assert {row["customer"] for row in held_out.records} == {"c2"}
    assert (held_out.facts["answers"], held_out.facts["answers_trained"]) == (15, 0)


def test_rows_of_one_field_stay_together_and_so_do_those_of_one_question(tmp_path):
    rows = [
        {"query": f"question {n}", "pos": [f"passage {n}"], "customer": f" c{n % 20} " if n < 50 else f"c{n % 20}"}
        for n in range(100)
    ]
    rows += [{"query": "What does it cost?", "pos": [f"{n} euros"], "customer": f"c{n}"} for n in range(2)]
    held_out, trained = split(tmp_path, rows, hold_out_by="customer")
    customer_of = {row["query"]: row["customer"].strip() for row in rows[:100]}
    held, kept = ({customer_of[q] for q in queries_of(p) if q in customer_of} for p in (held_out.records, trained))
    assert held
    assert not held & kept
    assert len({"c0", "c1"} & held) in (0, 2)
    assert held_out.facts["by"] == "customer"


def test_the_field_may_be_called_as_the_file_calls_it(tmp_path):
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "customer": n % 10} for n in range(40)]
    named = {"columns": ["group=customer"], "hold_out_by": "customer"}
    held_out, _ = split(tmp_path, rows, **named)
    assert queries_of(held_out.records) == queries_of(split(tmp_path, rows, hold_out_by="customer")[0].records)
    assert held_out.records[0]["group"] in {str(n) for n in range(10)}


@pytest.mark.parametrize("value", [None, "", " ", ["a"], {"a": 1}, float("nan")])
def test_a_row_without_the_field_is_named(tmp_path, value):
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "customer": "a"} for n in range(3)]
    rows[1]["customer"] = value
    with pytest.raises(UserError, match=r'rows\.jsonl:2: "customer" is .*--hold_out_by needs'):
        split(tmp_path, rows, hold_out_by="customer")
    del rows[1]["customer"]
    with pytest.raises(UserError, match=r'rows\.jsonl:2: "customer" is missing, which --hold_out_by needs'):
        split(tmp_path, rows, hold_out_by="customer")


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (20, "--hold_out 20: there are 20 queries, and none would be left to train on"),
        (1e6, "--hold_out 1e+06: there are 20 queries"),
        (0.04, "--hold_out 0.04: that is less than one of 20 queries; give a number"),
    ],
)
def test_a_number_that_leaves_nothing_on_one_side_is_refused(tmp_path, asked, complaint):
    with pytest.raises(UserError) as error:
        split(tmp_path, singles(20), hold_out=asked)
    assert complaint in str(error.value)


def test_a_group_of_more_than_half_of_all_rows_is_trained_on_and_its_text_is_named(tmp_path, caplog):
    rows = [*singles(40), *({"query": f"other {n}", "pos": ["I do not know.", f"p{n}"]} for n in range(60))]
    with caplog.at_level("INFO"):
        held_out, trained = split(tmp_path, rows)
    assert {row["query"] for row in trained} >= {f"other {n}" for n in range(60)}
    assert (held_out.facts["largest_group"], held_out.facts["tied_by"]) == (60, "I do not know.")
    assert "one group holds 60 of all 100 rows" in caplog.text
    assert 'most of all "I do not know.", which is in 60 of them' in caplog.text
    assert split(tmp_path, rows[:60])[0].facts["tied_by"] is None


def test_groups_that_are_too_large_for_what_is_asked_are_counted(tmp_path, caplog):
    rows = [*singles(3), *({"query": f"{n}", "pos": [f"shared {n % 2}"]} for n in range(60))]
    split(tmp_path, rows, hold_out=20)
    assert "--hold_out 20 asks for 20 queries, and 3 are held out: the other groups are larger" in caplog.text


def test_a_query_in_several_rows_is_one_query_with_all_their_positives(tmp_path):
    rows = [{"query": f"q{n // 2}" + " " * (n % 2), "pos": [f"p{n}", "p0"[: n + 2]], "id": n} for n in range(20)]
    held_out, _ = split(tmp_path, rows, hold_out=3, hold_out_by="question")
    for record in held_out.records:
        number = int(record["query"][1:])
        assert record["pos"] == list(dict.fromkeys([f"p{2 * number}", "p0", f"p{2 * number + 1}"]))
        assert record["id"] == 2 * number


@pytest.mark.parametrize("ids", [["a b"] * 9, [1] * 9, [[n] for n in range(9)], [*range(8), None]])
def test_ids_that_evaluation_could_not_read_are_left_out(tmp_path, ids, caplog):
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "id": id_} for n, id_ in enumerate(ids)]
    with caplog.at_level("INFO"):
        held_out, _ = split(tmp_path, rows, hold_out=8)
    written(tmp_path, held_out)
    if any("id" in record for record in held_out.records):  # the row without an id is trained on
        assert None in ids
    else:
        assert 'held_out.jsonl has no "id"' in caplog.text


def written(folder, held_out):
    """The two files as evaluate.py reads them."""
    from embedding_finetune.data.records import read_passages, read_queries

    write_held_out(folder, held_out)
    return (
        list(read_queries(folder / "held_out.jsonl")),
        list(read_passages(folder / "held_out_candidates.jsonl")),
    )


def test_the_files_are_what_evaluation_reads(tmp_path):
    rows = [
        {
            "query": f"q{n}",
            "pos": [f"p{n}"],
            "neg": [f"n{n}", "p0 "],
            "id": f"row{n}",
            "group": n % 2,
            "instruction": "find",
        }
        for n in range(30)
    ]
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"context": ["n1", "of the pool"]}, {"text": "also"}])
    held_out, _ = split(tmp_path, rows, hold_out=5, candidate_pool=str(pool))
    queries, passages = written(tmp_path, held_out)
    assert queries == held_out.records
    own = [row for row in rows if row["query"] in queries_of(held_out.records)]
    assert queries == [
        {"query": row["query"], "pos": row["pos"], "id": row["id"], "group": str(row["group"]), "instruction": "find"}
        | {"held_out_by": "passage"}
        for row in own
    ]
    expected = {text for row in rows for text in row["pos"] + row["neg"][:1]} | {"of the pool", "also"}
    assert len(passages) == len(expected)
    assert set(map(canonical, passages)) == expected
    assert list(map(canonical, held_out.task.corpus.texts)) == list(map(canonical, passages))


def test_rows_that_were_not_drawn_from_their_file_count_for_nothing(tmp_path):
    options = DataArguments(train_data=str(write_jsonl(tmp_path / "rows.jsonl", singles(30))), hold_out=3)
    rows = load_rows(options.train_data, max_rows_per_file=10, may_be_held_out=True)
    training_rows, held_out = hold_out(rows, options, seed=0)
    assert (len(training_rows), len(held_out.records), len(held_out.task.corpus)) == (7, 3, 10)
    assert sorted([*training_rows["query"], *queries_of(held_out.records)]) == sorted(rows["query"])


@pytest.mark.parametrize("given", [{}, {"hold_out": 0}])
def test_without_the_flag_all_rows_are_trained_on_and_files_of_an_earlier_run_go(tmp_path, given):
    held_out, _ = split(tmp_path, singles(20))
    write_held_out(tmp_path, held_out)
    options = DataArguments(train_data=str(tmp_path / "rows.jsonl"), **given)
    rows = load_rows(options.train_data)
    assert hold_out(rows, options, seed=0) == (rows, None)
    write_held_out(tmp_path, None)
    assert not list(tmp_path.glob("held_out*"))
    write_jsonl(tmp_path / "held_out.jsonl", singles(1))  # a user's own file
    write_held_out(tmp_path, None)
    assert (tmp_path / "held_out.jsonl").exists()


# The whole script


def flags(model, data, output, **more):
    given = {"model_name_or_path": model, "train_data": data, "output_dir": output, "per_device_train_batch_size": 8}
    given |= {"learning_rate": 1e-3, "max_steps": 4, "save_strategy": "no", "disable_tqdm": True, **more}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def measured(model, folder, capsys):
    """What evaluate.py gives for the held-out files, and what it prints."""
    argv = ["--model_name", str(model), "--index_file_jsonl_path", str(folder / "held_out_candidates.jsonl")]
    argv += ["--query_file_jsonl_path", str(folder / "held_out.jsonl")]
    return evaluate.main(argv), capsys.readouterr().out


def test_held_out_queries_are_measured_as_evaluate_does_and_are_not_in_the_record_of_training(
    tiny_bert, pairs, tmp_path, capsys, caplog
):
    output = tmp_path / "out"
    finetune.main(flags(tiny_bert, pairs, output, hold_out=0.2, eval_strategy="steps", eval_steps=2))
    summary = json.loads((output / "training_summary.json").read_text())
    assert (summary["rows"], summary["hold_out"]["queries"]) == (24, 6)
    assert summary["hold_out"]["by"] == "passage"
    caplog.clear()
    before, _ = measured(tiny_bert, output, capsys)
    after, shown = measured(output, output, capsys)
    assert (summary["metrics_before"], summary["metrics_after"]) == (before, after)
    assert summary["hold_out"]["metrics_after"] == after
    assert "warning" not in caplog.text
    assert shown.startswith("6 queries, held out by passage: questions about passages that no training row answers")
    assert len(np.load(output / "training_queries.npy")) == 24


def test_the_users_queries_judge_and_the_held_out_ones_choose(tiny_bert, pairs, tmp_path, candidates, capsys):
    output = tmp_path / "out"
    given = {"hold_out": 3, "eval_query_file_jsonl_path": pairs, "eval_index_file_jsonl_path": candidates}
    given |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_MRR@10"}
    finetune.main(flags(tiny_bert, pairs, output, **given))
    summary = json.loads((output / "training_summary.json").read_text())
    argv = ["--index_file_jsonl_path", str(candidates), "--query_file_jsonl_path", str(pairs)]
    assert summary["metrics_before"] == evaluate.main(["--model_name", str(tiny_bert), *argv])
    assert summary["metrics_after"] == evaluate.main(["--model_name", str(output), *argv])
    chosen = summary["hold_out"]["metrics_after"]
    assert chosen == measured(output, output, capsys)[0]
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert (
        max(entry["eval_MRR@10"] for entry in history if entry["step"] and "eval_MRR@10" in entry) == chosen["MRR@10"]
    )


def test_a_resumed_run_holds_out_the_same_and_another_hold_out_is_refused(tiny_bert, pairs, tmp_path, capsys):
    given = {"hold_out": 6, "hold_out_by": "source", "eval_query_file_jsonl_path": pairs}
    given |= {"save_strategy": "steps", "save_steps": 2}
    finetune.main(flags(tiny_bert, pairs, tmp_path / "out", **given))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("held_out*")}
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert len(before) == 2
    for path in (tmp_path / "out").glob("held_out*"):
        path.unlink()
    given |= {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}
    finetune.main(flags(tiny_bert, pairs, tmp_path / "out", **given))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("held_out*")} == before
    resumed = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    for timed in ("seconds", "samples_per_second"):
        del summary[timed], resumed[timed]
    assert resumed == summary
    for change, complaint in (({"hold_out": 9}, "rows"), ({"hold_out_by": "question"}, "rows"), ({"seed": 1}, "rows")):
        with pytest.raises(SystemExit):
            finetune.main(flags(tiny_bert, pairs, tmp_path / "out", **given | change))
        error = capsys.readouterr().err.splitlines()[-1]
        assert "the run would go on with" in error
        assert complaint in error or "--hold_out" in error or "--seed" in error


def test_held_out_queries_that_the_base_was_trained_on_are_counted(tiny_bert, pairs, tmp_path, caplog):
    finetune.main(flags(tiny_bert, pairs, tmp_path / "first"))
    with caplog.at_level("INFO"):
        finetune.main(flags(tmp_path / "first", pairs, tmp_path / "second", hold_out=3))
    assert "3 of 3 queries that judge were trained on, now or when the base was made" in caplog.text
    assert "warning: 3 of 3 held-out queries are in the training data of" in caplog.text


def test_rows_that_were_mined_are_held_out_all_the_same(tiny_bert, tmp_path):
    texts = [passage_about(topic) for topic in TOPICS]
    mined = [{"query": f"reset the {t}", "pos": [texts[n]], "neg": [texts[n - 1]]} for n, t in enumerate(TOPICS)]
    plain = [{name: row[name] for name in ("query", "pos")} for row in mined]
    held_out, trained = split(tmp_path, mined)
    assert all("neg" not in record for record in held_out.records)
    assert queries_of(held_out.records) == queries_of(split(tmp_path, plain)[0].records)
    assert all(row["neg"] for row in trained)


@pytest.mark.parametrize("name", ["held_out.jsonl", "held_out_candidates.jsonl"])
def test_data_that_the_held_out_files_would_replace_is_refused(tiny_bert, pairs, tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    data = write_jsonl(tmp_path / "out" / name, read_jsonl(pairs))
    with pytest.raises(SystemExit):
        finetune.main(flags(tiny_bert, data, tmp_path / "out", hold_out=3, overwrite_output_dir=True))
    assert f"would replace {data} of --train_data" in capsys.readouterr().err


def test_an_instruction_that_reads_none_is_not_the_same_as_no_instruction(tmp_path):
    rows = [*singles(9), {"query": "same", "pos": ["x"], "instruction": "None"}, {"query": "same", "pos": ["y"]}]
    for seed in range(20):
        held_out, _ = split(tmp_path, rows, hold_out=5, hold_out_by="question", seed=seed)
        same = {row.get("instruction"): row["pos"] for row in held_out.records if row["query"] == "same"}
        assert same in ({}, {"None": ["x"], None: ["y"]})


def test_files_of_the_users_own_are_neither_replaced_nor_removed_through_a_link(tiny_bert, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", singles(30))
    flags = {"model_name_or_path": tiny_bert, "train_data": data, "max_steps": 1, "per_device_train_batch_size": 8}
    own = tmp_path / "own"
    own.mkdir()
    write_jsonl(own / "held_out.jsonl", [{"query": "mine", "pos": ["x"]}])
    with pytest.raises(SystemExit):
        finetune.main(argv_of(**flags, hold_out=0.3, output_dir=own, overwrite_output_dir=True))
    assert "is no file of an earlier run, and would be replaced" in capsys.readouterr().err
    finetune.main(argv_of(**flags, hold_out=0.3, output_dir=tmp_path / "out"))
    before = (tmp_path / "out" / "held_out.jsonl").read_bytes()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out" / "held_out.jsonl")
    again = {"eval_query_file_jsonl_path": tmp_path / "link.jsonl", "overwrite_output_dir": True}
    with pytest.raises(SystemExit):
        finetune.main(argv_of(**flags, **again, output_dir=tmp_path / "out"))
    assert "this run would replace" in capsys.readouterr().err
    assert (tmp_path / "out" / "held_out.jsonl").read_bytes() == before


def test_a_run_is_not_resumed_with_other_held_out_answers(tiny_bert, tmp_path, capsys):
    rows = singles(30)
    flags = {
        "model_name_or_path": tiny_bert,
        "hold_out": 0.3,
        "hold_out_by": "question",
        "output_dir": tmp_path / "out",
    }
    flags |= {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "per_device_train_batch_size": 8}
    finetune.main(argv_of(**flags, train_data=write_jsonl(tmp_path / "a.jsonl", rows)))
    held = queries_of(read_jsonl(tmp_path / "out" / "held_out.jsonl"))
    others = [{**row, "pos": ["another"]} if row["query"] in held else row for row in rows]
    changed, checkpoint = write_jsonl(tmp_path / "b.jsonl", others), tmp_path / "out" / "checkpoint-1"
    with pytest.raises(SystemExit):
        finetune.main(argv_of(**flags, train_data=changed, resume_from_checkpoint=checkpoint))
    assert "would go on with other held-out rows or candidates" in capsys.readouterr().err
