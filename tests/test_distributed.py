"""Claims about several processes, with gloo on CPU, really launched by torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.data import REPOSITORY, TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.quick_python import quick_python, quick_torchrun
from helpers.tiny import make_tiny_bert, make_tiny_reranker
from safetensors.torch import load_file

from embedding_finetune.command_line import UserError
from embedding_finetune.distributed import gather_objects, gather_rows, join_process_group, own_share
from embedding_finetune.training.arguments import RetrieverTrainingArguments

WEIGHTS = "model.safetensors"
STEPS, GLOBAL_BATCH = 3, 8


def launch(
    program: str, folder: Path, *arguments: str, processes: int, launcher=None, **variables
) -> subprocess.CompletedProcess:
    """Run a Python program under torchrun; it ends within five minutes, on a busy machine too, or has hung.

    launcher: another module that starts it, and its flags.
    """
    by = [sys.executable, "-m", *launcher] if launcher else quick_torchrun(processes)
    script = folder / f"program_{processes}.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{program}")
    return subprocess.run(
        [*by, script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_alone(program: str, folder: Path, *arguments: str, **variables) -> subprocess.CompletedProcess:
    """Run a Python program without a launcher."""
    script = folder / "program.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{program}")
    return subprocess.run(
        [*quick_python(), script, *arguments],
        env={**os.environ, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows in which a batch of one process often holds the positives of another's queries."""
    return write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {
                "query": f"{words} {topic}",
                "pos": [passage_about(topic)],
                "neg": [passage_about(TOPICS[n - 1]), passage_about(TOPICS[n - 2]), f"call the {topic}"][: n % 4],
            }
            for words in ("reset the", "my red", "open the")
            for n, topic in enumerate(TOPICS)
        ],
    )


def training_flags(model, data, output, processes, *extra):
    return [
        *("--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(output)),
        *("--per_device_train_batch_size", str(GLOBAL_BATCH // processes), "--train_group_size", "3"),
        *("--max_steps", str(STEPS), "--optim", "sgd", "--learning_rate", "0.5", "--max_grad_norm", "0.3"),
        *("--temperature", "0.2", "--logging_steps", "1", "--save_steps", str(STEPS), "--disable_tqdm", "True"),
        *("--eval_query_file_jsonl_path", str(data), *extra),
    ]


VARIANTS = {
    "plain": ("--negatives_cross_device", "True"),
    "unmasked": ("--negatives_cross_device", "True", "--mask_known_positives", "False"),
    "group": ("--negatives_cross_device", "True", "--use_inbatch_neg", "False"),
    "recomputed": ("--negatives_cross_device", "True", "--recompute_sub_batches", "True"),
    "neighbours": ("--negatives_cross_device", "True", "--neighbours_in_batch", "2"),
    "false negatives": ("--negatives_cross_device", "True", "--false_negative_margin", "0"),
    "rounds": (
        *("--negatives_cross_device", "True", "--mining_rounds", "3"),
        *("--range_for_sampling", "0-4", "--negative_number", "2"),
    ),
    "adapters": ("--negatives_cross_device", "True", "--lora_rank", "2"),
}


def test_processes_whose_clocks_differ_agree_on_the_number_of_steps(data, tmp_path):
    model = make_tiny_bert(tmp_path / "bert", dropout=0.0)
    cross = ("--negatives_cross_device", "True")
    for processes in (1, 2):
        argv = training_flags(model, data, tmp_path / f"out_{processes}", processes, *cross)
        argv[argv.index("--max_steps") : argv.index("--max_steps") + 2] = ["--minutes", "5"]
        program = f"""
import os, finetune
from embedding_finetune.training import pacing
pacing.steps_within = lambda *_: 3 + 4 * int(os.environ["RANK"])
finetune.main({argv!r})
"""
        result = launch(program, tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / f"out_{processes}" / "training_summary.json").read_text())["steps"] == 3
    one, two = (load_file(tmp_path / f"out_{processes}" / "model.safetensors") for processes in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_two_processes_train_as_one_with_the_twofold_batch(data, tmp_path):
    model = make_tiny_bert(tmp_path / "bert", dropout=0.0)
    queries = [row["query"] for row in read_jsonl(data)]
    # Other rows' positives are confirmed negatives: the margin masks them no longer, whichever process has them.
    lines = [{"query": query, "passage": passage_about(TOPICS[-1]), "relevant": False} for query in queries[:9]]
    judgements = ("--judgements", str(write_jsonl(tmp_path / "judgements.jsonl", lines)))
    variants = {**VARIANTS, "judged": (*VARIANTS["false negatives"], *judgements)}
    for processes in (1, 2):
        runs = [
            training_flags(model, data, tmp_path / f"{name}_{processes}", processes, *extra)
            for name, extra in variants.items()
        ]
        program = f"import finetune\nfor flags in {runs!r}:\n    finetune.main(flags)"
        result = launch(program, tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("30 training rows") == len(variants)
        assert result.stdout == ""
    start = load_file(model / "model.safetensors")
    for name in variants:
        one, two = (load_file(tmp_path / f"{name}_{n}" / "model.safetensors") for n in (1, 2))
        for key in one:
            # Relative to how far training moved the tensor.
            moved = (one[key] - start[key]).norm()
            assert (one[key] - two[key]).norm() <= 1e-5 * moved + 1e-6, (name, key)
        history_one, history_two = (history(tmp_path / f"{name}_{n}") for n in (1, 2))
        for field in ("loss", "grad_norm"):
            first, second = ([e[field] for e in entries if field in e] for entries in (history_one, history_two))
            assert len(first) == STEPS
            assert second == pytest.approx(first, rel=1e-5), (name, field)
        evaluations = [
            [entry["eval_MRR@10"] for entry in entries if "eval_MRR@10" in entry]
            for entries in (history_one, history_two)
        ]
        assert evaluations[0] == evaluations[1]
    # The masks matter here: without them the loss is another one, so texts of other processes were seen.
    masked, unmasked = (history(tmp_path / f"{name}_2")[1]["loss"] for name in ("plain", "unmasked"))
    assert masked != pytest.approx(unmasked, rel=1e-3)


def test_two_processes_train_queries_alone_as_one_does(data, tmp_path):
    """Against the whole pool, and against panels of one that does not fit into memory."""
    model = make_tiny_bert(tmp_path / "bert", dropout=0.0)
    pool = write_jsonl(
        tmp_path / "pool.jsonl", [{"text": f"{passage_about(topic)} {n}"} for n in "1234" for topic in TOPICS]
    )
    extra = ("--freeze_passages", "True", "--candidate_pool", str(pool), "--false_negative_margin", "0.05")
    for processes in (1, 2):
        runs = {}
        for name in ("whole", "panel"):
            argv = training_flags(model, data, tmp_path / f"{name}_{processes}", processes, *extra)
            place = argv.index("--train_group_size")
            runs[name] = argv[:place] + argv[place + 2 :]
        program = f"""
import finetune
from embedding_finetune.training import hardest, setup
finetune.main({runs["whole"]!r})
hardest.STEPS, hardest.PER_QUERY, setup.fits = 2, 3, lambda *_: False
finetune.main({runs["panel"]!r})
"""
        result = launch(program, tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
    start = load_file(model / "model.safetensors")
    for name in ("whole", "panel"):
        one, two = (load_file(tmp_path / f"{name}_{n}" / "query_0_Transformer" / "model.safetensors") for n in (1, 2))
        for key in one:
            moved = (one[key] - start[key]).norm()
            assert (one[key] - two[key]).norm() <= 1e-5 * moved + 1e-6, (name, key)
        first, second = ([e["loss"] for e in history(tmp_path / f"{name}_{n}") if "loss" in e] for n in (1, 2))
        assert second == pytest.approx(first, rel=1e-5)
    losses = [history(tmp_path / f"{name}_2")[1]["loss"] for name in ("whole", "panel")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_two_processes_train_on_batches_of_one_file_as_one_does_and_resume_in_a_later_epoch(data, tmp_path):
    """Batches of 7, 6, 5, 4 and 1 rows: unequal shares, and a batch of fewer rows than there are processes."""
    model = make_tiny_bert(tmp_path / "bert", dropout=0.0)
    rows = read_jsonl(data)
    files = [
        str(write_jsonl(tmp_path / f"{n}.jsonl", part)) for n, part in enumerate((rows[:13], rows[13:22], rows[22:23]))
    ]
    for processes in (1, 2):
        runs = []
        for name, extra in (("one_file", ["--one_file_per_batch", "True"]), ("mixed", [])):
            output = str(tmp_path / f"{name}_{processes}")
            flags = training_flags(model, files[0], output, processes, "--negatives_cross_device", "True", *extra)
            flags += ["--train_data", *files[1:]]
            for flag, value in (("--max_steps", "8"), ("--save_steps", "7"), ("--train_group_size", "2")):
                flags[flags.index(flag) + 1] = value
            again = [*flags, "--resume_from_checkpoint", f"{output}/checkpoint-7"]
            runs += [flags, again]
        program = f"""
import finetune, shutil
for number, flags in enumerate({runs!r}):
    finetune.main(flags)
    if number % 2 == 0 and int(__import__("os").environ["RANK"]) == 0:
        output = flags[flags.index("--output_dir") + 1]
        shutil.copy(f"{{output}}/model.safetensors", f"{{output}}.whole.safetensors")
"""
        result = launch(program, tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        for name in ("mixed", "one_file"):
            # One that forgot its epoch would go on with the rows of another.
            resumed = load_file(tmp_path / f"{name}_{processes}" / "model.safetensors")
            whole = load_file(tmp_path / f"{name}_{processes}.whole.safetensors")
            assert all(torch.equal(resumed[key], whole[key]) for key in whole), (name, processes)
    start = load_file(model / "model.safetensors")
    one, two = (load_file(tmp_path / f"one_file_{n}" / "model.safetensors") for n in (1, 2))
    for key in one:
        moved = (one[key] - start[key]).norm()
        assert (one[key] - two[key]).norm() <= 1e-5 * moved + 1e-6, key


def test_two_processes_hold_out_what_one_does(data, tmp_path):
    model = make_tiny_bert(tmp_path / "bert", dropout=0.0)
    for processes in (1, 2):
        flags = training_flags(model, data, tmp_path / str(processes), processes, "--hold_out", "0.1")
        result = launch(f"import finetune\nfinetune.main({flags!r})", tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        verdict = json.loads((tmp_path / str(processes) / "training_summary.json").read_text())["verdict"]
        assert result.stdout == verdict["line"] + "\n"  # of one process
    for name in ("held_out.jsonl", "held_out_candidates.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    one, two = (json.loads((tmp_path / str(n) / "training_summary.json").read_text()) for n in (1, 2))
    assert (one["hold_out"]["queries"], one["rows"]) == (3, 27)
    for summary in (one, two):
        del summary["hold_out"]["metrics_after"]  # negatives of the other process are not seen
    for name in ("rows", "hold_out", "metrics_before"):
        assert one[name] == two[name]


def history(folder: Path) -> list[dict]:
    return json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]


def test_a_ragged_last_batch_neither_hangs_nor_stops_short(data, tmp_path):
    model = make_tiny_bert(tmp_path / "bert")
    flags = training_flags(model, data, tmp_path / "out", 2, "--negatives_cross_device", "True")
    flags[flags.index("--max_steps") : flags.index("--max_steps") + 2] = ["--num_train_epochs", "2"]
    result = launch(f"import finetune\nfinetune.main({flags!r})", tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert summary["steps"] == 2 * 4  # 30 rows in global batches of 8


GATHER = """
import torch, torch.distributed as dist
from embedding_finetune.distributed import gather_rows
dist.init_process_group("gloo")
rank = dist.get_rank()
rows = (torch.arange(6.).reshape(3, 2)[: 3 - 2 * rank] + 10 * rank).requires_grad_()  # 3 rows here, 1 there
ids = torch.tensor([rank] * len(rows))
(every, ids), start = gather_rows(rows, ids)
assert every.tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]], every
assert start == 3 * rank
weights = torch.arange(1., 5.)[:, None] * (rank + 1)
(every * weights).sum().backward()
expected = (torch.arange(1., 5.) * 3)[start : start + len(rows), None].expand(-1, 2)  # 1 + 2 over both processes
assert torch.equal(rows.grad, expected), rows.grad
assert ids.tolist() == [0, 0, 0, 1]
(every,), _ = gather_rows(rows)
owned = torch.ones(4, 2)
every.backward(owned)
assert torch.equal(owned, torch.ones(4, 2)), owned  # it is the caller's
print("ok")
dist.destroy_process_group()
"""


def test_gathered_rows_of_unequal_number_carry_the_gradients_of_every_process(tmp_path):
    result = launch(GATHER, tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ok") == 2


def test_a_failing_process_ends_the_run_with_its_own_error(data, tmp_path):
    model = make_tiny_bert(tmp_path / "bert")
    flags = training_flags(model, data, tmp_path / "out", 2)
    program = f"""
import os, finetune
from embedding_finetune.training.batches import TrainDataset
if os.environ["RANK"] == "1":
    def broken(self, key):
        raise OSError("the disk of rank 1 is gone")
    TrainDataset.__getitem__ = broken
finetune.main({flags!r})
"""
    result = launch(program, tmp_path, processes=2)
    assert result.returncode != 0
    assert "the disk of rank 1 is gone" in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


FAILS_OR_RETURNS = """
import atexit, os, sys, time
import torch.distributed as dist
from embedding_finetune import distributed
from embedding_finetune.command_line import UserError, command
backend, fails = sys.argv[1], sys.argv[2] == "fails"
atexit.register(lambda: os.write(1, b"exits") and time.sleep(fails and 300))  # something that waits for the others
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
dist.get_backend = lambda: backend
dist.destroy_process_group = lambda: os.write(1, b"destroyed ")
distributed._SECONDS_TO_EXIT = 1

@command
def main():
    distributed.leave_process_group_at_exit()
    if fails:
        raise UserError("the disk of this process is gone")

main()
"""


@pytest.mark.parametrize(
    ("backend", "ending", "told", "status"),
    [
        ("nccl", "returns", "destroyed exits", 0),
        ("nccl", "fails", "exits", -signal.SIGALRM),
        ("undefined", "fails", "exits", -signal.SIGALRM),
        ("gloo", "returns", "destroyed exits", 0),
    ],
)
def test_under_nccl_a_failed_process_does_not_wait_for_the_others_at_its_exit(backend, ending, told, status, tmp_path):
    """The others wait for it: destroying the process group together would hang the run."""
    result = run_alone(FAILS_OR_RETURNS, tmp_path, backend, ending)
    assert (result.stdout, result.returncode) == (told, status), result.stderr
    assert ("the disk of this process is gone" in result.stderr) == (ending == "fails")


READ_ROWS = """
import os, sys, hashlib, tempfile
from pathlib import Path
import torch.distributed as dist
from embedding_finetune import command_line, distributed
from embedding_finetune.training import rows
write = rows._write_rows
rows._write_rows = lambda *arguments: tell("validates") and write(*arguments)

def tell(line):
    return os.write(1, f"{line}\\n".encode())  # at once: processes that print take turns within a line

@command_line.command
def main():
    distributed.join_process_group()
    loaded = rows.load_rows(sys.argv[1], max_rows_per_file=20, seed=3)
    files = list(Path(tempfile.gettempdir()).rglob("*.arrow"))
    dist.barrier()
    tell(f"{len(files)} files {len(loaded)} {hashlib.sha256(repr(loaded[:]).encode()).hexdigest()}")

main()
"""


def test_one_process_of_a_machine_validates_the_rows_and_all_map_the_same(data, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = launch(READ_ROWS, tmp_path, str(data), processes=2, TMPDIR=str(scratch))
    assert result.returncode == 0, result.stderr
    validated, first, second = sorted(result.stdout.splitlines(), reverse=True)
    assert validated == "validates"
    assert first == second
    assert first.startswith("1 files 20 ")
    assert list(scratch.rglob("*.arrow")) == []
    assert list(scratch.glob("embedding_finetune_*")) == []


def test_bad_rows_end_all_processes_with_one_line(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"query": "a", "pos": ["p"]}, {"query": "b", "pos": []}])
    model = make_tiny_bert(tmp_path / "bert")
    program = f"""
import os, finetune
try:
    finetune.main({training_flags(model, data, tmp_path / "out", 2)!r})
except SystemExit as stop:
    open(f"{tmp_path}/status_" + os.environ["RANK"], "w").write(str(stop.code))
"""
    result = launch(program, tmp_path, processes=2)
    assert [(tmp_path / f"status_{rank}").read_text() for rank in range(2)] == ["2", "2"], result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "rows.jsonl:2:" in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


MINE_AND_EVALUATE = """
import sys, mine_hard_neg, evaluate
model, other, reranker, rows, judgements, folder, *pools = sys.argv[1:]
for number, pool in enumerate(pools):
    flags = ["--input_file", rows, "--candidate_pool", pool, "--range_for_sampling", "1-4", "--negative_number", "5"]
    mine_hard_neg.main(["--model_name_or_path", model, "--output_file", f"{folder}/{number}.jsonl", "--save_scores",
        "--near_duplicate_threshold", "0.996", *flags])
    mine_hard_neg.main(["--model_name_or_path", model, other, "--reranker_name_or_path", reranker, "--save_scores",
        "--output_file", f"{folder}/{number}.reranked.jsonl", "--doubts_file", f"{folder}/{number}.doubts.jsonl",
        *flags])
    evaluate.main(["--model_name", model, "--index_file_jsonl_path", pool, "--query_file_jsonl_path", rows,
        "--output_dir", f"{folder}/{number}", "--ignore_query_itself"])
    mine_hard_neg.main(["--model_name_or_path", model, "--output_file", f"{folder}/{number}.filtered.jsonl",
        "--absolute_margin", "0.001", "--keep_existing_negatives", "--judgements", judgements, *flags])
"""


@pytest.mark.slow
def test_mining_and_evaluating_give_the_same_whatever_the_number_of_processes(data, tmp_path):
    """Uneven shares, and corpora of fewer passages than there are processes."""
    models = make_tiny_bert(tmp_path / "bert"), make_tiny_bert(tmp_path / "other", seed=7)
    models = list(map(str, (*models, make_tiny_reranker(tmp_path / "reranker"))))
    pools = []
    for count in (10, 2, 1):
        texts = [{"text": passage_about(topic)} for topic in TOPICS[:count]]
        pools.append(str(write_jsonl(tmp_path / f"pool_{count}.jsonl", texts)))
    queries = [row["query"] for row in read_jsonl(data)]
    write_jsonl(Path(pools[0]), [*read_jsonl(Path(pools[0])), {"text": queries[0]}])  # at position 10
    lines = [{"query": queries[n], "passage": passage_about(TOPICS[9]), "relevant": n == 0} for n in range(2)]
    judgements = write_jsonl(tmp_path / "judgements.jsonl", lines)
    outcomes = []
    for processes in (1, 2, 3):
        folder = tmp_path / f"with_{processes}"
        folder.mkdir()
        result = launch(
            MINE_AND_EVALUATE, tmp_path, *models, str(data), str(judgements), str(folder), *pools, processes=processes
        )
        assert result.returncode == 0, result.stderr
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        metrics = [json.loads(files.pop(Path(f"{n}/metrics.json")))["metrics"] for n in range(len(pools))]
        outcomes.append((files, metrics, result.stdout))
    assert len(outcomes[0][0]) == 8 * len(pools)
    first_ranking = next(content for path, content in outcomes[0][0].items() if path.match("0/run.*"))
    assert b"01 Q0 10" in first_ranking
    assert b"00 Q0 10" not in first_ranking
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_killed_process_ends_the_run_with_an_error(data, tmp_path):
    model, out = make_tiny_bert(tmp_path / "bert"), tmp_path / "out"
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"text": passage_about(topic)} for topic in TOPICS])
    flags = ["--model_name_or_path", model, "--input_file", data, "--candidate_pool", pool, "--output_file", out]
    program = f"""
import os, signal, mine_hard_neg
from embedding_finetune.retrieval.encoder import Encoder
if os.environ["RANK"] == "1":
    Encoder.encode_passages = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
mine_hard_neg.main({list(map(str, flags))!r})
"""
    result = launch(program, tmp_path, processes=2)
    assert result.returncode != 0
    assert not out.exists()


TWO_BY_ACCELERATE = ("--multi_gpu", "--num_processes=2", "--main_process_port=0")  # of GPUs it needs none
BY_ANY_LAUNCHER = """
import sys, finetune, mine_hard_neg, evaluate
training, mining, evaluation = map(str.split, sys.argv[1:])
finetune.main(training)
mine_hard_neg.main(mining)
evaluate.main(evaluation)
"""


@pytest.mark.slow
def test_accelerate_launch_gives_the_bits_of_torchrun(data, tmp_path):
    model = make_tiny_bert(tmp_path / "bert")  # with dropout: each process draws its own
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"text": passage_about(topic)} for topic in TOPICS])
    outcomes = []
    for launcher in ("torch.distributed.run", "accelerate.commands.launch"):
        folder = tmp_path / launcher
        tuned = folder / "tuned"
        folder.mkdir()
        commands = (
            training_flags(model, data, tuned, 2, "--negatives_cross_device", "True"),
            f"--model_name_or_path {tuned} --input_file {data} --output_file {folder}/mined.jsonl".split(),
            f"--model_name {tuned} --index_file_jsonl_path {pool} --query_file_jsonl_path {data}".split(),
        )
        by = None if launcher == "torch.distributed.run" else (launcher, *TWO_BY_ACCELERATE)
        result = launch(BY_ANY_LAUNCHER, tmp_path, *map(" ".join, commands), processes=2, launcher=by)
        assert result.returncode == 0, result.stderr
        outcomes.append((result.stdout, (folder / "mined.jsonl").read_bytes(), (tuned / WEIGHTS).read_bytes()))
    assert outcomes[0] == outcomes[1]
    assert "MRR@10" in outcomes[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flags"),
    [(None, ["--fsdp", "full_shard"]), (("--use_fsdp", *TWO_BY_ACCELERATE[1:]), [])],
)
def test_sharded_training_is_refused_in_one_line_under_every_launcher(launcher, flags, data, tmp_path):
    model = make_tiny_bert(tmp_path / "bert")
    argv = training_flags(model, data, tmp_path / "out", 2, *flags)
    by = launcher and ("accelerate.commands.launch", *launcher)
    result = launch("import sys, finetune\nfinetune.main(sys.argv[1:])", tmp_path, *argv, processes=2, launcher=by)
    assert result.returncode != 0
    errors = {line for line in result.stderr.splitlines() if line.startswith("finetune.py: error:")}
    assert len(errors) == 1  # which every process says
    assert "not supported; torchrun alone" in errors.pop()
    assert "exitcode  : 2" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_process(monkeypatch):
    """A process that no launcher started, whose variables may be set."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK not set: start"),
        ({"WORLD_SIZE": "2"}, "RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set: start"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE two: must be a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0: must be a number"),
    ],
)
def test_processes_that_were_started_without_torchrun_are_told_what_is_missing(one_process, variables, told, tmp_path):
    """srun starts them, and knows nothing of these variables."""
    for name, value in variables.items():
        one_process.setenv(name, value)
    with pytest.raises(UserError, match=told):
        join_process_group()
    with pytest.raises(UserError, match=told):
        RetrieverTrainingArguments(output_dir=str(tmp_path))


def test_one_process_on_a_machine_of_several_gpus_names_torchrun(one_process, caplog):
    caplog.set_level("INFO")
    join_process_group()
    one_process.setattr(torch.cuda, "is_available", lambda: True)
    one_process.setattr(torch.cuda, "device_count", lambda: 1)
    join_process_group()
    assert caplog.messages == []
    one_process.setattr(torch.cuda, "device_count", lambda: 8)
    join_process_group()
    assert len(caplog.messages) == 1
    assert "one of 8 GPUs encodes; started with torchrun --nproc-per-node 8" in caplog.messages[0]


def test_accelerate_launch_on_a_cpu_is_told_that_it_starts_one_process(one_process, caplog):
    one_process.setenv("ACCELERATE_USE_CPU", "True")
    join_process_group()
    assert caplog.messages == []  # one process was asked for
    one_process.setenv("MASTER_PORT", "29500")
    join_process_group()
    assert "accelerate launch --cpu has started one process; torchrun" in caplog.messages[0]
    one_process.setenv("OMPI_COMM_WORLD_SIZE", "2")
    join_process_group()
    assert len(caplog.messages) == 1


def test_one_process_gathers_nothing():
    rows = torch.ones(2, 3)
    assert gather_rows(rows, rows) == ((rows, rows), 0)
    assert gather_objects("x") == ["x"]
    assert own_share(7) == slice(0, 7)
