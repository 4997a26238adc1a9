"""The recipe: which flags follow from which data and model."""

import pytest
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.tiny_runs import refusal

import finetune
from embedding_finetune.training.all_rows import by_flag
from embedding_finetune.training.recipe import Facts, completed, domain

SMALL = Facts(
    rows=593,
    queries=590,
    query_tokens=23,
    passage_tokens=170,
    longest=256,
    parameters=22_000_000,
    bfloat16=True,
)
VERBS = "reset open close clean replace check press hold call find need order".split()
CHOOSING = {"eval_strategy", "load_best_model_at_end"}
SAVING = {"save_strategy", "save_total_limit"}
LARGE = SMALL._replace(rows=26_028, queries=26_000, passage_tokens=400)


def test_epochs_fall_with_the_root_of_the_number_of_rows():
    rows = (50, 100, 593, 1000, 5000, 26_028, 1_000_000, 10**8)
    epochs = [domain(SMALL._replace(rows=n))["num_train_epochs"] for n in rows]
    assert epochs == [20, 20, 8.2, 6.3, 2.8, 1.2, 0.2, 0.02]


def test_small_data_gets_small_batches_and_lengths_that_hold_almost_all_texts():
    flags = domain(SMALL)
    assert (flags["per_device_train_batch_size"], flags["query_max_len"], flags["passage_max_len"]) == (32, 32, 176)
    assert domain(LARGE)["per_device_train_batch_size"] == 128
    assert domain(LARGE)["passage_max_len"] == 256  # what the model takes


def test_dropout_is_for_rows_that_are_seen_often():
    assert domain(SMALL)["dropout"] == 0
    assert "dropout" not in domain(SMALL._replace(rows=200))  # 14 epochs


def test_larger_models_get_smaller_rates():
    rates = [domain(SMALL._replace(parameters=n))["learning_rate"] for n in (22_000_000, 110_000_000, 560_000_000)]
    assert rates == [1e-4, 5e-5, 2e-5]


def test_a_tenth_of_the_queries_is_held_out_and_chooses_only_where_that_is_many():
    assert domain(SMALL)["hold_out"] == 59
    assert "load_best_model_at_end" not in domain(SMALL)
    assert domain(LARGE)["hold_out"] == 2000
    assert domain(LARGE)["load_best_model_at_end"]
    assert "hold_out" not in domain(SMALL._replace(rows=99))


def test_what_the_user_wants_held_out_is_of_the_same_kind_and_chooses_where_it_is_many():
    assert domain(SMALL._replace(hold_out=20))["hold_out_by"] == "question"
    assert "load_best_model_at_end" not in domain(SMALL._replace(hold_out=199))
    assert domain(SMALL._replace(hold_out=200))["load_best_model_at_end"]
    assert domain(SMALL._replace(rows=30, hold_out=10))["hold_out"] == 10
    assert not {"hold_out", "hold_out_by"} & domain(LARGE._replace(hold_out=0)).keys()


def test_several_processes_share_the_batch_of_one():
    flags = domain(SMALL._replace(processes=4))
    assert (flags["per_device_train_batch_size"], flags["negatives_cross_device"]) == (8, True)
    assert "negatives_cross_device" not in domain(SMALL)


def test_half_precision_is_for_hardware_that_has_it():
    assert "bf16" not in domain(SMALL._replace(bfloat16=False))


def test_what_the_user_gives_stays():
    argv = ["--train_data", "a", "b", "--recipe", "domain", "--learning_rate=1", "--normalized"]
    flags = dict(by_flag(completed(argv, domain(SMALL))))
    assert flags["train_data"] == ["--train_data", "a", "b"]
    assert (flags["learning_rate"], flags["normalized"]) == (["--learning_rate=1"], ["--normalized"])
    assert "recipe" not in flags
    assert flags["temperature"] == ["--temperature", "0.05"]


def test_a_flag_that_is_given_twice_keeps_all_its_values():
    words = completed(["--train_data", "a", "b", "--recipe", "domain", "--train_data", "c"], {})
    assert words == ["--train_data", "a", "b", "--train_data", "c"]


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        (
            ["--mining_rounds=0"],
            {"range_for_sampling", "negative_number", "sampling_strategy", "neighbours_in_batch"},
        ),
        (["--max_steps", "9"], {"num_train_epochs", "dropout"}),
        (["--num_train_epochs", "30"], {"dropout"}),
        (["--fp16", "True"], {"bf16"}),
        (["--lr_scheduler_type", "constant"], {"warmup_steps"}),
        (["--eval_query_file_jsonl_path", "q"], {"hold_out", "hold_out_by"} | CHOOSING),
        (["--hold_out_by", "customer"], CHOOSING),
        (["--save_steps", "5"], SAVING | CHOOSING),
        (["--save_strategy", "no"], {"save_total_limit"} | CHOOSING),
        (["--minutes", "9"], {"num_train_epochs", "dropout"}),
    ],
)
def test_what_a_given_flag_makes_useless_is_left_out(given, gone):
    whole, flags = (dict(by_flag(completed(argv, domain(LARGE)))) for argv in ([], given))
    assert whole.keys() - flags.keys() == gone


def test_one_command_trains_and_judges_and_its_printed_flags_give_the_same_model(
    tiny_bert, pairs, tmp_path, caplog, capsys
):
    argv = ["--model_name_or_path", tiny_bert, "--train_data", pairs, "--disable_tqdm", "True", "--hold_out", "6"]
    argv = [*map(str, argv)]
    finetune.main([*argv, "--recipe", "domain", "--output_dir", str(tmp_path / "one")])
    assert capsys.readouterr().out.startswith(("better: ", "no difference: ", "worse: "))
    [line] = [line for line in caplog.messages if line.startswith("recipe: python finetune.py")]
    printed = line.removeprefix("recipe: python finetune.py ").split()
    assert "--mining_rounds" in printed
    assert printed[printed.index("--hold_out_by") + 1] == "question"
    assert "--recipe" not in printed
    printed[printed.index("--output_dir") + 1] = str(tmp_path / "two")
    finetune.main(printed)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_flags_that_need_what_the_recipe_adds_are_taken_and_others_say_where_they_come_from(
    tiny_bert, pairs, tmp_path, capsys
):
    argv = ["--recipe", "domain", "--model_name_or_path", str(tiny_bert), "--train_data", str(pairs)]
    argv += ["--hold_out", "6", "--num_train_epochs", "4"]
    finetune.main([*argv, "--eval_strategy", "steps", "--eval_steps", "2", "--output_dir", str(tmp_path / "out")])
    said = refusal([*argv, "--train_sampling_strategy", "sequential", "--output_dir", str(tmp_path / "no")], capsys)
    assert "with the flags that --recipe domain adds: --neighbours_in_batch is not for" in said
    said = refusal([*argv, "--early_stopping_patience", "1", "--output_dir", str(tmp_path / "no")], capsys)
    assert "with the flags that --recipe domain adds: --early_stopping_patience needs --eval_strategy" in said


def test_few_rows_are_not_judged_unless_the_user_holds_some_out(tiny_bert, pairs, tmp_path, caplog, capsys):
    argv = ["--recipe", "domain", "--model_name_or_path", str(tiny_bert), "--train_data", str(pairs)]
    for given, said in (([], 1), (["--hold_out", "0"], 0), (["--hold_out", "6"], 0)):
        caplog.clear()
        finetune.main([*argv, *given, "--output_dir", str(tmp_path / "-".join(["out", *given]))])
        assert caplog.text.count("30 rows are too few to judge a model by") == said
        assert bool(capsys.readouterr().out) == ("6" in given)


def test_queries_alone_are_trained_against_the_whole_pool_at_three_times_the_rate():
    flags = domain(LARGE._replace(freezes_passages=True))
    assert (flags["learning_rate"], flags["temperature"], flags["per_device_train_batch_size"]) == (3e-4, 0.03, 256)
    assert domain(SMALL._replace(freezes_passages=True))["per_device_train_batch_size"] == 32
    assert domain(LARGE._replace(freezes_passages=True, processes=4))["per_device_train_batch_size"] == 64
    assert flags["num_train_epochs"] == domain(LARGE)["num_train_epochs"]
    assert not flags.keys() & {"mining_rounds", "train_group_size", "neighbours_in_batch", "passage_max_len"}


def test_the_recipe_for_queries_alone_runs(tiny_bert, tmp_path, capsys):
    rows = [
        {"query": f"how do i {verb} the {topic}?", "pos": [passage_about(topic)]} for verb in VERBS for topic in TOPICS
    ]
    argv = ["--recipe", "domain", "--freeze_passages", "True", "--model_name_or_path", str(tiny_bert)]
    argv += ["--train_data", str(write_jsonl(tmp_path / "rows.jsonl", rows)), "--output_dir", str(tmp_path / "out")]
    finetune.main([*argv, "--max_steps", "4"])
    assert (tmp_path / "out" / "router_config.json").exists()
    assert " on 12 new questions about passages that training may know" in capsys.readouterr().out
