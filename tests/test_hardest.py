"""Pools that are too large for memory: panels of their hardest passages."""

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.tiny import make_tiny_bert
from helpers.tiny_runs import equal, flags, refusal
from safetensors.torch import load_file

import finetune
from embedding_finetune.training import hardest, setup
from embedding_finetune.training.pool_loss import Pairs, Panel

POOL = [f"{passage_about(topic)} {number}" for number in range(20) for topic in TOPICS]


@pytest.fixture
def files(tmp_path):
    rows = [
        {"query": f"{verb} the {topic}", "pos": [passage_about(topic)]}
        for verb in ("reset", "open")
        for topic in TOPICS
    ]
    return write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "pool.jsonl", [{"text": t} for t in POOL])


@pytest.fixture
def too_large(monkeypatch):
    """No pool fits into memory."""
    monkeypatch.setattr(setup, "fits", lambda *_: False)
    monkeypatch.setattr(hardest, "STEPS", 3)
    monkeypatch.setattr(hardest, "PER_QUERY", 2)


def argv_of(model, files, folder, **changes):
    given = flags(model, files[0], folder, freeze_passages=True, candidate_pool=files[1], temperature=0.1, **changes)
    place = given.index("--train_group_size")
    return given[:place] + given[place + 2 :]


def weights(folder):
    return load_file(folder / "query_0_Transformer" / "model.safetensors")


def test_the_panel_holds_the_nearest_and_the_positives_and_is_found_anew(
    tiny_bert, files, tmp_path, too_large, monkeypatch, caplog
):
    panels = []
    take = hardest.Hardest._take

    def taken(self, places, *, before):
        take(self, places, before=before)
        embedded = self.trainer.encoder_as_it_stands().encode_queries(self.trainer.train_dataset.rows["query"][:])
        panels.append((before, places, embedded, self.passages[:].numpy()))

    monkeypatch.setattr(hardest.Hardest, "_take", taken)
    with caplog.at_level("INFO"):
        finetune.main(argv_of(tiny_bert, files, tmp_path / "out", max_steps=7, per_device_train_batch_size=20))
    assert [before for before, *_ in panels] == [0, 3, 6]
    for _, places, queries, passages in panels:  # all rows are in a batch
        nearest = np.argsort(-(queries @ passages.T), axis=1)[:, :2]
        assert set(places) == {*nearest.flatten(), *range(len(TOPICS))}
    assert f"step 3: trained against {len(panels[1][1])} of 210 passages" in caplog.text
    assert "more than half of the memory" in caplog.text


def test_a_panel_of_all_passages_gives_the_bits_of_the_whole_pool(tiny_bert, files, tmp_path, monkeypatch):
    finetune.main(argv_of(tiny_bert, files, tmp_path / "whole"))
    monkeypatch.setattr(setup, "fits", lambda *_: False)
    monkeypatch.setattr(hardest, "PER_QUERY", 1000)
    finetune.main(argv_of(tiny_bert, files, tmp_path / "panel"))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "panel"))


def test_a_run_goes_on_with_the_panel_of_its_checkpoint_to_the_same_bits(files, tmp_path, too_large):
    model = make_tiny_bert(tmp_path / "bert")  # with dropout
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    finetune.main(argv_of(model, files, tmp_path / "whole", **settings))
    for step in (4, 6):  # in the middle of a panel, and where one ends
        resumed = argv_of(model, files, tmp_path / f"from_{step}", **settings)
        finetune.main([*resumed, "--resume_from_checkpoint", str(tmp_path / "whole" / f"checkpoint-{step}")])
        assert equal(weights(tmp_path / f"from_{step}"), weights(tmp_path / "whole"))


def test_a_run_that_was_trained_against_the_whole_pool_does_not_go_on_with_a_part(
    tiny_bert, files, tmp_path, monkeypatch, capsys
):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    finetune.main(argv_of(tiny_bert, files, tmp_path / "out", **settings))
    monkeypatch.setattr(setup, "fits", lambda *_: False)
    again = argv_of(tiny_bert, files, tmp_path / "out", **{**settings, "max_steps": 6})
    assert "with another part of the passages" in refusal([*again, "--resume_from_checkpoint", "True"], capsys)


def test_a_damaged_panel_is_one_line(tiny_bert, files, tmp_path, too_large, capsys):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    finetune.main(argv_of(tiny_bert, files, tmp_path / "out", **settings))
    (tmp_path / "out" / "checkpoint-4" / hardest.PANEL_FILE).write_bytes(b"half")
    again = argv_of(tiny_bert, files, tmp_path / "out", **{**settings, "max_steps": 6})
    line = refusal([*again, "--resume_from_checkpoint", "True"], capsys)
    assert f"{hardest.PANEL_FILE}: is missing or damaged; give an earlier checkpoint" in line


def test_minutes_are_planned_with_a_panel_that_is_there(tiny_bert, files, tmp_path, too_large):
    argv = argv_of(tiny_bert, files, tmp_path / "out", minutes=0.05)
    place = argv.index("--max_steps")
    finetune.main(argv[:place] + argv[place + 2 :])
    assert (tmp_path / "out" / "modules.json").exists()


def test_a_panel_of_large_batches_is_for_fewer_steps(tiny_bert, files, tmp_path, too_large, monkeypatch, caplog):
    monkeypatch.setattr(hardest, "_MOST_PASSAGES", 20)
    with caplog.at_level("INFO"):
        finetune.main(argv_of(tiny_bert, files, tmp_path / "out", max_steps=2, per_device_train_batch_size=5))
    assert "of each query of 2 steps" in caplog.text  # 20 / (5 queries of 2 passages)


def test_what_fits_is_half_of_the_memory_or_of_the_groups_limit(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(hardest, "_LIMIT_OF_GROUP", tmp_path / "max")
    assert hardest.memory_of(cpu) > 2**28
    (tmp_path / "max").write_text("max\n")
    assert hardest.memory_of(cpu) > 2**28
    (tmp_path / "max").write_text("1000\n")
    assert (hardest.fits(500, cpu), hardest.fits(501, cpu)) == (True, False)


def test_a_panel_numbers_the_passages_that_it_holds():
    panel = Panel(torch.zeros(3, 2), np.array([2, 5, 9]))
    assert panel.columns(np.array([9, 2, 3, 10])).tolist() == [2, 0, -1, -1]
    pairs = panel.pairs(Pairs.of(np.array([5, 3]), np.array([0, 1])))
    assert (pairs.columns.tolist(), pairs.rows.tolist()) == ([1], [0])
    assert Panel(torch.zeros(3, 2)).columns(np.array([2])).tolist() == [2]
