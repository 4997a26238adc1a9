"""What the Trainer calls while it trains."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.training.callbacks import CutTexts, RunLength, StderrProgress


def test_texts_that_are_cut_are_counted_over_batches_and_told_once(caplog):
    caplog.set_level(logging.INFO)
    cut_texts = CutTexts(query=8, passage=16)
    cut_texts.count(np.array([[1, 4], [0, 8]]))
    cut_texts.count(np.array([[2, 4], [0, 8]]))
    for _ in range(2):
        cut_texts.on_epoch_end(None, None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 8 query texts of the first epoch were cut to --query_max_len 8"
    ]


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_goes_on_up_to_its_last_step_and_from_none_beyond_it(step):
    arguments = SimpleNamespace(num_train_epochs=1.5)
    begin = RunLength().on_train_begin
    if step <= 3:
        begin(arguments, SimpleNamespace(global_step=step, max_steps=3), None)
    else:
        with pytest.raises(UserError, match=r"--num_train_epochs 1.5 ends at step 3: the checkpoint is at step 4"):
            begin(arguments, SimpleNamespace(global_step=step, max_steps=3), None)


@pytest.mark.parametrize(("is_first_process", "line"), [(True, "step 7  loss 0.1235  epoch 1\n"), (False, "")])
def test_values_are_logged_by_the_first_process_on_one_line_of_stderr(capsys, is_first_process, line):
    state = SimpleNamespace(is_world_process_zero=is_first_process, global_step=7, max_steps=9)
    values = {"loss": 0.123456, "epoch": 1, "total_flos": 5.0}
    StderrProgress(disabled=True).on_log(None, state, None, logs=values)
    assert capsys.readouterr() == ("", line)
