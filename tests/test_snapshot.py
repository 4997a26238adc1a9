"""The model as it stands: saved once while it stands, with the embeddings of its weights."""

from collections import Counter
from pathlib import Path

import pytest
from helpers.tiny_runs import flags
from safetensors import SafetensorError

import finetune
from embedding_finetune.command_line import UserError
from embedding_finetune.retrieval.tower import Tower
from embedding_finetune.training.snapshot import Snapshots


def test_a_model_is_saved_when_its_version_changes_or_was_forgotten():
    written = []

    def write(folder):
        written.append(len(written))
        (folder / "model").write_text(str(written[-1]))

    def read(snapshot):
        return (Path(snapshot.model) / "model").read_text()

    snapshots = Snapshots(write)
    first = snapshots.of(0)
    assert snapshots.of(0) == first
    assert list(Path(first.scratch).iterdir()) == []
    assert read(first) == "0"
    second = snapshots.of(1)
    assert read(second) == "1"
    assert not Path(first.model).exists()
    assert not Path(first.scratch).exists()
    snapshots.forget()
    assert not Path(second.model).exists()
    assert read(snapshots.of(1)) == "2"


def test_a_model_that_cannot_be_written_is_one_line_that_names_the_folder():
    def write(folder):
        raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(UserError, match=r"TMPDIR: the model to be measured cannot be written there: .* No space left"):
        Snapshots(write).of(0)


def test_no_text_is_encoded_twice_with_the_same_weights(tiny_bert, pairs, tmp_path, monkeypatch):
    """Where some of the held-out queries choose and others judge, and rounds mine from the same passages."""
    encoded = Counter()
    embed = Tower._embed

    def counted(self, block, kind, progress):
        encoded.update((self.weights_digest, kind.name, block.texts[n]) for n in block.missing)
        return embed(self, block, kind, progress)

    monkeypatch.setattr(Tower, "_embed", counted)
    argv = flags(tiny_bert, pairs, tmp_path / "out", hold_out=6, mining_rounds=2, eval_strategy="epoch", max_steps=8)
    finetune.main([*argv, "--range_for_sampling", "1-5"])
    assert len({weights for weights, _, _ in encoded}) == 3
    assert max(encoded.values()) == 1
