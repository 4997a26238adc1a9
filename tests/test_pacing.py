"""Runs in stages: with --minutes as with --max_steps, bit by bit; resumed; stopped in time. Costs that are told."""

import json
import re

import pytest
from helpers.data import read_jsonl, write_jsonl
from helpers.tiny_runs import equal, flags, refusal, weights

import finetune
from embedding_finetune.training import pacing

IN_ROUNDS = {"mining_rounds": 2, "train_group_size": 3, "neighbours_in_batch": 2}
CHOICE = ["--range_for_sampling", "1-5", "--negative_number", "3"]


@pytest.fixture
def time_for(monkeypatch):
    """Let the time be enough for so many steps in each stage."""

    def make(*steps):
        left = list(steps)
        monkeypatch.setattr(pacing, "steps_within", lambda *_: left.pop(0))

    return make


def without_length(*args, **changes):
    """Flags of a tiny run that nothing says the length of."""
    argv = flags(*args, **changes)
    place = argv.index("--max_steps")
    return argv[:place] + argv[place + 2 :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 1e-1},
        {"gradient_accumulation_steps": 2, "warmup_steps": 0.5, "lr_scheduler_type": "cosine"},
        {"hold_out": 3, "eval_strategy": "steps", "eval_steps": 0.5},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_steps_that_are_settled_by_time_give_the_bits_of_as_many_by_number(
    tiny_bert, pairs, tmp_path, time_for, changes
):
    time_for(6)
    finetune.main(without_length(tiny_bert, pairs, tmp_path / "timed", minutes=5, **changes))
    finetune.main(flags(tiny_bert, pairs, tmp_path / "counted", max_steps=6, **changes))
    assert equal(weights(tmp_path / "timed"), weights(tmp_path / "counted"))
    summaries = [json.loads((tmp_path / name / "training_summary.json").read_text()) for name in ("timed", "counted")]
    assert summaries[0]["steps"] == summaries[1]["steps"] == 6
    assert summaries[0]["metrics_after"] == summaries[1]["metrics_after"]


def test_so_do_rounds(tiny_bert, pairs, tmp_path, time_for):
    time_for(4, 4)
    finetune.main([*without_length(tiny_bert, pairs, tmp_path / "timed", minutes=5, **IN_ROUNDS), *CHOICE])
    finetune.main([*flags(tiny_bert, pairs, tmp_path / "counted", max_steps=8, **IN_ROUNDS), *CHOICE])
    assert equal(weights(tmp_path / "timed"), weights(tmp_path / "counted"))


@pytest.mark.parametrize(("second", "steps"), [(2, 6), (9, 8), (0, 4)])
def test_a_later_round_may_become_shorter_but_not_longer(tiny_bert, pairs, tmp_path, time_for, second, steps):
    time_for(4, second)
    folder = tmp_path / "out"
    argv = without_length(tiny_bert, pairs, folder, minutes=5, logging_steps=1, save_strategy="epoch", **IN_ROUNDS)
    finetune.main([*argv, *CHOICE])
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    first = [1e-3 * share for share in (1, 0.75, 0.5, 0.25)]
    later = [5e-4 * (1 - step / (steps - 4)) for step in range(steps - 4)]
    assert rates == pytest.approx(first + later)


@pytest.mark.parametrize("checkpoint", [2, 4, 6])
def test_a_run_that_is_resumed_keeps_what_was_settled(tiny_bert, pairs, tmp_path, time_for, checkpoint):
    time_for(4, 3)
    folder = tmp_path / "out"
    argv = without_length(
        tiny_bert, pairs, folder, minutes=5, save_strategy="steps", save_steps=2, save_total_limit=9, **IN_ROUNDS
    )
    finetune.main([*argv, *CHOICE])
    whole = weights(folder)
    # In the middle of a round nothing is settled anew, and at the beginning of one it is.
    time_for(*([3] if checkpoint <= 4 else []))
    finetune.main([*argv, *CHOICE, "--resume_from_checkpoint", str(folder / f"checkpoint-{checkpoint}")])
    assert equal(whole, weights(folder))
    assert json.loads((folder / "training_summary.json").read_text())["steps"] == 7


def test_a_round_that_would_only_be_mined_for_is_not_begun(tiny_bert, pairs, tmp_path, time_for, monkeypatch, caplog):
    time_for(4)
    left = iter([100.0])  # none when the second round begins
    monkeypatch.setattr(pacing.Clock, "left", property(lambda _: next(left, 0.0)))
    finetune.main([*without_length(tiny_bert, pairs, tmp_path / "out", minutes=5, **IN_ROUNDS), *CHOICE])
    assert "--minutes 5 are over before round 2" in caplog.text
    assert caplog.text.count("mining among") == 1
    assert json.loads((tmp_path / "out" / "training_summary.json").read_text())["steps"] == 4


def test_a_run_that_is_resumed_counts_what_was_spent_and_stops_when_it_is_over(
    tiny_bert, pairs, tmp_path, time_for, caplog
):
    time_for(8)
    folder = tmp_path / "out"
    argv = without_length(tiny_bert, pairs, folder, minutes=5, save_strategy="steps", save_steps=2)
    finetune.main(argv)
    checkpoint = folder / "checkpoint-2"
    run = json.loads((checkpoint / "training_run.json").read_text())
    assert run["minutes"]["steps"] == [8]
    assert 0 < run["minutes"]["seconds"] < 300
    run["minutes"]["seconds"] = 299.999
    (checkpoint / "training_run.json").write_text(json.dumps(run))
    finetune.main([*argv, "--resume_from_checkpoint", str(checkpoint)])
    assert "--minutes 5 are over at step 3 of 8" in caplog.text
    assert json.loads((folder / "training_summary.json").read_text())["steps"] == 3
    assert (folder / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"minutes": 5, "max_steps": 3}, "--minutes 5 and --max_steps 3: give one of them"),
        ({"minutes": 5, "num_train_epochs": 1}, "--minutes 5 and --num_train_epochs 1"),
        ({"minutes": 0}, "--minutes 0.0: must be greater than 0"),
        ({"minutes": 1e-6}, "no time is left for a step; give 0.01 or more"),
        ({"minutes": 5, "lr_scheduler_type": "reduce_lr_on_plateau", "hold_out": 3, "eval_strategy": "epoch"}, "alone"),
    ],
)
def test_minutes_that_cannot_be_kept_are_refused_in_one_line(tiny_bert, pairs, tmp_path, capsys, changes, said):
    make = flags if "max_steps" in changes else without_length
    assert said in refusal(make(tiny_bert, pairs, tmp_path / "out", **changes), capsys)


@pytest.mark.parametrize(
    "damaged",
    [
        *(None, [1], {"seconds": 1}, {"seconds": "x", "steps": [4]}, {"seconds": 1, "steps": []}),
        *({"seconds": 1, "evaluation": 0, "steps": steps} for steps in ([4, 4], [0])),
        {"seconds": float("nan"), "evaluation": 0, "steps": [4]},
    ],
)
def test_minutes_that_are_damaged_in_a_checkpoint_are_one_line(tiny_bert, pairs, tmp_path, capsys, time_for, damaged):
    time_for(4)
    argv = without_length(tiny_bert, pairs, tmp_path / "out", minutes=5, save_strategy="epoch")
    finetune.main(argv)
    path = tmp_path / "out" / "checkpoint-4" / "training_run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "minutes": damaged}))
    assert "does not say what was spent" in refusal([*argv, "--resume_from_checkpoint", str(path.parent)], capsys)


def test_a_warm_up_that_is_longer_than_the_run_is_told(tiny_bert, pairs, tmp_path, time_for, caplog):
    time_for(4)
    finetune.main(without_length(tiny_bert, pairs, tmp_path / "out", minutes=5, warmup_steps=4))
    assert "the warm-up does not end within 4 steps" in caplog.text


def test_the_summary_counts_epochs_and_rates_of_what_was_made(tiny_bert, pairs, tmp_path, time_for):
    """30 rows in batches of 8 are 4 steps."""
    for name, changes, settled in (("plain", {}, [6]), ("rounds", IN_ROUNDS, [6, 6]), ("ended", IN_ROUNDS, [6, 0])):
        time_for(*settled)
        argv = without_length(tiny_bert, pairs, tmp_path / name, minutes=5, **changes)
        finetune.main([*argv, *(CHOICE if changes else [])])
        summary = json.loads((tmp_path / name / "training_summary.json").read_text())
        assert summary["epochs"] == pytest.approx(summary["steps"] / 4, abs=0.01)
        samples = summary["samples_per_second"] * summary["seconds"]
        assert samples == pytest.approx(30 * summary["epochs"], rel=0.01)


def test_other_minutes_are_another_run(tiny_bert, pairs, tmp_path, capsys, time_for):
    time_for(4)
    argv = without_length(tiny_bert, pairs, tmp_path / "out", minutes=5, save_strategy="epoch")
    finetune.main(argv)
    argv[argv.index("--minutes") + 1] = "6"
    assert "--minutes 6.0, where it had 5.0" in refusal([*argv, "--resume_from_checkpoint", "True"], capsys)


def test_the_recipe_says_what_it_will_take_before_its_first_step(tiny_bert, pairs, tmp_path, caplog):
    rows = read_jsonl(pairs)
    data = write_jsonl(tmp_path / "rows.jsonl", [{**row, "query": f"{row['query']} {n}"} for n, row in enumerate(rows)])
    finetune.main(
        [*("--recipe", "domain", "--model_name_or_path", str(tiny_bert), "--train_data", str(data)),
         *("--output_dir", str(tmp_path / "out"), "--num_train_epochs", "4")]
    )  # fmt: skip
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("from here on")]
    steps = json.loads((tmp_path / "out" / "training_summary.json").read_text())["steps"]
    assert re.search(
        rf"about [\d.]+ (s|minutes), {steps} steps of [\d.]+ s, .* a mining; .* GB of memory, .* of disk", line
    )
