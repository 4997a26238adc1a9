"""Low-rank adapters, and weights mixed with those of the base."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.data import read_jsonl, write_jsonl
from helpers.running import encoding_arguments
from helpers.tokenizer_kinds import tokenize
from helpers.training import TEXTS, embeddings, train, write_rows
from safetensors.torch import load_file
from torch import nn

import evaluate
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.model.adapters import (
    AdapterBase,
    adapter_rank,
    add_adapters,
    has_adapters,
    merged,
    mix_with,
    save_adapter,
)
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.padding import pad
from embedding_finetune.retrieval.encoder import load_encoder


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path)


def test_adapters_start_from_the_seed_alone(tiny_bert, rows, tmp_path):
    def adapter(name, seed):
        train(tiny_bert, rows, tmp_path / name, "--lora_rank", 4, "--seed", seed, steps=1)
        weights = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        return torch.cat([tensor.flatten() for name, tensor in sorted(weights.items()) if "lora_A" in name])

    torch.rand(3)  # whatever was drawn before
    first = adapter("first", 1)
    torch.rand(5)
    assert torch.equal(first, adapter("again", 1))
    assert not torch.equal(first, adapter("other", 2))


def test_adapters_train_few_weights_and_are_saved_merged_so_that_every_tool_loads_them(tiny_bert, rows, tmp_path):
    from sentence_transformers import SentenceTransformer

    tuned = train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4)
    assert not np.allclose(embeddings(tuned), embeddings(tiny_bert), atol=1e-3)
    assert np.allclose(embeddings(tuned), SentenceTransformer(str(tuned), device="cpu").encode(TEXTS), atol=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_bert, tuned))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("encoder.layer.") and name.endswith("weight") for name in changed)

    described = json.loads((tuned / "adapter" / "adapter_base.json").read_text())
    assert described["name"] == str(tiny_bert)
    assert np.allclose(embeddings(tuned / "adapter", "--normalized", "True"), embeddings(tuned), atol=1e-5)
    adapter = load_file(tuned / "adapter" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in adapter.values()} == {4}


def test_saving_an_adapter_asks_no_hub(tiny_bert, tmp_path, monkeypatch):
    from peft.utils import save_and_load

    def ask(*args):
        raise AssertionError(f"the hub is asked for {args}")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", ask)
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    backbone.name_or_path = "me/base"  # as peft has it of a model of the hub
    save_adapter(add_adapters(backbone, 2, seed=0), tmp_path, base=AdapterBase("me/base", None), alone=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "embeddings" in name]


def test_a_resumed_run_with_adapters_ends_where_an_unbroken_one_does(tiny_bert, rows, tmp_path):
    whole = embeddings(train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4))
    checkpoint = tmp_path / "tuned" / "checkpoint-2"
    train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4, "--resume_from_checkpoint", checkpoint)
    assert np.array_equal(embeddings(tmp_path / "tuned"), whole)


def test_the_adapter_alone_is_what_peft_loads_and_gives_the_merged_model(tiny_bert, rows, tmp_path):
    from peft import PeftModel

    merged = train(tiny_bert, rows, tmp_path / "merged", "--lora_rank", 4)
    alone = train(tiny_bert, rows, tmp_path / "alone", "--lora_rank", 4, "--save_adapter_only", "True")
    assert not (alone / "model.safetensors").exists()
    backbone, tokenizer, config = load_backbone(str(tiny_bert), flag="--model")
    model = BiEncoder(PeftModel.from_pretrained(backbone, str(alone)), config).eval()
    ids, _ = tokenize(tokenizer, TEXTS, instruction="", max_length=128)
    with torch.no_grad():
        assert np.allclose(model(**pad(tokenizer, ids, limit=128)), embeddings(merged), atol=1e-5)


ADAPTER = ("--sentence_pooling_method", "mean", "--query_instruction_for_retrieval", "how: ", "--lora_rank", 4)


@pytest.fixture
def alone(tiny_bert, rows, tmp_path):
    """An adapter alone, with pooling, instructions and a length that are not the base's."""
    return train(tiny_bert, rows, tmp_path / "alone", *ADAPTER, "--save_adapter_only", "True")


def queries_of(folder):
    encoder = load_encoder(str(folder), encoding_arguments("--dtype", "float32"), flag="--model")
    return encoder.encode_queries(TEXTS)


def test_an_adapter_alone_embeds_as_the_merged_model_here_in_sentence_transformers_and_by_peft(
    tiny_bert, alone, rows, tmp_path
):
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    whole = train(tiny_bert, rows, tmp_path / "whole", *ADAPTER)
    expected = queries_of(whole)
    assert np.allclose(queries_of(alone), expected, atol=1e-6)
    assert np.allclose(SentenceTransformer(str(alone), device="cpu").encode_query(TEXTS), expected, atol=1e-5)
    backbone, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    model = PeftModel.from_pretrained(backbone, str(alone)).merge_and_unload().eval()
    with torch.no_grad():
        inputs = tokenizer([f"how: {text}" for text in TEXTS], padding=True, return_tensors="pt")
        theirs = BiEncoder(model, EmbeddingConfig(pooling="mean"))(inputs["input_ids"], inputs["attention_mask"])
    assert np.allclose(theirs, expected, atol=1e-5)
    assert json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_bert)
    assert not (alone / "model.safetensors").exists()


def test_all_three_scripts_read_an_adapter_and_training_goes_on_from_the_merged_weights(
    tiny_bert, alone, rows, tmp_path
):
    output, corpus = tmp_path / "mined.jsonl", tmp_path / "corpus.jsonl"
    write_jsonl(corpus, [{"text": text} for row in read_jsonl(rows) for text in row["pos"]])
    mining = ["--input_file", rows, "--output_file", output, "--range_for_sampling", "0-5"]
    mine_hard_neg.main(["--model_name_or_path", *map(str, [alone, *mining])])
    assert len(read_jsonl(output)) == 10
    measuring = ["--query_file_jsonl_path", rows, "--index_file_jsonl_path", corpus]
    evaluate.main(["--model_name", *map(str, [alone, *measuring])])
    whole = train(tiny_bert, rows, tmp_path / "whole", *ADAPTER)
    on, on_whole = (train(model, rows, tmp_path / f"on_{model.name}", steps=1) for model in (alone, whole))
    assert (on / "model.safetensors").exists()
    assert not (on / "adapter_config.json").exists()
    assert np.allclose(queries_of(on), queries_of(on_whole), atol=1e-5)
    assert not np.allclose(queries_of(on), queries_of(alone), atol=1e-3)


def test_an_adapter_that_peft_alone_wrote_takes_tokenizer_and_pooling_of_its_base(tiny_bert, alone, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(alone / name, bare)
    expected = load_encoder(
        str(alone),
        encoding_arguments("--dtype", "float32", "--sentence_pooling_method", "cls"),
        flag="--model",
    ).encode_passages(TEXTS)
    ours = load_encoder(str(bare), encoding_arguments("--dtype", "float32"), flag="--model").encode_passages(TEXTS)
    assert np.allclose(next(ours)[1], next(expected)[1], atol=1e-6)


def test_an_adapter_without_its_base_or_with_another_or_damaged_is_one_line(alone, other_bert, tmp_path, monkeypatch):
    def changed(file, **changes):
        path = alone / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(UserError) as refusal:
            load_backbone(str(alone), flag="--model")
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    before = (alone / "adapter_base.json").read_text()
    assert f"{other_bert} has other weights than those that this adapter was trained on" in changed(
        "adapter_base.json", name=str(other_bert)
    )
    gone = changed("adapter_base.json", name=str(tmp_path / "gone"))
    assert f"--model {alone} is an adapter of {tmp_path / 'gone'}, which is not there; put that model back" in gone
    assert '"name" is 7, expected a string' in changed("adapter_base.json", name=7)
    (alone / "adapter_base.json").write_text(before)
    assert "cannot be loaded" in changed("adapter_config.json", peft_type="NONE_SUCH")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"alone is an adapter, which needs the package peft: pip install peft"):
        load_backbone(str(alone), flag="--model")


def test_no_adapter_of_an_adapter_is_saved_alone(alone, rows, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(alone, rows, tmp_path / "second", "--lora_rank", 2, "--save_adapter_only", "True")
    assert stop.value.code == 2
    assert "is an adapter itself, and is merged into its base before training" in capsys.readouterr().err
    assert np.isfinite(queries_of(train(alone, rows, tmp_path / "third", "--lora_rank", 2))).all()


def test_without_peft_the_flag_says_what_to_install(tiny_bert, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train(tiny_bert, rows, tmp_path / "tuned", "--lora_rank", 4)
    assert stop.value.code == 2
    assert "--lora_rank needs the package peft: pip install peft" in capsys.readouterr().err


def test_merging_with_the_base_saves_the_weighted_mean_of_all_weights(tiny_bert, rows, tmp_path):
    tuned = train(tiny_bert, rows, tmp_path / "tuned", "--merge_with_base", 0.25)
    base, own, mixed = (load_file(folder / "model.safetensors") for folder in (tiny_bert, tuned, tuned / "merged"))
    for name, tensor in base.items():
        assert torch.allclose(mixed[name], 0.25 * own[name] + 0.75 * tensor, atol=1e-7)
    assert embeddings(tuned / "merged").shape == (3, 32)


def test_adapters_change_nothing_before_they_are_trained_and_take_no_random_numbers(tiny_bert):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    backbone.eval()
    ids = torch.arange(5, 20)[None]
    before, state = backbone(ids).last_hidden_state, torch.get_rng_state()
    assert not has_adapters(backbone)
    assert merged(backbone) is backbone
    adapted = add_adapters(copy.deepcopy(backbone), 3, seed=1).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert has_adapters(adapted)
    assert torch.allclose(adapted(ids).last_hidden_state, before, atol=1e-6)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_merging_adds_alpha_over_rank_times_the_product_of_the_factors(tiny_bert):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    linear = backbone.encoder.layer[0].output.dense.weight.detach().clone()
    adapted = add_adapters(backbone, 3, seed=1)
    layer = adapted.base_model.model.encoder.layer[0].output.dense
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (3, 64), (32, 3)
    with torch.no_grad():
        up.normal_()
    plain = merged(adapted)
    assert torch.allclose(plain.encoder.layer[0].output.dense.weight, linear + 2 * up @ down, atol=1e-6)
    assert has_adapters(adapted)
    assert not has_adapters(plain)


def test_merging_leaves_the_model_and_its_device_alone_and_gives_the_bits_of_a_plain_copy(tiny_bert):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    adapted = add_adapters(backbone, 3, seed=1)
    for parameter in adapted.parameters():
        parameter.data += 0.01
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    plain, expected = merged(adapted), copy.deepcopy(adapted).merge_and_unload().state_dict()
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


def test_no_tensor_is_copied_on_the_device_that_trains(tiny_bert, monkeypatch):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    adapted = add_adapters(backbone, 3, seed=1)

    def copied(tensor, memo):
        raise AssertionError(f"a tensor of {tuple(tensor.shape)} is copied where it is")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copied)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copied)
    assert not has_adapters(merged(adapted))


def test_the_rank_of_a_folder_is_that_of_its_adapter(tmp_path):
    assert adapter_rank(tmp_path) is None
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 7}')
    assert adapter_rank(tmp_path) == 7
    (tmp_path / "adapter_config.json").write_text('{"r": 5}')
    assert adapter_rank(tmp_path) == 5
    (tmp_path / "adapter_config.json").write_text("not JSON")
    assert adapter_rank(tmp_path) is None


def test_mixing_is_the_weighted_mean_of_what_is_no_count():
    tuned, base = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        tuned.weight.fill_(4.0)
        base.weight.fill_(8.0)
    tuned.num_batches_tracked.fill_(5)
    mix_with(tuned, base, 0.75)
    assert tuned.weight.tolist() == [5.0, 5.0]
    assert tuned.num_batches_tracked.item() == 5
