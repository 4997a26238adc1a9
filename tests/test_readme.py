"""What the documents tell people to type parses, their links lead somewhere, and the flags they list are all there."""

import csv
import json
import os
import re
import shlex
import subprocess
import time
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
from helpers.data import REPOSITORY, TOPICS, passage_about
from transformers import TrainingArguments

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune import files
from embedding_finetune.data import records
from embedding_finetune.mining.arguments import CHOICE_FLAGS
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
"""What users read; their commands are held here."""
DOCUMENTS = [
    *PAGES,
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "benchmarks" / "README.md",
    REPOSITORY / "CHANGELOG.md",
]
SCRIPTS = {"mine_hard_neg.py": mine_hard_neg, "finetune.py": finetune, "evaluate.py": evaluate}
LONGEST_README = 1500
"""Words, as `wc -w` counts them."""


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(path), flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def indented_commands(path: Path) -> list[str]:
    """The lines of indented blocks, continued ones joined, comments cut."""
    lines = re.findall(r"^    (?! )((?:.*\\\n)*.*)", text_of(path), flags=re.MULTILINE)
    return [line.replace("\\\n", " ").split(" #")[0] for line in lines]


def is_script(command: str) -> bool:
    return re.match(r"(torchrun .*?|python )(mine_hard_neg|finetune|evaluate)\.py ", command) is not None


def without_torchrun(command: str) -> str:
    return re.sub(r"^torchrun --\S+ \d+ ", "python ", command)


COMMANDS = [(path, block.replace("\\\n", " ").strip()) for path in PAGES for block in blocks(path)]
SCRIPT_COMMANDS = [(path, without_torchrun(command)) for path, command in COMMANDS if is_script(command)]
MADE = {name for _, command in SCRIPT_COMMANDS for name in re.findall(r"--(?:output|doubts)_file (\S+)", command)}
MADE |= {"scifact", "scifact/qrels/dev.tsv"}  # a BEIR folder; tests/test_beir.py runs these commands on one
MADE |= {"judgements.jsonl"}  # of the report
MADE |= {"pairs.csv", "pairs.parquet", "triplets.parquet"}  # of the reader, and of programs on docs/data.md
MADE |= {"tuned/held_out.jsonl", "tuned/held_out_candidates.jsonl"}
MADE |= {f"benchmarks/data/debian/{name}.jsonl.gz" for name in ("train", "test", "candidates", "pool")}


@pytest.fixture
def parse(monkeypatch):
    """A function that parses a command as its script does, in a folder where no earlier command has run."""
    monkeypatch.chdir(REPOSITORY)
    check = files.require_data
    monkeypatch.setattr(files, "require_data", lambda flag, path, **how: path in MADE or check(flag, path, **how))
    monkeypatch.setattr(files, "require_writable", lambda *_: None)
    monkeypatch.setattr("embedding_finetune.training.parser.check_output_dir", lambda *_: None)

    def parse(command: str) -> object:
        _, script, *argv = shlex.split(command)
        return SCRIPTS[script].parse_arguments(argv)

    return parse


@pytest.mark.parametrize(("path", "command"), SCRIPT_COMMANDS, ids=[f"{p.name}-{c}" for p, c in SCRIPT_COMMANDS])
def test_every_command_of_the_documents_parses(path, command, parse):
    assert parse(command)


def test_the_documents_have_commands_of_every_script_and_those_of_the_readme_are_three():
    readme = [command.split()[1] for path, command in SCRIPT_COMMANDS if path == README]
    assert readme == ["mine_hard_neg.py", "finetune.py", "evaluate.py"]
    assert {path.name for path, _ in SCRIPT_COMMANDS} >= {
        "differences.md", "evaluation.md", "mining.md", "recipes.md", "scaling.md"
    }  # fmt: skip


def test_the_commands_that_prune_a_store_remove_what_was_not_used_for_30_days_alone(tmp_path):
    (command,) = blocks(REPOSITORY / "docs" / "scaling.md", "sh")
    for name, days in (("old", 31), ("recent", 29)):
        folder = tmp_path / "embeddings" / name
        folder.mkdir(parents=True)
        for file in ("settings.json", "model.txt", "some.segment"):
            (folder / file).write_text(f"{name} model\n")
            os.utime(folder / file, (time.time() - 86400 * days,) * 2)
    result = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "embeddings/old/model.txt:old model\nembeddings/recent/model.txt:recent model\n" in result.stdout
    assert result.stdout.endswith("\nembeddings/old/settings.json\n")
    assert os.listdir(tmp_path / "embeddings") == ["recent"]


def test_every_other_command_of_the_documents_installs_what_is_there():
    others = [command for _, command in COMMANDS if not is_script(command)]
    assert others == [
        "python3 -m venv .venv && . .venv/bin/activate",
        "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu",
        "pip install -r requirements_cpu.txt",
        "pip install -r requirements_cuda.txt",
    ]
    for name in ("requirements_cpu.txt", "requirements_cuda.txt"):
        assert "torch==2.13.0" in text_of(REPOSITORY / name).splitlines()


def test_the_one_command_of_the_readme_trains_as_make_demo_does(parse):
    makefile = text_of(REPOSITORY / "Makefile").replace("\\\n", " ").replace("$(MODEL)", "model")
    rows = re.search(r"DEMO_ROWS := (--train_data example.*)", makefile)[1]
    demo = re.search(r"\$\(BIN\)/(python finetune.py.*)", makefile)[1].replace("$(DEMO_ROWS)", rows)
    [shown] = [command for command in indented_commands(README) if " finetune.py --recipe " in command]
    assert settings_of(parse(demo)) == settings_of(parse(shown))


def settings_of(parsed: object) -> dict:
    """Everything that decides what a run computes: not where it reads and writes, nor how often it logs and saves."""
    parts = parsed if isinstance(parsed, tuple) else [parsed]
    settings = {name: value for part in parts for name, value in vars(part).items()}
    places = {"model_name_or_path", "output_dir", "output_file", "train_data", "overwrite_output_dir", "logging_dir"}
    apart = {"logging_steps", "save_strategy", "run_name", "distributed_state"}
    return {name: str(value) for name, value in settings.items() if name not in places | apart and name[0] != "_"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_indented_commands_name_scripts_flags_and_targets_that_exist(path, parse, capsys):
    targets = re.findall(r"^([\w-]+):", text_of(REPOSITORY / "Makefile"), flags=re.MULTILINE)
    for command in indented_commands(path):
        if match := re.match(r"make ([\w-]+)", command):
            assert match[1] in targets
        elif is_script(command):
            assert parse(command)
        elif match := re.search(r"python (benchmarks/\w+\.py)(.*)", command):
            source = text_of(REPOSITORY / match[1]) + text_of(REPOSITORY / "benchmarks" / "common.py")
            for flag in re.findall(r"--\w+", re.sub(r'".*?"', "", match[2])):
                assert f'"{flag}"' in source, f"{match[1]} has no {flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_the_documents_leads_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(path)) + re.findall(r'src="([^"]+)"', text_of(path))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_the_repository_that_the_documents_name_exists(path):
    in_folders = r"\b(?:benchmarks|tests|docs|embedding_finetune)/[\w./]*\w\.(?:py|md|html|png)\b"
    data = r"(?<![/\w])\w+\.jsonl\b(?!\.gz)"
    made = {"pairs.jsonl", "per_query.jsonl", "corpus.jsonl", "queries.jsonl"} | MADE
    for name in set(re.findall(f"{in_folders}|{data}", text_of(path))) - made:
        assert (REPOSITORY / name).exists(), name


def test_every_page_is_linked_from_the_readme_which_is_short():
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in text_of(README)
    assert len(text_of(README).split()) <= LONGEST_README


def test_no_document_speaks_of_who_wanted_it_or_reads_a_folder_outside_the_repository():
    for path in DOCUMENTS:
        assert not re.search(r"\basked for\b|\(asked\b|\| asked\b|was lent|prototype|shared/data", text_of(path)), path


def test_the_commands_and_programs_about_data_run_on_small_files(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ("hall", "yard", "store")
    pairs = [(f"how do i reset the {t} of the {p}?", f"In the {p}: {passage_about(t)}") for t in TOPICS for p in places]
    with Path("pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=";").writerows([("question", "answer"), *pairs])
    hub = datasets.Dataset.from_dict(dict(zip(("question", "answer"), zip(*pairs))))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **how: load(name, **how) if "data_files" in how else hub)
    page = REPOSITORY / "docs" / "data.md"
    from_hub, to_triplets = blocks(page, "python")
    exec(compile(from_hub, "data.md", "exec"), {})
    # tests/test_beir.py runs those on a BEIR folder.
    commands = [command for path, command in SCRIPT_COMMANDS if path == page and "scifact" not in command]
    sample = (REPOSITORY / "augmented_example.jsonl").read_bytes().splitlines(keepends=True)
    Path("augmented_example.jsonl").write_bytes(b"".join(sample[:40]))
    # Training reads the triplets, which are made of mined rows further down the page; evaluation what it held out.
    stages = (" mine_hard_neg.py ", " finetune.py ", " evaluate.py ")
    for command in sorted(commands, key=lambda command: [stage in command for stage in stages].index(True)):
        _, script, *argv = shlex.split(command)
        if script == "finetune.py":
            exec(compile(to_triplets, "data.md", "exec"), {})
            argv += ["--max_steps", "2", "--overwrite_output_dir", "True"]
        # The tiny model takes at most 128 tokens.
        argv = ["128" if part == "256" else part for part in argv]
        SCRIPTS[script].main([str(tiny_bert) if "/all-MiniLM-L6-v2" in part else part for part in argv])
    mined = list(records.read_training_rows("mined.parquet"))
    assert [(row["query"], *row["pos"]) for row in mined] == pairs
    assert mined == list(records.read_training_rows("mined.jsonl"))
    triplets = list(records.read_training_rows("triplets.parquet"))
    expected = [(row["query"], pos, neg) for row in mined for pos in row["pos"] for neg in row["neg"]]
    assert [(row["query"], *row["pos"], *row["neg"]) for row in triplets] == expected
    assert len(expected) > len(pairs)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_other_block_of_the_documents_is_valid(path):
    for program in blocks(path, "python"):
        compile(program, path.name, "exec")
    for document in blocks(path, "json"):
        json.loads(document)
    assert set(re.findall(r"^```(\w+)$", text_of(path), flags=re.MULTILINE)) <= {"python", "json", "sh"}


def help_of(script, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(["--help"])
    return capsys.readouterr().out


def flag_rows(heading: str) -> list[tuple[list[str], str]]:
    """Flags and default of each row of the table under a heading of docs/flags.md."""
    section = text_of(REPOSITORY / "docs" / "flags.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]*`) \| ([^|]*) ?\|", section, flags=re.MULTILINE)
    assert rows
    return [(re.findall(r"`(--\w+)`", flags), default.strip()) for flags, default in rows]


def flags_under(heading: str) -> set[str]:
    return {flag for flags, _ in flag_rows(heading) for flag in flags}


@pytest.mark.parametrize("script", ["mine_hard_neg.py", "evaluate.py"])
def test_the_flags_of_mine_and_evaluate_that_are_listed_are_those_there_are(script, capsys):
    listed = flags_under(script) | flags_under("Both of these")
    assert listed == set(re.findall(r"^  (--\w+)", help_of(script, capsys), flags=re.MULTILINE))


def test_every_flag_of_finetune_that_is_listed_exists_and_every_own_one_is_listed(capsys):
    listed = flags_under("finetune.py")
    assert listed <= set(re.findall(r"(--\w+)", help_of("finetune.py", capsys)))
    kinds = (ModelArguments, DataArguments, RetrieverTrainingArguments)
    own = {*(field.name for kind in kinds for field in fields(kind) if field.init), *CHOICE_FLAGS}
    own -= {field.name for field in fields(TrainingArguments)}
    assert listed >= {f"--{name}" for name in own}


def test_every_flag_that_the_documents_mention_exists(capsys):
    known = {flag for script in SCRIPTS for flag in re.findall(r"--\w+", help_of(script, capsys))}
    known |= {"--nproc", "--nnodes", "--index", "--help"}  # of torchrun, pip; of all
    known |= {"--mixed_precision", "--multi_gpu", "--num_processes"}  # of accelerate
    for path in PAGES:
        assert set(re.findall(r"(?<![\w-])--[a-z]\w*", text_of(path))) - known <= benchmark_flags(path), path.name


def benchmark_flags(path: Path) -> set[str]:
    """The flags of benchmarks in a page's indented commands, which another test looks at."""
    return {flag for line in indented_commands(path) if "benchmarks/" in line for flag in re.findall(r"--\w+", line)}


def test_the_defaults_that_are_listed_are_those_of_the_parsers(parse):
    mine = parse("python mine_hard_neg.py --model_name_or_path m --input_file example.jsonl --output_file mined.jsonl")
    queries = "--index_file_jsonl_path candidate_context.jsonl --query_file_jsonl_path example.jsonl"
    evaluation = parse(f"python evaluate.py --model_name m {queries}")
    training = parse("python finetune.py --model_name_or_path m --train_data example.jsonl --output_dir no_such_folder")
    flags = {name: value for part in training for name, value in vars(part).items()}
    finetuning = Namespace(**vars(flags["selection"]) | flags)
    checked = 0
    for heading, args in (
        ("mine_hard_neg.py", mine), ("evaluate.py", evaluation), ("Both of these", mine),
        ("Both of these", evaluation), ("finetune.py", finetuning),
    ):  # fmt: skip
        for flags, listed in flag_rows(heading):
            defaults = [getattr(args, flag[2:]) for flag in flags]
            for flag, default, shown in zip(flags, defaults, listed.split(", ") * len(flags)):
                assert agrees(default, shown), f"{heading} {flag}: {shown!r} is listed, {default!r} is the default"
                checked += 1
    assert checked > 80


def agrees(default: object, listed: str) -> bool:
    """Whether a default is what a table says: the value itself, or words (or nothing) for one that depends."""
    if listed == "required":
        return True
    if isinstance(default, tuple):
        return listed == "-".join(map(str, default))
    if isinstance(default, list):
        return listed == " ".join(map(str, default))
    if default is None:
        return not re.fullmatch(r"[\d.-]+|True|False", listed)
    return listed == str(default)
