"""The whole path: mine -> finetune -> evaluate, on a tiny random BERT and on the real demo model."""

import csv
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import DEMO_MODEL, REPOSITORY, TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.quick_python import quick_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.data.texts import canonical
from embedding_finetune.model import loading
from embedding_finetune.model.loading import load_backbone


def mine(model, source, target, *flags):
    mine_hard_neg.main(
        ["--model_name_or_path", str(model), "--input_file", str(source), "--output_file", str(target), *flags]
    )
    return read_jsonl(target)


def measure(model, candidates, queries):
    return evaluate.main(
        [
            *("--model_name", str(model)),
            *("--index_file_jsonl_path", str(candidates)),
            *("--query_file_jsonl_path", str(queries)),
        ]
    )


def test_finetuning_a_tiny_model_on_mined_negatives_raises_mrr(tiny_bert, pairs, candidates, tmp_path):
    mined = tmp_path / "mined.jsonl"
    mine(tiny_bert, pairs, mined, "--range_for_sampling", "0-5", "--negative_number", "3")
    finetune.main(
        [
            *("--model_name_or_path", str(tiny_bert), "--output_dir", str(tmp_path / "tuned")),
            *("--train_data", str(mined), "--num_train_epochs", "40", "--per_device_train_batch_size", "10"),
            *("--train_group_size", "3", "--learning_rate", "1e-3", "--temperature", "0.1", "--bf16", "True"),
            *("--query_instruction_for_retrieval", "what: ", "--sentence_pooling_method", "mean"),
        ]
    )
    before, after = (measure(model, candidates, pairs) for model in (tiny_bert, tmp_path / "tuned"))
    assert after["MRR@10"] > before["MRR@10"] + 0.2
    assert after["MRR@10"] > 0.8


def test_mined_rows_keep_their_order_and_unknown_fields_and_replace_old_negatives(tiny_bert, tmp_path):
    rows = [
        {"id": n, "query": f"reset the {topic}", "neg": ["old"], "pos": [passage_about(topic)], "neg_scores": [1]}
        for n, topic in enumerate(TOPICS)
    ]
    mined = mine(tiny_bert, write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert [(row["id"], row["query"], row["pos"]) for row in mined] == [(r["id"], r["query"], r["pos"]) for r in rows]
    # Both the positives and the old negatives are candidates; stale scores beside new negatives would be wrong.
    assert all(set(row["neg"]) <= {passage_about(topic) for topic in TOPICS} | {"old"} for row in mined)
    assert all("neg_scores" not in row for row in mined)


def test_mining_into_its_own_input_file_works(tiny_bert, pairs):
    rows = read_jsonl(pairs)
    mined = mine(tiny_bert, pairs, pairs, "--range_for_sampling", "0-5", "--negative_number", "2")
    assert [row["query"] for row in mined] == [row["query"] for row in rows]
    assert all(len(row["neg"]) == 2 for row in mined)


def test_a_candidate_pool_replaces_the_files_own_texts(tiny_bert, pairs, tmp_path):
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"text": f"call line {n}"} for n in range(12)])
    flags = ("--candidate_pool", str(pool), "--range_for_sampling", "0-6", "--negative_number", "4")
    mined = mine(tiny_bert, pairs, tmp_path / "out.jsonl", *flags)
    assert all(set(row["neg"]) <= {f"call line {n}" for n in range(12)} for row in mined)
    assert all(len(set(row["neg"])) == 4 for row in mined)


def test_a_pool_too_small_gives_fewer_and_says_how_many_rows(tiny_bert, tmp_path, caplog):
    rows = [{"query": f"reset {n}", "pos": ["red"]} for n in range(3)]
    with caplog.at_level("INFO"):
        mined = mine(tiny_bert, write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert all(row["neg"] == [] for row in mined)
    assert "warning: 3 rows have fewer than 15 negatives" in caplog.text


texts = st.sampled_from(
    ["red", "green", "blue", "Red", " red ", "caf\u00e9", "cafe\u0301", "reset", "pump a", "pump b"]
)
records = st.fixed_dictionaries(
    {"query": texts, "pos": st.lists(texts, min_size=1, max_size=4)},
    optional={"neg": st.lists(texts, max_size=4)},
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(records, min_size=1, max_size=8),
    pool=st.none() | st.lists(texts, min_size=1, max_size=8),
    window=st.sampled_from(["0-1", "0-5", "2-10", "10-210"]),
    count=st.integers(1, 12),
)
def test_mined_negatives_never_contain_a_positive_the_query_or_a_text_twice(
    shared_encoder, tmp_path, rows, pool, window, count
):
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ["--range_for_sampling", window, "--negative_number", str(count)]
    if pool is not None:
        flags += ["--candidate_pool", str(write_jsonl(tmp_path / "pool.jsonl", [{"context": [t]} for t in pool]))]
    mined = mine("tiny", source, tmp_path / "out.jsonl", *flags)

    allowed = pool if pool is not None else [t for row in rows for t in row["pos"] + row.get("neg", [])]
    for row, out in zip(rows, mined, strict=True):
        query = canonical(row["query"])
        answers = {canonical(t) for other in rows if canonical(other["query"]) == query for t in other["pos"]}
        negatives = [canonical(t) for t in out["neg"]]
        possible = {canonical(t) for t in allowed} - answers - {query}
        assert set(negatives) <= possible
        assert len(set(negatives)) == len(negatives) <= count
        assert out["pos"] == row["pos"]
        # Whatever the window, a row gets all it can: the rest is filled from outside the retrieved list.
        if int(window.split("-")[1]) == 1:
            assert len(negatives) >= min(count, len(possible) - 1)


@pytest.fixture
def shared_encoder(tiny_bert, monkeypatch):
    """Load the tiny model once, however often mining asks for it."""
    load = functools.cache(lambda: load_backbone(str(tiny_bert), flag="--model"))
    monkeypatch.setattr(loading, "load_backbone", lambda *args, **kwargs: load())


def test_mining_writes_the_same_bytes_under_another_hash_seed_and_batch_size(tiny_bert, pairs, tmp_path):
    outputs = []
    for hash_seed, budget in (("0", "4096"), ("1", "64")):
        output = tmp_path / f"{hash_seed}.jsonl"
        subprocess.run(
            [
                *(sys.executable, REPOSITORY / "mine_hard_neg.py", "--model_name_or_path", tiny_bert),
                *("--input_file", pairs, "--output_file", output, "--range_for_sampling", "1-6"),
                *("--negative_number", "3", "--tokens_per_batch", budget),
            ],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        )
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]


def test_another_seed_gives_other_negatives(tiny_bert, pairs, tmp_path):
    flags = ("--range_for_sampling", "1-8", "--negative_number", "2")
    first, again, other = (
        [row["neg"] for row in mine(tiny_bert, pairs, tmp_path / "out.jsonl", *flags, "--seed", seed)] for seed in "112"
    )
    assert first == again != other


def test_positives_missing_from_the_corpus_count_as_misses_and_are_counted(tiny_bert, tmp_path, caplog):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"query": "red", "pos": ["red"]}, {"query": "red", "pos": ["gone"]}])
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"context": ["red", "red ", "blue light"]}])
    with caplog.at_level("WARNING"):
        metrics = measure(tiny_bert, corpus, queries)
    # A query that equals a passage is still ranked against it, and wins: 1 for it, 0 for the one that has none.
    assert metrics["MRR@1"] == metrics["Hit@10"] == 0.5
    assert "1 positives are not in the corpus" in caplog.text


@pytest.mark.demo_model
def test_the_mining_command_of_the_readme_reproduces_the_sample_file(demo_model, tmp_path):
    source, expected = REPOSITORY / "example.jsonl", read_jsonl(REPOSITORY / "augmented_example.jsonl")
    flags = ("--range_for_sampling", "2-10", "--negative_number", "5", "--dtype", "float32")
    mined = mine(demo_model, source, tmp_path / "out.jsonl", *flags)
    assert mined == expected


@pytest.mark.demo_model
@pytest.mark.slow
def test_the_commands_of_the_original_example_work_as_printed(demo_model, tmp_path):
    assert commands_of("differences.md", "# What differs from Intel Extension for Transformers") == ORIGINAL_COMMANDS
    outputs = run_as_printed(ORIGINAL_COMMANDS, tmp_path)
    assert outputs[:2] == ["", ""]
    for output in outputs[2:]:
        assert output.splitlines()[-1].startswith("{'MRR@1': ")
    assert len(read_jsonl(tmp_path / "augmented_example.jsonl")) == 12


@pytest.mark.demo_model
@pytest.mark.slow
def test_the_recipe_that_mines_twice_works_as_printed(demo_model, tmp_path):
    commands = commands_of("recipes.md", "## Hard negatives in each batch, mined twice")
    assert run_as_printed(commands, tmp_path) == [""] * 5
    for name in ("stage2", "mined_twice"):
        assert (tmp_path / name / "model.safetensors").exists()


@pytest.mark.demo_model
@pytest.mark.slow
def test_the_one_command_of_the_recipes_works_as_printed(demo_model, tmp_path):
    [command] = commands_of("recipes.md", "## One command")
    assert run_as_printed([f"{command} --hold_out 4 --max_steps 4"], tmp_path)[0].startswith(("better", "no", "worse"))


@pytest.mark.demo_model
@pytest.mark.slow
def test_the_commands_that_keep_an_index_work_as_printed(demo_model, tmp_path):
    training, evaluation = commands_of("recipes.md", "## Keep your index")
    shutil.copy(REPOSITORY / "example_heldout.jsonl", tmp_path)
    trained, measured = run_as_printed([f"{training} --hold_out 4 --max_steps 4", evaluation], tmp_path)
    assert trained.startswith(("better", "no", "worse"))
    assert "query_side searches the index of sentence-transformers/all-MiniLM-L6-v2: passages have the same" in measured


def commands_of(page, heading):
    """The commands of a section of a page in docs/, or of the page where the heading is its title."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    section = text.split(f"{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```\n(.*?)\n```$", section, flags=re.MULTILINE | re.DOTALL)


def run_as_printed(commands, tmp_path):
    """What commands print in a folder where the models they name are local ones, on part of the sample data."""
    for name in ("BAAI/bge-base-en-v1.5", "sentence-transformers/all-MiniLM-L6-v2"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(DEMO_MODEL)
    for name in ("example.jsonl", "candidate_context.jsonl"):
        lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:12] if name == "example.jsonl" else lines), encoding="utf-8")
    for script in ("mine_hard_neg.py", "finetune.py", "evaluate.py"):
        (tmp_path / script).symlink_to(REPOSITORY / script)
    commands = [command.replace("python", shlex.join(quick_python()), 1) for command in commands]
    return [
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        for command in commands
    ]


ORIGINAL_COMMANDS = [
    """python mine_hard_neg.py \\
--model_name_or_path BAAI/bge-base-en-v1.5 \\
--input_file example.jsonl \\
--output_file augmented_example.jsonl \\
--range_for_sampling 2-10 \\
--negative_number 5""",
    """python finetune.py \\
--output_dir BAAI/bge-base-en-v1.5_finetuned \\
--model_name_or_path BAAI/bge-base-en-v1.5 \\
--train_data augmented_example.jsonl \\
--learning_rate 1e-5 \\
--num_train_epochs 5 \\
--per_device_train_batch_size 1 \\
--dataloader_drop_last True \\
--normalized True \\
--temperature 0.02 \\
--query_max_len 64 \\
--passage_max_len 256 \\
--train_group_size 2 \\
--logging_steps 10 \\
--query_instruction_for_retrieval "" \\
--bf16 True""",
    """python evaluate.py \\
--model_name BAAI/bge-base-en-v1.5 \\
--index_file_jsonl_path candidate_context.jsonl \\
--query_file_jsonl_path example.jsonl""",
    """python evaluate.py \\
--model_name BAAI/bge-base-en-v1.5_finetuned \\
--index_file_jsonl_path candidate_context.jsonl \\
--query_file_jsonl_path example.jsonl""",
]


@pytest.mark.slow
@pytest.mark.demo_model
def test_make_demo_goes_the_whole_way_with_a_file_of_ones_own(demo_model, tmp_path):
    lines = [f'"{words}, {topic}?",{passage_about(topic)}' for topic in TOPICS for words in ("reset", "open", "my")]
    (tmp_path / "my.csv").write_text("question,answer\n" + "\n".join(lines) + "\n")
    for name in ("finetune.py", "evaluate.py", "Makefile"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    given = ["DATA=my.csv", f"MODEL={demo_model}", f"BIN={os.path.dirname(sys.executable)}"]
    given.append("DATA_COLUMNS=query=question pos=answer")
    result = subprocess.run(
        ["make", "--old-file=.venv/cpu", "--old-file=.venv/demo", "demo", *given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    shown = result.stdout[result.stdout.index("Held-out questions, before and after:") :]
    assert "3 queries, held out by question: new questions about passages that training may know" in shown
    assert re.search(r"^(better|no difference|worse): MRR@10 .* on 3 new questions about", result.stdout, re.MULTILINE)
    assert re.search(rf"^{demo_model} +\d\.\d{{4}} .*\n\.demo/finetuned +\d\.\d{{4}} ", shown, re.MULTILINE)
    assert "held out by question" in (tmp_path / ".demo" / "evaluation" / "report.html").read_text()
    assert "are in the training data of" not in result.stderr


def test_the_sample_data_is_what_the_readme_says():
    candidates = [text for row in read_jsonl(REPOSITORY / "candidate_context.jsonl") for text in row["context"]]
    assert len(candidates) == len({canonical(text) for text in candidates}) >= 120
    assert all(40 <= len(text.split()) <= 150 for text in candidates)
    training, heldout = (read_jsonl(REPOSITORY / f"{name}.jsonl") for name in ("example", "example_heldout"))
    for rows, fewest in ((training, 3), (heldout, 1)):
        answers = [text for row in rows for text in row["pos"]]
        assert set(answers) <= set(candidates)
        assert min(answers.count(text) for text in candidates) >= fewest
        assert any(len(row["pos"]) == 2 for row in rows)
    assert not {canonical(row["query"]) for row in training} & {canonical(row["query"]) for row in heldout}


def in_another_format(path, kind):
    """The rows or candidates of a JSON Lines file, one text in each list, in another format."""
    rows = read_jsonl(path)
    target = path.with_suffix(f".{kind}")
    if kind == "json":
        target.write_text(json.dumps(rows, indent=2))
    elif kind == "csv":
        with target.open("w", newline="") as file:
            single = [{name: v[0] if isinstance(v, list) else v for name, v in row.items()} for row in rows]
            csv.writer(file).writerows([single[0], *(row.values() for row in single)])
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), target)
    else:
        target.mkdir()
        half = len(rows) // 2
        pq.write_table(pa.Table.from_pylist(rows[:half]), target / "1.parquet")
        write_jsonl(target / "2.jsonl", rows[half:])
        (target / "README.md").write_text("not data")
    return target


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder"])
def test_every_input_of_all_scripts_takes_every_format_and_gives_the_same_results(
    tiny_bert, pairs, candidates, tmp_path, kind
):
    queries, pool = in_another_format(pairs, kind), in_another_format(candidates, kind)
    flags = ("--range_for_sampling", "0-5", "--negative_number", "2")
    expected = mine(tiny_bert, pairs, tmp_path / "expected.jsonl", *flags, "--candidate_pool", str(candidates))
    assert mine(tiny_bert, queries, tmp_path / "mined.jsonl", *flags, "--candidate_pool", str(pool)) == expected
    assert measure(tiny_bert, pool, queries) == measure(tiny_bert, candidates, pairs)
    summaries = []
    for name, rows, passages in (("a", pairs, candidates), ("b", queries, pool)):
        evaluation = ["--eval_query_file_jsonl_path", str(rows), "--eval_index_file_jsonl_path", str(passages)]
        argv = ["--model_name_or_path", str(tiny_bert), "--output_dir", str(tmp_path / name), "--max_steps", "1"]
        finetune.main([*argv, "--train_data", str(rows), "--train_group_size", "1", *evaluation])
        summary = json.loads((tmp_path / name / "training_summary.json").read_text())
        summaries.append([summary[name] for name in ("rows", "metrics_before", "metrics_after")])
    assert summaries[0] == summaries[1]
