import shutil

import numpy as np
import pytest
import torch
from helpers.tiny import make_rotary_model, make_tiny_bert

from embedding_finetune.command_line import UserError
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.modules import pool
from embedding_finetune.model.padding import batches_by_length
from embedding_finetune.model.sub_batches import padded_texts

STATES = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)  # (N, T, H)
RIGHT = torch.tensor([[1, 1, 0], [1, 1, 1]])
LEFT = torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("method", "mask", "expected"),
    [
        ("cls", RIGHT, [STATES[0, 0], STATES[1, 0]]),
        ("cls", LEFT, [STATES[0, 1], STATES[1, 0]]),
        ("lasttoken", RIGHT, [STATES[0, 1], STATES[1, 2]]),
        ("lasttoken", LEFT, [STATES[0, 2], STATES[1, 2]]),
        ("mean", RIGHT, [STATES[0, :2].mean(0), STATES[1].mean(0)]),
        ("mean", LEFT, [STATES[0, 1:].mean(0), STATES[1].mean(0)]),
    ],
)
def test_pooling_takes_real_tokens_on_either_padding_side(method, mask, expected):
    assert torch.equal(pool(STATES, mask, method), torch.stack(expected))


def test_an_unknown_pooling_raises():
    with pytest.raises(ValueError, match="median"):
        pool(STATES, RIGHT, "median")


@pytest.mark.parametrize("normalized", [True, False])
def test_embeddings_are_float32_under_autocast_and_unit_length_when_normalised(tiny_bert, normalized):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    model = BiEncoder(backbone, EmbeddingConfig(pooling="mean", normalized=normalized)).eval()
    ids = torch.randint(5, 50, (3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(ids, torch.ones_like(ids))
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3)) is normalized


def test_a_backbone_of_half_precision_weights_is_loaded_as_float32(tiny_bert, tmp_path):
    backbone, tokenizer, _ = load_backbone(str(tiny_bert), flag="--model")
    backbone.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _, _ = load_backbone(str(tmp_path), flag="--model")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_the_pooler_is_left_out_of_training(tiny_bert):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    model = BiEncoder(backbone, EmbeddingConfig())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.pooler.dense.weight", "backbone.pooler.dense.bias"]


def test_a_hub_name_is_found_in_the_cache_folder(tiny_bert, tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_bert, snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123abcd")
    (snapshot / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    backbone, _, config = load_backbone("some/model", flag="--model", cache_dir=str(tmp_path))
    assert backbone.config.hidden_size == 32
    assert config.max_seq_length == 12


@pytest.mark.parametrize("damage", ["no folder", "no config", "no weights", "broken weights", "other weights"])
def test_a_model_that_cannot_be_loaded_is_one_line_that_names_the_flag(tmp_path, damage):
    folder = make_tiny_bert(tmp_path / "bert")
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "broken weights":
        (folder / "model.safetensors").write_bytes(b"not safetensors")
    elif damage == "other weights":
        from safetensors.torch import save_file

        save_file({"something": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_backbone(str(folder), flag="--model_name_or_path")
    assert str(error.value).startswith(f"--model_name_or_path {folder}")
    assert "\n" not in str(error.value)


def ragged_batch(seed=0, count=12, longest=20, padding_side="right"):
    torch.manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,))
    ids = torch.randint(5, 60, (count, longest))
    mask = (torch.arange(longest) < lengths[:, None]).long()
    if padding_side == "left":
        mask = mask.flip(1)
    return ids * mask, mask


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("budget", [1, 33, 10_000])
@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
def test_sub_batches_give_the_loss_and_gradients_of_one_batch(tmp_path, budget, padding_side, pooling):
    backbone, _, _ = load_backbone(str(make_rotary_model(tmp_path)), flag="--model")
    ids, mask = ragged_batch(padding_side=padding_side)
    config = EmbeddingConfig(pooling=pooling)
    model = BiEncoder(backbone, config).train()
    target = torch.randn(12, 32)

    gradients = []
    lengths = mask.sum(dim=1).numpy()
    order = np.argsort(-lengths, kind="stable")
    ids, mask, lengths = ids[order], mask[order], lengths[order]
    ends = np.cumsum([len(rows) for rows in batches_by_length(lengths, budget)]).tolist()
    texts = padded_texts(ids, mask, ends=ends, left=padding_side == "left", lengths=lengths)
    assert len(texts["sub_batches"]) == {1: 12, 33: 6, 10_000: 1}[budget]
    for embeddings in (model(ids, mask), model.encode_in_sub_batches(texts)):
        backbone.zero_grad()
        loss = (embeddings * target).sum()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)])
    for expected, found in zip(*gradients, strict=True):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * max(1, expected.abs().max()))
