"""What transformers reads of a folder: weights of all kinds, and a model's own code."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import published as models
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.running import embed_passages, encoder_for
from safetensors.torch import load_file
from transformers import AutoModel

import finetune
from embedding_finetune.command_line import UserError
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.pretrained import check_models_are_there, weights_digest

TEXTS = ["how do i reset the pump?", "who", "My motor is red. " * 30]


def embed(folder, *flags):
    return embed_passages(encoder_for(folder, *flags), TEXTS)


def pickle_weights(folder, *, weights="model.safetensors", pickled="pytorch_model.bin"):
    """Replace safetensors by the pickle that older versions of transformers wrote."""
    torch.save(load_file(folder / weights), folder / pickled)
    (folder / weights).unlink()


def test_weights_that_are_a_pickle_embed_as_those_that_are_not_and_a_line_says_so(tmp_path, caplog):
    folder = models.make("gte-base", tmp_path / "pickled")
    expected = embed(folder)
    pickle_weights(folder)
    with caplog.at_level("INFO"):
        assert np.array_equal(embed(folder), expected)
    line = f"{folder / 'pytorch_model.bin'}: its weights are a pickle; it is read as weights alone, and runs no code"
    assert line in caplog.text


def test_pickles_in_several_files_and_in_the_transformers_own_folder_are_read(tmp_path):
    folder = models.make("gte-base", tmp_path / "old")
    expected, own = embed(folder), folder / "0_Transformer"
    own.mkdir()
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = own.name
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in [*folder.glob("*token*"), folder / "config.json", folder / "sentence_bert_config.json"]:
        if path.exists():
            path.rename(own / path.name)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, own / "pytorch_model.bin")
    assert np.array_equal(embed(folder), expected)
    (own / "pytorch_model.bin").unlink()
    names = sorted(weights)
    files = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, own / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (own / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert np.array_equal(embed(folder), expected)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_a_pickle_that_would_run_code_is_refused_in_one_line_and_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "it was run"))
    folder = models.make("gte-base", tmp_path / "evil")
    torch.save({"weights": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--model .*evil: its weights are a pickle that asks for more than weights"):
        load_backbone(str(folder), flag="--model")
    assert not (tmp_path / "it was run").exists()


def test_what_was_tuned_from_a_pickle_is_saved_as_safetensors(tmp_path):
    folder, tuned = models.make("gte-base", tmp_path / "pickled"), tmp_path / "tuned"
    pickle_weights(folder)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"query": f"q {n}", "pos": [f"p {n}"]} for n in range(4)])
    argv = f"--model_name_or_path {folder} --train_data {rows} --output_dir {tuned} --max_steps 1"
    finetune.main([*argv.split(), "--per_device_train_batch_size", "4", "--train_group_size", "1"])
    assert (tuned / "model.safetensors").exists()
    assert not list(tuned.glob("*.bin"))


def test_weights_stored_in_bfloat16_are_trained_in_float32(tmp_path):
    folder = models.make("gte-base", tmp_path / "half")
    AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    assert '"bfloat16"' in (folder / "config.json").read_text()
    backbone, _, _ = load_backbone(str(folder), flag="--model")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_a_models_own_code_runs_only_when_asked_for_and_comes_with_the_tuned_model(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, tuned = models.make("gte-base", tmp_path / "base"), tmp_path / "tuned"
    (folder / "own.py").write_text(
        "from transformers import BertConfig, BertModel\n\n\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--model .*base: the model comes with code of its own; .*--trust_remote_code"):
        load_backbone(str(folder), flag="--model")

    pairs = [{"query": f"{topic}?", "pos": [passage_about(topic)]} for topic in TOPICS]
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs)
    argv = f"--model_name_or_path {folder} --train_data {rows} --output_dir {tuned} --trust_remote_code True".split()
    finetune.main([*argv, "--max_steps", "2", "--per_device_train_batch_size", "5", "--train_group_size", "1"])
    before, after = (embed(model, "--trust_remote_code") for model in (folder, tuned))
    assert not np.array_equal(before, after)
    with pytest.raises(UserError, match="trust_remote_code"):
        load_backbone(str(tuned), flag="--model")


def test_a_name_that_is_neither_a_models_folder_nor_on_the_hub_is_refused_with_its_flag(tiny_bert, tmp_path):
    check_models_are_there([str(tiny_bert)], flag="--model")
    with pytest.raises(UserError, match=f"--model {tmp_path}: there is no such model with config.json"):
        check_models_are_there([str(tiny_bert), str(tmp_path)], flag="--model")


def test_the_digest_of_weights_is_that_of_names_shapes_dtypes_and_bits():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other) != weights_digest(torch.nn.Sequential(one))
    assert weights_digest(one) != weights_digest(one.to(torch.bfloat16))
    with torch.no_grad():
        other.weight[0, 0] = torch.nextafter(other.weight[0, 0], torch.tensor(torch.inf))
    assert weights_digest(one.to(torch.float32)) != weights_digest(other)
