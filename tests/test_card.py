"""The card of a checkpoint: metadata as the hub reads it, usage that runs, and nothing that is the user's own."""

import json
import re

import pytest
from helpers.data import read_jsonl
from helpers.tiny import make_tiny_bert
from helpers.training import train, write_rows
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from sentence_transformers import SentenceTransformer

import evaluate
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.model.card import CardFacts, Measured, base_names, card_text, is_own_card, write_card
from embedding_finetune.model.checkpoint import EmbeddingConfig

FACTS = CardFacts(
    config=EmbeddingConfig(query_instruction="find: "),
    dimensions=8,
    rows=12,
    losses=["MultipleNegativesRankingLoss"],
    settings={"seed": 42, "matryoshka_dims": [4, 2], "query_instruction_for_retrieval": "a\n```b"},
    versions={"torch": "1.0"},
    base=["BAAI/bge-base-en-v1.5"],
    revision="v1",
)
MEASURED = Measured("questions about cats", 3, {"MRR@10": 0.25}, {"MRR@10": 0.5}, "better")


def python_in(card):
    (program,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return program


@pytest.fixture(scope="module")
def tuned(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    flags = ["--hold_out", 3, "--query_instruction_for_retrieval", "find: ", "--lora_rank", 2]
    return train(tiny_bert, write_rows(folder), folder / "tuned", *flags)


def test_the_metadata_is_what_the_hub_reads():
    data = ModelCard(card_text(CardFacts(**{**vars(FACTS), "measured": MEASURED, "repository": "me/tuned"}))).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert data.base_model == "BAAI/bge-base-en-v1.5"  # without the revision
    assert {"dataset_size:12", "loss:MultipleNegativesRankingLoss", "sentence-transformers"} <= set(data.tags)
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "tuned"
    assert {result.metric_type: result.metric_value for result in results} == {
        "mrr@10": 0.5,
        "mrr@10_before_training": 0.25,
    }
    assert {(result.task_type, result.dataset_name) for result in results} == {
        ("information-retrieval", "3 questions about cats")
    }


def test_without_a_base_and_measures_the_card_says_none():
    card = ModelCard(card_text(CardFacts(**{**vars(FACTS), "base": [], "revision": None})))
    assert "base_model" not in card.data.to_dict()
    assert "model-index" not in card.data.to_dict()
    assert "## Measured" not in card.text


def test_a_setting_is_one_line_whatever_its_value():
    lines = card_text(FACTS).splitlines()
    assert r'--query_instruction_for_retrieval "a\n```b"' in lines
    assert "--matryoshka_dims 4 2" in lines
    assert lines.count("```") + sum(line.startswith("```") and line != "```" for line in lines) == 8


def test_one_question_is_no_questions():
    assert Measured("questions about cats", 1, None, {}).described == "1 question about cats"


def test_a_run_leaves_a_card_with_its_measures_and_its_checkpoints_one_without(tuned):
    summary = json.loads((tuned / "training_summary.json").read_text())
    card = ModelCard.load(tuned / "README.md")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    expected = {name: round(value, 4) for name, value in summary["metrics_after"].items()}
    expected |= {f"{name} before training": round(value, 4) for name, value in summary["metrics_before"].items()}
    assert found == expected
    assert f"Beside the model before training: {summary['verdict']['outcome']}." in card.text
    assert "Rows: 7. Steps: 4." in card.text
    earlier = ModelCard.load(tuned / "checkpoint-2" / "README.md")
    assert earlier.data.eval_results is None
    assert "Rows: 7. Steps: 2." in earlier.text


def test_the_usage_in_the_card_runs(tuned, monkeypatch, capsys, tmp_path):
    rows = read_jsonl(tuned.parent / "rows.jsonl")
    monkeypatch.chdir(tuned)
    card = ModelCard.load("README.md")
    names = {}
    exec(compile(python_in(card), "README.md", "exec"), names)
    assert names["queries"].shape == (1, 32)
    assert names["passages"].shape == (2, 32)
    (commands,) = re.findall(r"```bash\n(.*?)```", card.text, re.DOTALL)
    files = {
        "queries.jsonl": rows,
        "pairs.jsonl": rows,
        "passages.jsonl": [{"text": text} for row in rows for text in (*row["pos"], *row["neg"])],
    }
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for command in commands.splitlines():
        _, script, *argv = command.split()
        argv = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in argv]
        argv += ["--range_for_sampling", "0-5"] if script == "mine_hard_neg.py" else []
        {"evaluate.py": evaluate, "mine_hard_neg.py": mine_hard_neg}[script].main(argv)
    assert (tmp_path / "mined.jsonl").exists()


def test_sentence_transformers_loads_a_folder_with_the_card_and_saves_it_again(tuned, tmp_path):
    model = SentenceTransformer(str(tuned), device="cpu")
    assert model.prompts["query"] == "find: "
    model.save(str(tmp_path / "again"))
    assert ModelCard.load(tmp_path / "again" / "README.md").data.library_name == "sentence-transformers"


def test_the_usage_of_an_adapter_alone_runs(tiny_bert, tmp_path, monkeypatch):
    folder = train(tiny_bert, write_rows(tmp_path), tmp_path / "only", "--lora_rank", 2, "--save_adapter_only", "True")
    card = ModelCard.load(folder / "README.md")
    assert "install `peft` too" in card.text
    monkeypatch.chdir(folder)
    names = {}
    exec(python_in(card), names)
    assert names["passages"].shape == (2, 32)


def test_the_card_holds_no_text_of_the_data_and_no_path(tuned, tiny_bert):
    texts = [text for row in read_jsonl(tuned.parent / "rows.jsonl") for text in (row["query"], *row["pos"])]
    for path in tuned.rglob("README.md"):
        text = path.read_text()
        assert not any(secret in text for secret in (*texts, str(tuned.parent), str(tiny_bert), "rows.jsonl"))


def test_identical_runs_have_identical_cards(tiny_bert, tmp_path):
    rows = write_rows(tmp_path)
    cards = [(train(tiny_bert, rows, tmp_path / name) / "README.md").read_bytes() for name in ("one", "two")]
    assert cards[0] == cards[1]


def test_a_card_that_was_changed_is_the_users(tmp_path):
    write_card(tmp_path, FACTS)
    card = tmp_path / "README.md"
    assert is_own_card(card)
    for changed in (card.read_text().replace("12 rows", "13 rows"), card.read_text() + "\nMore.\n", "# Mine\n", ""):
        card.write_text(changed)
        assert not is_own_card(card)
    card.write_bytes(b"\xff\xfe")
    assert not is_own_card(card)


@pytest.mark.parametrize("place", ["README.md", "merged/README.md"])
def test_a_card_of_the_users_is_not_replaced_and_one_of_an_earlier_run_is(tiny_bert, tmp_path, capsys, place):
    rows = write_rows(tmp_path)
    folder = train(tiny_bert, rows, tmp_path / "tuned", "--merge_with_base", 0.5)
    first = (folder / "README.md").read_bytes()
    again = ["--overwrite_output_dir", "True", "--seed", 3]
    assert not (train(tiny_bert, rows, folder, *again) / "merged").exists()
    assert (folder / "README.md").read_bytes() != first
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text("# Mine\n")
    with pytest.raises(SystemExit) as stop:
        train(tiny_bert, rows, folder, *again)
    assert stop.value.code == 2
    assert f"{folder / place} is no card" in capsys.readouterr().err
    assert (folder / place).read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nbase_model: BAAI/bge-m3\n---\n", {"_name_or_path": "other/model"}, ["BAAI/bge-m3"]),
        ("---\nbase_model:\n- BAAI/bge-m3\n- other/model\n---\n", {}, ["BAAI/bge-m3", "other/model"]),
        ("---\nbase_model: /data/secret\n---\n", {"_name_or_path": "other/model"}, ["other/model"]),
        ("no metadata", {"_name_or_path": "/root/.cache/torch/other_model/"}, []),
        ("---\nbase_model: [unclosed\n---\n", {"_name_or_path": "./model"}, []),
        ("---\n- a list\n---\n", {"_name_or_path": "../model"}, []),
        ("---\nbase_model: {a: b}\n---\n", {"_name_or_path": "outputs/customer"}, []),
        ("---\nbase_model: []\n---\n", {"_name_or_path": "customer"}, []),
        (None, {"_name_or_path": "folder/customer"}, []),
        (None, {"_name_or_path": 5}, []),
        (None, [], []),
        (None, None, []),
    ],
)
def test_the_base_of_a_folder_is_what_its_card_or_config_names_and_never_a_path(
    tmp_path, monkeypatch, card, config, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "customer").mkdir(parents=True)
    if card is not None:
        (tmp_path / "folder" / "README.md").write_text(card)
    if config is not None:
        (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    assert base_names("folder") == expected


def test_the_base_of_the_hub_is_its_name_without_the_revision():
    assert base_names("BAAI/bge-m3@v1") == ["BAAI/bge-m3"]
    assert base_names("bert-base-uncased") == ["bert-base-uncased"]


def test_a_tuned_model_of_a_tuned_model_names_the_first_base(tmp_path):
    base = make_tiny_bert(tmp_path / "base")
    write_card(base, FACTS)
    folder = train(base, write_rows(tmp_path), tmp_path / "tuned")
    assert ModelCard.load(folder / "README.md").data.base_model == "BAAI/bge-base-en-v1.5"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_card(tmp_path / "nowhere", FACTS)
