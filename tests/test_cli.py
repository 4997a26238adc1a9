"""The scripts as programs: exit statuses, one-line errors, what goes to stdout, when heavy imports happen."""

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.data import REPOSITORY, TOPICS, read_jsonl, write_jsonl
from helpers.tiny import make_tiny_bert

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune import command_line, process

GOOD_ROW = b'{"query": "q", "pos": ["p"]}\n'
BAD_FILES = {
    "missing.jsonl": (None, "missing.jsonl"),
    "empty.jsonl": (b"", "empty.jsonl"),
    "nonsense.jsonl": (GOOD_ROW + b"{nonsense\n", "nonsense.jsonl:2:"),
    "no_query.jsonl": (b'{"pos": ["p"]}\n', 'no_query.jsonl:1: "query"'),
    "no_pos.jsonl": (b'{"query": "q"}\n', 'no_pos.jsonl:1: "pos"'),
    "string_pos.jsonl": (b'{"query": "q", "pos": "p"}\n', 'string_pos.jsonl:1: "pos"'),
    "empty_pos.jsonl": (b'{"query": "q", "pos": []}\n', 'empty_pos.jsonl:1: "pos"'),
    "blank_pos.jsonl": (b'{"query": "q", "pos": [""]}\n', 'blank_pos.jsonl:1: "pos"[0]'),
    "array.json": (b'[{"query": "q", "pos": ["p"]},\n{"query": "q"}]', 'array.json:2: "pos" is missing'),
    "quote.csv": (b'query,pos\nq,"p\n', "quote.csv: row 2: a quote is opened there and never closed"),
    "cells.tsv": (b"query\tpos\nq\tp\nq\n", "cells.tsv: row 3: expected 2 cells"),
    "header.csv": (b"query,pos\n", "header.csv: the file is empty"),
    "scored.csv": (b"anchor,positive,score\na,b,0.5\n", 'scored.csv: row 2: a number in "score"'),
    "damaged.parquet": (b"PAR1", "damaged.parquet: cannot be read"),
    "latin1.jsonl": ('{"query": "é", "pos": ["p"]}\n'.encode("latin-1"), "latin1.jsonl:1: not UTF-8"),
}
BAD_TRAINING_FILES = BAD_FILES | {
    "number_neg.jsonl": (b'{"query": "q", "pos": ["p"], "neg": [1]}\n', 'number_neg.jsonl:1: "neg"[0]'),
    "short_scores.jsonl": (
        b'{"query": "q", "pos": ["p", "r"], "pos_scores": [1]}\n',
        ':1: "pos_scores" must hold a number',
    ),
    "odd_scores.jsonl": (b'{"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": ["1"]}\n', ':1: "neg_scores" must'),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder in which loading any model is a failure of the test."""
    monkeypatch.chdir(tmp_path)

    def no_model(*args, **kwargs):
        pytest.fail("a model was loaded before the input was found to be bad")

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", no_model)
    (tmp_path / "good.jsonl").write_bytes(GOOD_ROW)
    (tmp_path / "mined.jsonl").write_bytes(b'{"query": "q", "pos": ["p"], "neg": ["n"]}\n')
    (tmp_path / "candidates.jsonl").write_bytes(b'{"context": ["p"]}\n')
    (tmp_path / "out.jsonl").write_text("old")
    return tmp_path


def error_of(main, argv, capsys):
    """Run a script that must end with status 2; its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "Generating train split" not in line]
    assert len([line for line in lines if line.strip()]) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[-1]


def mine_argv(**changes):
    flags = {"model_name_or_path": "m", "input_file": "good.jsonl", "output_file": "out.jsonl", **changes}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def finetune_argv(**changes):
    flags = {"model_name_or_path": "m", "train_data": "good.jsonl", "output_dir": "tuned", **changes}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def evaluate_argv(**changes):
    flags = {
        "model_name": "m",
        "index_file_jsonl_path": "candidates.jsonl",
        "query_file_jsonl_path": "good.jsonl",
        **changes,
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def write_bad(folder, name, content):
    if content is not None:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(("name", "content", "complaint"), [(k, *v) for k, v in BAD_TRAINING_FILES.items()])
def test_mining_refuses_a_bad_input_file(folder, capsys, name, content, complaint):
    write_bad(folder, name, content)
    assert complaint in error_of(mine_hard_neg.main, mine_argv(input_file=name), capsys)
    assert (folder / "out.jsonl").read_text() == "old"


@pytest.mark.parametrize(("name", "content", "complaint"), [(k, *v) for k, v in BAD_TRAINING_FILES.items()])
def test_training_refuses_a_bad_data_file(folder, capsys, name, content, complaint):
    write_bad(folder, name, content)
    assert complaint in error_of(finetune.main, finetune_argv(train_data=name), capsys)
    assert not (folder / "tuned").exists()


@pytest.mark.parametrize(("name", "content", "complaint"), [(k, *v) for k, v in BAD_FILES.items()])
def test_evaluation_refuses_a_bad_query_file(folder, capsys, name, content, complaint):
    write_bad(folder, name, content)
    assert complaint in error_of(evaluate.main, evaluate_argv(query_file_jsonl_path=name), capsys)


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (mine_hard_neg.main, mine_argv(candidate_pool="bad.jsonl")),
        (evaluate.main, evaluate_argv(index_file_jsonl_path="bad.jsonl")),
    ],
)
def test_a_bad_candidates_file_is_refused(folder, capsys, main, argv):
    assert "bad.jsonl does not exist" in error_of(main, argv, capsys)
    (folder / "bad.jsonl").write_bytes(b'{"context": ["p"]}\n{"context": "p"}\n')
    assert 'bad.jsonl:2: "context" is a str' in error_of(main, argv, capsys)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("range_for_sampling", value) for value in ("10-2", "5-5", "5", "a-b", "-1-5", "2-10-20", "")],
        *[("negative_number", value) for value in ("0", "-3", "1.5", "many")],
        ("sentence_pooling_method", "median"),
        ("normalized", "perhaps"),
        ("passage_max_len", "0"),
        ("tokens_per_batch", "0"),
        ("candidate_pool", "."),
        ("input_file", "."),
        ("output_file", "nowhere/out.jsonl"),
        ("output_file", "."),
        ("report_file", "nowhere/audit.json"),
        *[("absolute_margin", value) for value in ("-0.1", "nan", "much")],
        *[("relative_margin", value) for value in ("-0.05", "inf")],
        *[("near_duplicate_threshold", value) for value in ("0", "1.01", "-1", "nan")],
        ("max_score", "high"),
        ("min_score", "nan"),
        ("sampling_strategy", "best"),
        ("show_examples", "0"),
        ("no_such_flag", "1"),
    ],
)
def test_mining_refuses_a_bad_flag_by_name(folder, capsys, flag, value):
    assert f"--{flag}" in error_of(mine_hard_neg.main, mine_argv(**{flag: value}), capsys)
    assert (folder / "out.jsonl").read_text() == "old"


def test_mining_refuses_bounds_and_models_that_contradict_each_other(folder, capsys):
    assert "--max_score: 0.2 is below --min_score 0.3" in error_of(
        mine_hard_neg.main, mine_argv(max_score="0.2", min_score="0.3"), capsys
    )
    assert "--model_name_or_path" in error_of(
        mine_hard_neg.main, [*mine_argv(), "--model_name_or_path", "m", "m"], capsys
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("temperature", value) for value in ("0", "-0.1", "nan")],
        ("train_group_size", "0"),
        ("query_max_len", "0"),
        ("passage_max_len", "-1"),
        ("max_example_num_per_dataset", "0"),
        ("tokens_per_sub_batch", "0"),
        ("sentence_pooling_method", "median"),
        ("label_smoothing_factor", "0.1"),
        ("train_sampling_strategy", "group_by_length"),
        ("output_dir", "full"),
        ("output_dir", "good.jsonl"),
        ("output_dir", "good.jsonl/tuned"),
        ("no_such_flag", "1"),
    ],
)
def test_training_refuses_a_bad_flag_by_name(folder, capsys, flag, value):
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("old")
    assert f"--{flag}" in error_of(finetune.main, finetune_argv(**{flag: value}), capsys)
    assert os.listdir(folder / "full") == ["file"]


@pytest.mark.parametrize(("flag", "value"), [("per_device_train_batch_size", 1), ("use_inbatch_neg", False)])
def test_training_refuses_a_loss_that_is_zero_by_construction(folder, capsys, flag, value):
    argv = finetune_argv(train_group_size=1, **{flag: value})
    assert "the loss is 0" in error_of(finetune.main, argv, capsys)


@pytest.mark.parametrize(
    ("flag", "value"), [("measures", "Fame"), ("cutoffs", "0"), ("cutoffs", "ten"), ("no_such_flag", "1")]
)
def test_evaluation_refuses_a_bad_flag_by_name(folder, capsys, flag, value):
    assert f"--{flag}" in error_of(evaluate.main, evaluate_argv(**{flag: value}), capsys)


def test_gpu_search_is_refused_before_a_model_is_loaded_where_faiss_has_no_gpu(folder, capsys):
    import faiss

    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    for main, argv in ((mine_hard_neg.main, mine_argv()), (evaluate.main, evaluate_argv())):
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--use_gpu_for_searching"])
        assert stop.value.code == 2
        assert "--use_gpu_for_searching" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (mine_hard_neg.main, mine_argv(model_name_or_path="no/such-model")),
        (finetune.main, finetune_argv(model_name_or_path="no/such-model", train_data="mined.jsonl")),
        (evaluate.main, evaluate_argv(model_name="no/such-model")),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(folder, capsys, monkeypatch, main, argv):
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "no/such-model" in last
    assert "Give a folder" in last


@pytest.mark.parametrize("script", ["mine_hard_neg.py", "evaluate.py"])
@pytest.mark.parametrize("argv", [["--help"], ["--no_such_flag"], ["missing"]])
def test_help_and_errors_answer_at_once(tmp_path, script, argv):
    if argv == ["missing"]:
        argv = mine_argv(input_file="no.jsonl") if script.startswith("mine") else evaluate_argv()
    command = [sys.executable, REPOSITORY / script, *argv]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == (0 if argv == ["--help"] else 2)
    assert used.ru_utime + used.ru_stime < 0.5  # of its own time, whatever else the machine does


@pytest.mark.parametrize("script", ["mine_hard_neg", "finetune", "evaluate"])
def test_importing_a_script_does_nothing_and_imports_nothing_heavy(script):
    heavy = {"torch", "transformers", "faiss", "datasets"}
    program = f"import sys, {script}; print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_ctrl_c_ends_mining_with_130_and_leaves_the_old_output(tmp_path):
    model = make_tiny_bert(tmp_path / "bert")
    rows = ({"query": f"reset {n}", "pos": [f"the {TOPICS[n % 10]} {n} is red"]} for n in range(100_000))
    write_jsonl(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    argv = mine_argv(model_name_or_path=model, input_file=tmp_path / "in.jsonl", output_file=output)
    command = [sys.executable, REPOSITORY / "mine_hard_neg.py", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "encoding in" in line:  # for longer than the signal needs
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert rest.strip().endswith("interrupted")
    assert "Traceback" not in rest
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "in.jsonl", "out.jsonl"]


def test_a_signal_during_an_import_that_would_swallow_it_ends_the_run_after_it(capsys):
    done = []

    @command_line.command
    def main():
        with process.uninterrupted():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                done.append("import")
            except KeyboardInterrupt:
                done.append("swallowed")
        done.append("the run went on")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, done) == (130, ["import"])
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("number", "status", "reason"), [("INT", 130, "interrupted"), ("TERM", 143, "terminated"), ("HUP", 129, "hung up")]
)
def test_a_signal_ends_a_run_with_its_own_status_after_its_clean_up(number, status, reason, capsys):
    done = []

    @command_line.command
    def main():
        try:
            os.kill(os.getpid(), getattr(signal, f"SIG{number}"))
            time.sleep(60)
        finally:
            done.append("clean-up")

    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, done) == (status, ["clean-up"])
    assert capsys.readouterr().err.endswith(f": {reason}\n")


def test_nohup_keeps_a_run_going_when_the_terminal_hangs_up():
    @command_line.command
    def main():
        os.kill(os.getpid(), signal.SIGHUP)
        return "done"

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main() == "done"
    finally:
        signal.signal(signal.SIGHUP, before)


def state_of_the_process():
    import datasets
    import transformers
    from torch._inductor import config as inductor

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    root, package = logging.getLogger(), logging.getLogger("embedding_finetune")
    return {
        "garbage collector": gc.isenabled(),
        "signals": {**handlers, "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ())},
        "environment": dict(os.environ),
        "logging": (root.handlers[:], root.level, package.handlers[:], package.level),
        "stdout": (sys.stdout, getattr(sys.stdout, "errors", None)),
        "progress bars": (transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()),
        "compiler": inductor.freezing,
        "exceptions": (sys.excepthook, sys.unraisablehook),
        "folder": os.getcwd(),
    }


@pytest.mark.parametrize("is_on", [True, False])
def test_each_main_called_from_python_leaves_the_process_as_it_was(
    tiny_bert, pairs, candidates, tmp_path, monkeypatch, is_on
):
    monkeypatch.setenv("RANK", "0")
    mined, tuned = tmp_path / "mined.jsonl", tmp_path / "tuned"
    runs = [
        (mine_hard_neg.main, mine_argv(model_name_or_path=tiny_bert, input_file=pairs, output_file=mined)),
        (finetune.main, finetune_argv(model_name_or_path=tiny_bert, train_data=mined, output_dir=tuned, max_steps=1)),
        (evaluate.main, evaluate_argv(model_name=tuned, index_file_jsonl_path=candidates, query_file_jsonl_path=pairs)),
    ]
    (gc.enable if is_on else gc.disable)()
    try:
        before = state_of_the_process()
        for main, argv in runs:
            main(argv)
            assert state_of_the_process() == before
            with pytest.raises(SystemExit):
                main([*argv, "--no_such_flag"])
            assert state_of_the_process() == before
    finally:
        gc.enable()


def test_each_main_reads_sys_argv_when_called_with_nothing(tiny_bert, pairs, candidates, tmp_path, monkeypatch):
    mined, tuned = tmp_path / "mined.jsonl", tmp_path / "tuned"

    def call(main, argv):
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        return main()

    flags = {"model_name_or_path": tiny_bert, "input_file": pairs, "output_file": mined}
    call(mine_hard_neg.main, mine_argv(range_for_sampling="0-5", **flags))
    assert all(row["neg"] for row in read_jsonl(mined))
    argv = finetune_argv(model_name_or_path=tiny_bert, train_data=mined, output_dir=tuned, max_steps=1)
    call(finetune.main, argv)
    argv = evaluate_argv(model_name=tuned, index_file_jsonl_path=candidates, query_file_jsonl_path=pairs)
    metrics = call(evaluate.main, argv)
    assert set(metrics) == {"MRR@1", "Hit@1", "MRR@5", "Hit@5", "MRR@10", "Hit@10"}


def test_evaluation_prints_the_returned_dict_as_the_last_stdout_line(tiny_bert, pairs, candidates, capsys):
    argv = evaluate_argv(model_name=tiny_bert, index_file_jsonl_path=candidates, query_file_jsonl_path=pairs)
    metrics = evaluate.main(argv)
    assert capsys.readouterr().out == f"{metrics}\n"
    assert metrics["MRR@1"] == metrics["Hit@1"]


def test_evaluating_two_models_prints_a_table_and_a_dict_of_dicts(tiny_bert, pairs, candidates, tmp_path, capsys):
    other = make_tiny_bert(tmp_path / "other", seed=5)
    flags = {"index_file_jsonl_path": candidates, "query_file_jsonl_path": pairs, "cutoffs": 3}
    metrics = evaluate.main([*evaluate_argv(model_name=tiny_bert, **flags), "--model_name", str(other)])
    assert set(metrics) == {str(tiny_bert), str(other)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(metrics)
    difference = metrics[str(other)]["MRR@3"] - metrics[str(tiny_bert)]["MRR@3"]
    assert any(line.split()[:2] == ["MRR@3", f"{difference:+.4f}"] for line in lines)


def test_a_folder_of_files_is_training_data(tiny_bert, pairs, tmp_path):
    data = Path(tmp_path / "data")
    data.mkdir()
    (data / "a.jsonl").write_bytes(pairs.read_bytes())
    (data / "notes.txt").write_text("not data")
    finetune.main(
        finetune_argv(model_name_or_path=tiny_bert, train_data=data, output_dir=tmp_path / "tuned", max_steps=1)
    )
    assert (tmp_path / "tuned" / "model.safetensors").exists()
