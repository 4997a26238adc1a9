"""Steps that are made to be timed. That they leave nothing behind is in test_pacing.py, for several optimizers."""

import pytest
import torch
from helpers.tiny_runs import flags

import finetune
from embedding_finetune.training import pacing, rehearsal


@pytest.mark.parametrize(
    ("accumulated", "wanted", "steps"),
    [(1, 0.0, 3), (1, 1e9, 8), (2, 0.0, 3), (2, 1e9, 4)],  # 30 rows in batches of 4 are 8
)
def test_steps_are_timed_for_as_long_as_wanted_and_nothing_is_left(
    tiny_bert, pairs, tmp_path, monkeypatch, accumulated, wanted, steps
):
    found = {}

    def timed(trainer, model, sampler, **_):
        trainer.optimizer.param_groups[0]["lr"] = 0.125
        before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
        made = []
        trainer.training_step = lambda *args: made.append(type(trainer).training_step(trainer, *args))
        seconds = rehearsal.seconds_of_step(trainer, model, sampler, wanted=wanted)
        del trainer.training_step
        found.update(seconds=seconds, micro_batches=len(made), counted=trainer.cut_texts._counts.sum())
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert not trainer.optimizer.state
        assert trainer.optimizer.param_groups[0]["lr"] == 0.125
        assert all(parameter.grad is None for parameter in model.parameters())
        return seconds

    monkeypatch.setattr(pacing, "seconds_of_step", timed)
    monkeypatch.setattr(pacing, "steps_within", lambda *_: 2)
    argv = flags(
        tiny_bert, pairs, tmp_path / "out", per_device_train_batch_size=4, gradient_accumulation_steps=accumulated
    )
    argv[argv.index("--max_steps")] = "--minutes"
    finetune.main(argv)
    assert found["seconds"] > 0
    assert found["counted"] == 0
    assert found["micro_batches"] == steps * accumulated
