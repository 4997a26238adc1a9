"""Whether a run says rightly that it made the model better, and keeps the base where it did not."""

import itertools
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers.data import REPOSITORY, read_jsonl, write_jsonl
from helpers.quick_python import quick_python
from helpers.running import argv_of
from helpers.tiny import WORDS
from safetensors.torch import load_file

import evaluate
import finetune
from embedding_finetune.data.records import read_queries
from embedding_finetune.training import trainer as trainers
from embedding_finetune.training.verdict import hints, verdict_on

NEW = "new questions about passages that training may know"


def verdict(before, after, **more):
    return verdict_on(np.array(before), np.array(after), **{"what": NEW, "seed": 1, **more})


def test_a_difference_that_luck_does_not_give_is_better_or_worse():
    half, whole = [0.5] * 20, [1.0] * 20
    better = verdict(half, whole)
    assert better.line == f"better: MRR@10 0.50 -> 1.00 (+0.50, 95% +0.50 .. +0.50) on 20 {NEW}"
    assert better[:7] == ("better", "MRR@10", 0.5, 1.0, 0.5, 0.5, 0.5)
    assert better.p_value == pytest.approx(2 / 2**20, abs=1e-3)  # of 2 ** 20 signs, only all and none are as far off
    assert (better.queries, better.base_kept) == (20, False)
    assert verdict(whole, half).line.startswith("worse: MRR@10 1.00 -> 0.50 (-0.50, 95% -0.50 .. -0.50) on 20 new")


def test_four_queries_that_all_get_better_are_no_difference_and_six_are():
    # All signs are equal in 2 of 2 ** 4 = 0.125 of all cases, and in 2 of 2 ** 6 = 0.03.
    assert verdict([0.5] * 4, [1.0] * 4).outcome == "no difference"
    assert verdict([0.5] * 6, [1.0] * 6).outcome == "better"


def test_the_line_says_so_where_interval_and_test_differ():
    line = verdict([0.5] * 4, [0.6, 0.7, 0.8, 0.9]).line
    assert line == f"no difference: MRR@10 0.50 -> 0.75 (+0.25, 95% +0.15 .. +0.35, but p = 0.12) on 4 {NEW}"


def test_small_differences_have_digits_to_be_seen_and_one_query_is_a_question():
    assert verdict([0.5] * 9, [0.504] * 9).line.startswith("better: MRR@10 0.5000 -> 0.5040 (+0.0040, 95% +0.0040 ..")
    assert verdict([0.5], [1.0]).line.endswith("on 1 new question about passages that training may know")


def test_a_base_that_is_kept_is_no_difference_and_says_why():
    kept = verdict([0.25, 0.5], [0.25, 0.5], chosen_by="Hit@1", base_kept=(0.61, 0.58))
    assert kept.line == (
        "no difference: the base is kept: where weights are chosen, Hit@1 fell from 0.6100 to 0.5800; "
        f"MRR@10 stays 0.3750 on 2 {NEW}"
    )
    assert (kept.difference, kept.p_value, kept.base_kept) == (0.0, 1.0, True)


def hinted(verdict, *, rows=5000, known_queries=0):
    return [line.split(":")[0] for line in hints(verdict, rows=rows, known_queries=known_queries)]


def test_what_to_do_next_follows_from_what_was_measured():
    mixed = [0.5, 1.0] * 100
    certain = verdict(mixed, [value / 2 + 0.5 for value in mixed])
    assert hints(certain, rows=100, known_queries=0) == []
    undecided = verdict(mixed, mixed[1:] + mixed[:1])
    interval = "200 queries judge, and the interval reaches 0.07 to either side"  # 1.96 * 0.5 / sqrt(200)
    assert (undecided.outcome, hinted(undecided)) == ("no difference", [interval])
    assert hinted(undecided, rows=499) == [interval, "499 rows are few to learn from"]
    same = verdict([0.25, 0.5, 1.0], [0.25, 0.5, 1.0])
    assert hinted(same)[0] == "3 queries judge, and none tells the models apart; hold out more, or label more"
    known = "7 of 200 queries that judge were trained on, now or when the base was made"
    assert hinted(undecided, rows=499, known_queries=7) == [known, interval]
    above = "30% of the negatives scored above their positive in the last round"
    assert hints(undecided, rows=499, known_queries=0, above=0.3)[0].startswith(above)
    assert hints(certain, rows=100, known_queries=0, above=0.2) == []
    worse = ["training made it worse, so keep the base"]
    assert hinted(verdict([0.5] * 60, [0.25] * 60)) == worse
    assert hinted(verdict([0.5] * 60, [0.5] * 60, base_kept=(0.6, 0.5)), rows=9) == worse
    assert hinted(verdict([0.5] * 9, [0.25] * 9)) == worse
    assert hinted(verdict([1.0] * 6, [1.0] * 6), rows=9) == ["the base finds nearly every answer to these questions"]
    assert hinted(verdict([0.5] * 40, [0.75] * 40))[0].startswith("40 queries judge")


# The whole script


@pytest.fixture
def questions(tmp_path):
    """190 questions about a pair of words, each with a passage of its own."""
    pairs = itertools.combinations(WORDS[4:24], 2)
    rows = [{"query": f"my {a} {b} is on", "pos": [f"to open the {a} and {b} call north"]} for a, b in pairs]
    return write_jsonl(tmp_path / "questions.jsonl", rows)


def flags(model, data, output, **more):
    given = {"model_name_or_path": model, "train_data": data, "output_dir": output, "max_steps": 6}
    given |= {"per_device_train_batch_size": 16, "train_group_size": 1, "learning_rate": 1e-3, "disable_tqdm": True}
    return argv_of(**given | more)


CHOOSING = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "hold_out": 110}
CHOOSING |= {"load_best_model_at_end": True}


def summary_of(folder):
    return json.loads((folder / "training_summary.json").read_text())


def per_query(model, queries, candidates, output):
    """What evaluate.py writes for a model, the whole document."""
    argv = {"index_file_jsonl_path": candidates, "query_file_jsonl_path": queries}
    evaluate.main(["--model_name", *map(str, model), *argv_of(**argv), "--output_dir", str(output)])
    return json.loads((output / "metrics.json").read_text())


def test_the_last_line_is_what_evaluate_finds_between_base_and_model(tiny_bert, questions, tmp_path, capsys, caplog):
    output = tmp_path / "out"
    with caplog.at_level("INFO"):
        finetune.main(flags(tiny_bert, questions, output, hold_out=60, hold_out_by="question"))
    shown, verdict = capsys.readouterr().out, summary_of(output)["verdict"]
    assert shown == verdict["line"] + "\n"
    assert shown.startswith(verdict["outcome"] + ": MRR@10 ")
    assert shown.endswith(f" on 60 {NEW}\n")
    found = per_query([tiny_bert, output], output / "held_out.jsonl", output / "held_out_candidates.jsonl", tmp_path)
    difference = found["differences"][str(output)]["MRR@10"]
    assert [verdict[name] for name in ("difference", "low", "high", "p_value")] == pytest.approx(
        [difference[name] for name in ("mean", "low", "high", "p_value")]
    )
    assert verdict["after"] == found["metrics"][str(output)]["MRR@10"]
    assert "to train on all rows with these settings: python finetune.py --model_name_or_path" in caplog.text
    assert "held_out_part" not in read_jsonl(output / "held_out.jsonl")[0]


def test_without_held_out_rows_nothing_is_on_stdout(tiny_bert, questions, tmp_path, capsys):
    finetune.main(flags(tiny_bert, questions, tmp_path / "out", eval_query_file_jsonl_path=questions))
    assert capsys.readouterr().out == ""
    assert summary_of(tmp_path / "out")["verdict"] is None


def test_what_chooses_does_not_judge(tiny_bert, questions, tmp_path, capsys, caplog):
    output = tmp_path / "out"
    finetune.main(flags(tiny_bert, questions, output, **CHOOSING))
    summary, records = summary_of(output), read_jsonl(output / "held_out.jsonl")
    parts = {part: [row for row in records if row["held_out_part"] == part] for part in ("choosing", "judging")}
    assert (len(records), len(parts["judging"])) == (110, summary["verdict"]["queries"])
    assert summary["hold_out"]["queries_that_choose"] == len(parts["choosing"])
    assert min(map(len, parts.values())) >= 25
    for part, rows in parts.items():
        queries = write_jsonl(tmp_path / f"{part}.jsonl", rows)
        caplog.clear()
        with caplog.at_level("INFO"):
            assert list(read_queries(queries)) == rows
        assert caplog.text == ""  # the field is no surprise to evaluate.py
        found = per_query([output], queries, output / "held_out_candidates.jsonl", tmp_path)["metrics"][str(output)]
        told = summary if part == "judging" else summary["hold_out"]
        assert told["metrics_after"] == found


def test_the_parts_depend_on_the_seed_and_on_no_other_rows(tiny_bert, questions, tmp_path, capsys):
    def choosing(name, rows, **more):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        finetune.main(flags(tiny_bert, data, tmp_path / name, **CHOOSING | {"hold_out": 0.7, "max_steps": 2, **more}))
        records = read_jsonl(tmp_path / name / "held_out.jsonl")
        return {row["query"] for row in records if row["held_out_part"] == "choosing"}

    rows = read_jsonl(questions)
    first = choosing("first", rows)
    more = [{"query": f"new {n}", "pos": [f"passage {n}"]} for n in range(40)]
    again = choosing("again", [*more, *rows[::-1]])
    assert {query for query in again if "new" not in query} == first
    assert choosing("other", rows, seed=7) != first


def test_too_few_queries_to_choose_are_refused_before_a_model_is_loaded(questions, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(flags("no-such-model", questions, tmp_path / "out", **CHOOSING | {"hold_out": 99}))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--load_best_model_at_end True: 99 queries are held out" in error
    assert "hold out 100 or more" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 2}, {"lora_rank": 2, "save_adapter_only": True}])
def test_the_base_is_kept_to_the_last_bit_where_all_that_was_trained_measures_worse(
    tiny_bert, questions, tmp_path, capsys, monkeypatch, adapters
):
    scores = itertools.chain([0.5], itertools.repeat(0.4))  # of the queries that choose, which are 0.5 at first
    measure = trainers.measure

    def spoiled(encoder, task, **kwargs):
        found = measure(encoder, task, **kwargs)
        return found if task is judging[0] else {"MRR@10": np.array([next(scores)])}

    judging, make = [], trainers.RetrievalTrainer.__init__

    def noted(self, *args, **kwargs):
        make(self, *args, **kwargs)
        judging.append(self.judge)

    monkeypatch.setattr(trainers, "measure", spoiled)
    monkeypatch.setattr(trainers.RetrievalTrainer, "__init__", noted)
    output = tmp_path / "out"
    given = {"query_instruction_for_retrieval": "my ", "sentence_pooling_method": "mean", **CHOOSING, **adapters}
    finetune.main(flags(tiny_bert, questions, output, **given))
    line, summary = capsys.readouterr().out, summary_of(output)
    assert line.startswith("no difference: the base is kept: where weights are chosen, MRR@10 fell from 0.5000 to 0.40")
    assert (summary["best_step"], summary["verdict"]["base_kept"]) == (0, True)
    assert summary["metrics_after"] == summary["metrics_before"]
    assert summary["hold_out"]["metrics_after"] == {"MRR@10": 0.5}
    if "save_adapter_only" in adapters:
        weights = load_file(output / "adapter_model.safetensors")
        assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)
        return
    base, kept = (load_file(folder / "model.safetensors") for folder in (tiny_bert, output))
    assert base.keys() == kept.keys()
    assert all(torch.equal(base[name], kept[name]) for name in base)
    assert len(np.load(output / "training_queries.npy")) == 0
    saved = json.loads((output / "1_Pooling" / "config.json").read_text())
    assert saved["pooling_mode_mean_tokens"]
    assert json.loads((output / "config_sentence_transformers.json").read_text())["prompts"]["query"] == "my "


def test_a_run_that_was_resumed_gives_the_same_verdict(tiny_bert, questions, tmp_path, capsys):
    finetune.main(flags(tiny_bert, questions, tmp_path / "whole", **CHOOSING))
    whole = capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (2, 6):
        again = {**CHOOSING, "resume_from_checkpoint": tmp_path / "parts" / f"checkpoint-{step}"}
        finetune.main(flags(tiny_bert, questions, tmp_path / "parts", **again))
        assert capsys.readouterr().out == whole
        assert summary_of(tmp_path / "parts")["verdict"] == summary_of(tmp_path / "whole")["verdict"]


def test_a_resumed_run_with_other_judges_gives_no_verdict(tiny_bert, questions, pairs, tmp_path, capsys, caplog):
    given = {"hold_out": 20, "save_strategy": "steps", "save_steps": 3}
    output = tmp_path / "out"
    finetune.main(flags(tiny_bert, questions, output, eval_query_file_jsonl_path=questions, **given))
    assert capsys.readouterr().out.endswith(f" on 190 questions of {questions}\n")
    given |= {"eval_query_file_jsonl_path": pairs, "resume_from_checkpoint": output / "checkpoint-3"}
    finetune.main(flags(tiny_bert, questions, output, **given))
    assert capsys.readouterr().out == ""
    assert "no verdict: these queries were not measured before" in caplog.text
    assert summary_of(output)["verdict"] is None


def test_a_run_with_stdout_closed_ends_well(tiny_bert, questions, tmp_path):
    words = flags(tiny_bert, questions, tmp_path / "out", hold_out=20)
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *quick_python(), "finetune.py", *words]
    run = subprocess.run(shell, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert summary_of(tmp_path / "out")["verdict"]["queries"] == 20
