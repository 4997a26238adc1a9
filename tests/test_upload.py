"""--push_to_hub against a stand-in for the hub: what is uploaded, when, and what is left when it fails."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.data import REPOSITORY, read_jsonl, write_jsonl
from helpers.hub import put_into_cache, running_hub
from helpers.training import TEXTS, embeddings, train, write_rows
from huggingface_hub import ModelCard, constants
from sentence_transformers import SentenceTransformer

from embedding_finetune.training.upload import files_to_upload

OFFLINE = "--push_to_hub True: HF_HUB_OFFLINE is set"
MODEL = {
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_queries.npy",
}
BEFORE_TRAINING = ["GET /api/whoami-v2", "POST /api/repos/create"]
UPLOAD = [
    "GET /api/models/me/tuned/tree/main",
    "POST /api/validate-yaml",
    "POST /api/models/me/tuned/preupload/main",
    "POST /api/models/me/tuned/commit/main",
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # an earlier test may have set its endpoint
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def push(model, tmp_path, *flags, name="tuned"):
    rows = tmp_path / "rows.jsonl"
    return train(model, rows if rows.exists() else write_rows(tmp_path), tmp_path / name, "--push_to_hub", *flags)


def refused(run, capsys, status=2):
    """The one line of a run that ends with this status."""
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


def test_the_finished_models_files_alone_are_uploaded_in_one_commit_at_the_end(hub, tiny_bert, tmp_path):
    folder = push(tiny_bert, tmp_path, "--hold_out", 3, "--merge_with_base", 0.5, "--save_only_model", "True")
    assert hub.calls == BEFORE_TRAINING + UPLOAD
    assert hub.commits == 1
    assert {path.name for path in folder.iterdir()} >= {"checkpoint-2", "held_out.jsonl", "merged", "training_run.json"}
    assert hub.files.keys() == MODEL | {".gitattributes"}
    assert all(hub.files[name] == (folder / name).read_bytes() for name in MODEL)
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.model_name == "tuned"
    assert 'SentenceTransformer("me/tuned")' in card.text


def test_no_uploaded_file_holds_a_path_a_text_or_the_token(hub, tiny_bert, tmp_path):
    base = tmp_path / "base"
    SentenceTransformer(str(tiny_bert), device="cpu").save(str(base))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": f"{tmp_path}/secret"}))
    folder = push(base, tmp_path, "--hold_out", 3, "--lora_rank", 2, "--columns", "query=query")
    assert str(tmp_path) in (folder / "adapter/adapter_config.json").read_text()
    texts = [text for row in read_jsonl(tmp_path / "rows.jsonl") for text in (row["query"], *row["pos"], *row["neg"])]
    everything = b"\n".join(content for name, content in hub.files.items())
    for secret in (str(tmp_path), "hf_secret", "rows.jsonl", *texts):
        assert secret.encode() not in everything, secret


def test_the_uploaded_model_loads_as_the_folder_does(hub, tiny_bert, tmp_path):
    folder = push(tiny_bert, tmp_path)
    for name, content in hub.files.items():
        (tmp_path / "from_hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from_hub" / name).write_bytes(content)
    assert (embeddings(tmp_path / "from_hub") == embeddings(folder)).all()
    assert SentenceTransformer(str(tmp_path / "from_hub"), device="cpu").encode_query(TEXTS).shape == (3, 32)


def test_name_owner_and_branch_are_those_of_the_flags(hub, tiny_bert, tmp_path):
    push(tiny_bert, tmp_path, "--hub_model_id", "team/desk", "--hub_private_repo", "True", "--hub_revision", "v2")
    asked = json.loads(hub.bodies["/api/repos/create"])
    assert (asked["organization"], asked["name"], asked["visibility"]) == ("team", "desk", "private")
    assert "POST /api/models/team/desk/branch/v2" in hub.calls
    assert hub.calls[-1] == "POST /api/models/team/desk/commit/v2"


def test_files_of_an_earlier_model_go_and_those_of_the_owner_stay(hub, tiny_bert, tmp_path):
    old = {"adapter_config.json": b"{}", "2_Dense/model.safetensors": b"", "model-00001-of-00002.safetensors": b""}
    kept = {"notes.md": b"mine", "onnx/config.json": b"{}", "training.py": b""}
    hub.files |= old | kept
    push(tiny_bert, tmp_path)
    assert hub.files.keys() == MODEL | kept.keys() | {".gitattributes"}


@pytest.mark.parametrize("step", ["validate-yaml", "tree", "preupload", "commit"])
def test_a_failing_upload_leaves_the_model_and_says_how_to_upload_later(hub, tiny_bert, tmp_path, capsys, step):
    hub.fails = step
    line = refused(lambda: push(tiny_bert, tmp_path, "--hold_out", 3), capsys, status=1)
    folder = tmp_path / "tuned"
    assert hub.commits == 0
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} >= MODEL | {"training_summary.json"}
    assert embeddings(folder).shape == (3, 32)
    assert ModelCard.load(folder / "README.md").data.eval_results
    command = shlex.split(line.partition("to upload it later: ")[2])
    assert command[:5] == ["hf", "upload", "me/tuned", str(folder), "."]


def test_the_command_that_is_told_uploads_the_same_files(hub, tiny_bert, tmp_path, capsys):
    hub.fails = "commit"
    line = refused(lambda: push(tiny_bert, tmp_path, "--hold_out", 3), capsys, status=1)
    hub.fails = None
    program, *words = shlex.split(line.partition("to upload it later: ")[2])
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [str(Path(sys.executable).parent / program), *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert hub.files.keys() == MODEL | {".gitattributes"}


@pytest.mark.parametrize("why", ["offline", "no token", "no network", "bad token", "no right", "bad name"])
def test_what_could_not_be_uploaded_is_refused_before_training(hub, tiny_bert, tmp_path, monkeypatch, capsys, why):
    flags, said = [], "--push_to_hub True: "
    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        said = OFFLINE
    elif why == "no token":
        monkeypatch.delenv("HF_TOKEN")
        said += "there is no token"
    elif why == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        said += "the hub cannot be asked"
    elif why == "bad token":
        hub.fails = "whoami"
        said += "the hub cannot be asked"
    elif why == "no right":
        hub.fails = "repos/create"
        said += "me/tuned cannot be made on the hub"
    else:
        flags, said = ["--hub_model_id", "me/../tuned"], "--hub_model_id me/../tuned"
    line = refused(lambda: push(tiny_bert, tmp_path, *flags), capsys)
    assert f"error: {said}" in line
    assert "hf_secret" not in line
    assert list(tmp_path.glob("tuned/*")) == []
    asked = [call for call in hub.calls if call != "GET /api/models/me/tuned"]  # whether it is there, all the same
    assert asked == {"bad token": BEFORE_TRAINING[:1], "no right": BEFORE_TRAINING}.get(why, [])


def test_bad_rows_leave_no_empty_repository(hub, tiny_bert, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "", "pos": ["x"]}])
    assert "rows.jsonl:1" in refused(lambda: push(tiny_bert, tmp_path), capsys)
    assert hub.calls == BEFORE_TRAINING[:1]


def test_an_adapter_alone_is_uploaded_without_a_path_and_not_where_its_base_is_a_folder(
    hub, tiny_bert, tmp_path, monkeypatch, capsys
):
    flags = ["--lora_rank", 2, "--save_adapter_only", "True"]
    assert "leave out --save_adapter_only" in refused(lambda: push(tiny_bert, tmp_path, *flags), capsys)
    assert hub.calls == []
    commit, cache = "0" * 40, str(tmp_path / "cache")
    put_into_cache(tmp_path / "cache", "me/base", {commit: (tiny_bert, "v1")})
    folder = push(f"me/base@{commit}", tmp_path, *flags, "--cache_dir", cache)
    assert hub.files.keys() >= {"adapter_config.json", "adapter_base.json", "adapter_model.safetensors", "README.md"}
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())
    assert json.loads(hub.files["adapter_base.json"])["name"] == f"me/base@{commit}"
    config = json.loads(hub.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", commit)
    assert embeddings(folder, "--cache_dir", cache).shape == (3, 32)


def test_a_token_on_the_command_line_is_refused_and_not_repeated(hub, tiny_bert, tmp_path, capsys):
    line = refused(lambda: push(tiny_bert, tmp_path, "--hub_token", "hf_other"), capsys)
    assert "--hub_token" in line
    assert "HF_TOKEN" in line
    assert "hf_other" not in line


def test_a_model_with_code_of_its_own_takes_it_along():
    written = [
        "modeling.py",
        "config.json",
        "adapter/adapter_config.json",
        "training_run.json",
        "1_Pooling/config.json",
    ]
    assert files_to_upload(written) == ["1_Pooling/config.json", "config.json", "modeling.py"]
    routes = ["router_config.json", "query_0_Transformer/model.safetensors", "document_1_Pooling/config.json"]
    assert files_to_upload(routes) == sorted(routes)


@pytest.mark.slow
def test_of_several_processes_one_uploads_and_all_end_as_it_did(tiny_bert, tmp_path):
    rows = write_rows(tmp_path)
    argv = f"--model_name_or_path {tiny_bert} --train_data {rows} --output_dir {tmp_path}/tuned --max_steps 2"
    argv += " --per_device_train_batch_size 2 --train_group_size 2 --learning_rate 1e-2 --push_to_hub True"
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "finetune.py"]
    for fails, status in ((None, 0), ("commit", 1)):
        with running_hub() as hub:
            hub.fails = fails
            environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
            result = subprocess.run(
                [sys.executable, *program, *argv.split(), "--overwrite_output_dir", "True"],
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert result.returncode == status, result.stderr
            assert hub.calls == BEFORE_TRAINING + UPLOAD
            assert hub.commits == (fails is None)
