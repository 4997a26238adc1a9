"""What the README tells people to type parses, and the flags it lists are those that exist."""

import re
import shlex
from dataclasses import fields

import pytest
from conftest import REPOSITORY
from transformers import TrainingArguments

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.data import jsonl
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [re.sub(r"^torchrun --\S+ \d+ ", "python ", block.replace("\\\n", " ")) for block in BLOCKS]
MADE = {name for command in COMMANDS for name in re.findall(r"--output_file (\S+)", command)}
SCRIPTS = {"mine_hard_neg.py": mine_hard_neg, "finetune.py": finetune, "evaluate.py": evaluate}


def help_of(script, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_every_command_of_the_readme_parses(command, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    _, script, *argv = shlex.split(command)
    check = jsonl.require_file
    monkeypatch.setattr(jsonl, "require_file", lambda flag, path, **how: path in MADE or check(flag, path, **how))
    monkeypatch.setattr(jsonl, "require_writable", lambda *_: None)
    monkeypatch.setattr("embedding_finetune.training.run_folder.check_output_dir", lambda *_: None)
    assert SCRIPTS[script].parse_arguments(argv)


def test_every_other_command_of_the_readme_names_files_that_exist():
    others = [c for c in COMMANDS if not c.startswith("python ")]
    files = [word for command in others for word in command.split() if word.endswith(".txt")]
    assert files == ["requirements_cpu.txt", "requirements_cuda.txt"]
    assert all((REPOSITORY / name).exists() for name in files)


def test_every_flag_the_readme_lists_exists_and_every_own_flag_is_listed(capsys):
    sections = dict(zip(["mine_hard_neg.py", "evaluate.py", "both", "finetune.py"], flag_tables(), strict=True))
    for script in ("mine_hard_neg.py", "evaluate.py"):
        listed = sections[script] | sections["both"]
        assert listed == set(re.findall(r"^  (--\w+)", help_of(script, capsys), flags=re.MULTILINE))
    assert sections["finetune.py"] <= set(re.findall(r"(--\w+)", help_of("finetune.py", capsys)))
    own = {field.name for kind in (ModelArguments, DataArguments, RetrieverTrainingArguments) for field in fields(kind)}
    own -= {field.name for field in fields(TrainingArguments)}
    assert sections["finetune.py"] >= {f"--{name}" for name in own}


def test_the_defaults_the_readme_gives_are_those_of_the_parsers(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    required = ["--model_name_or_path", "m", "--input_file", "example.jsonl", "--output_file", "o"]
    mine = mine_hard_neg.parse_arguments(required)
    assert f"| `--range_for_sampling` | {'-'.join(map(str, mine.range_for_sampling))} |" in README
    for flag in ("negative_number", "seed", "dtype", "torch_compile", "use_gpu_for_searching", "trust_remote_code"):
        assert f"| `--{flag}` | {getattr(mine, flag)} |" in README
    required = ["--model_name_or_path", "m", "--train_data", "example.jsonl", "--output_dir", "no_such_folder"]
    _, data, training = finetune.parse_arguments(required)
    assert f"| `--query_max_len`, `--passage_max_len` | {data.query_max_len}, {data.passage_max_len} |" in README
    assert f"| `--train_group_size` | {data.train_group_size} |" in README
    for flag in ("temperature", "use_inbatch_neg", "mask_known_positives", "fix_position_embedding"):
        assert f"| `--{flag}` | {getattr(training, flag)} |" in README


def flag_tables() -> list[set[str]]:
    """The flags in the first column of each table of the README's section on flags."""
    section = README.split("## Flags")[1].split("## Checkpoints")[0]
    tables = re.split(r"\*\*.*?\*\*", section)[1:]
    return [set(re.findall(r"`(--\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", t, re.MULTILINE)))) for t in tables]
