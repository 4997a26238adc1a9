"""What a run trains on and is measured with."""

import tracemalloc

import numpy as np
from helpers.data import write_jsonl

from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.batches import TrainDataset
from embedding_finetune.training.rows import keep_rows, load_rows
from embedding_finetune.training.run_data import load_evaluation, prepare, read_rows


def test_what_the_flags_ask_for_is_there_and_nothing_else(tmp_path):
    data = str(write_jsonl(tmp_path / "rows.jsonl", [{"query": f"q{n}", "pos": [f"p{n}"]} for n in range(20)]))
    args = RetrieverTrainingArguments(output_dir=str(tmp_path / "out"))

    def prepared(**flags):
        data_args = DataArguments(train_data=data, **flags)
        return prepare(read_rows(data_args, args), ModelArguments("model"), data_args, args)

    plain = prepared()
    assert (len(plain.dataset), *plain[1:]) == (20, None, None, None, None)
    found = prepared(hold_out=4, mining_rounds=2, train_group_size=3, eval_query_file_jsonl_path=data)
    assert (len(found.dataset), len(found.held_out.records), len(found.task.queries)) == (16, 4, 20)
    assert found.dataset.group_size == 3  # the rows will have negatives
    assert len(found.rounds.corpus) == 16  # of the rows that are trained on


def test_passages_that_stay_are_all_of_the_rows_that_are_trained_on_and_the_pool(tmp_path):
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}", "p0"]} for n in range(20)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    further = str(write_jsonl(tmp_path / "pool.jsonl", [{"text": "p1"}, {"text": "other"}]))
    args = RetrieverTrainingArguments(output_dir=str(tmp_path / "out"), freeze_passages=True)
    data_args = DataArguments(train_data=data, candidate_pool=further, hold_out=4, train_group_size=1)
    found = prepare(read_rows(data_args, args), ModelArguments("model"), data_args, args)
    assert found.dataset.group_size == 3  # all negatives of a row, whatever that flag says
    kept = {text for row in found.dataset.rows for text in (*row["pos"], *row["neg"])}
    assert set(found.pool.texts[: len(found.pool)]) == kept | {"p1", "other"}
    assert len(kept) == 32 + (0 if "p0" in {row["pos"][0] for row in found.dataset.rows} else 1)


def evaluation(tmp_path, rows, queries, index=None):
    """What load_evaluation takes."""
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments = DataArguments(
        train_data=str(data),
        eval_query_file_jsonl_path=str(write_jsonl(tmp_path / "queries.jsonl", queries)),
        eval_index_file_jsonl_path=index,
    )
    return arguments, TrainDataset(load_rows(str(data)), group_size=1, seed=0)


def test_evaluation_without_an_index_leaves_the_training_rows_on_disk(tmp_path):
    rows = [{"query": f"q{n}", "pos": [f"{n} " + "passage " * 500]} for n in range(5000)]
    arguments, dataset = evaluation(tmp_path, rows, [{"query": "q", "pos": ["answer"]}])
    tracemalloc.start()
    try:
        task = load_evaluation(arguments, dataset)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(task.corpus) == 5001
    assert peak < 10e6  # of 20 MB of passages


def test_the_query_file_of_evaluation_is_read_once(tmp_path, monkeypatch):
    from embedding_finetune.data import jsonl

    opened, read = [], jsonl.read
    monkeypatch.setattr(jsonl, "read", lambda path: opened.append(str(path)) or read(path))
    arguments, dataset = evaluation(tmp_path, [{"query": "a", "pos": ["p"]}], [{"query": "q", "pos": ["answer"]}])
    opened.clear()
    task = load_evaluation(arguments, dataset)
    assert [task.corpus.texts[position] for position in range(2)] == ["p", "answer"]
    assert opened == [arguments.eval_query_file_jsonl_path]


def test_passages_of_held_out_rows_are_searched_too(tmp_path):
    data = [{"query": f"q{n}", "pos": [f"p{n}"]} for n in range(9)]
    arguments, _ = evaluation(tmp_path, data, [{"query": "q", "pos": ["p8"]}])
    rows = load_rows(arguments.train_data)
    trained = TrainDataset(keep_rows(rows, np.arange(9) < 5), group_size=1, seed=0)
    assert len(load_evaluation(arguments, trained, rows).corpus) == 9
    assert len(load_evaluation(arguments, trained).corpus) == 6


def test_without_queries_nothing_is_measured(tmp_path):
    _, dataset = evaluation(tmp_path, [{"query": "a", "pos": ["p"]}], [])
    assert load_evaluation(DataArguments(train_data=str(tmp_path / "rows.jsonl")), dataset) is None
