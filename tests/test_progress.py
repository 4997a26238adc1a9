"""Progress: bars in a terminal, a line now and then elsewhere, nothing where nothing is done."""

import contextlib
import io
import sys

import pytest
from helpers.data import TOPICS, passage_about
from helpers.running import embed_passages, encoder_for

from embedding_finetune import progress as module
from embedding_finetune.progress import Progress


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module, "_ended", {})
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return Clock()


def test_outside_a_terminal_there_is_a_line_at_most_every_30_s_and_one_at_the_end(clock, capsys):
    with Progress(100, "Encoding passage texts", "text", clock=clock) as progress:
        for _ in range(10):  # 70 s of work
            clock.now += 7
            progress.update(10)
    # The first update begins to show, 7 s in; 30 s have passed at the sixth, and 28 s later at the tenth, the end.
    assert capsys.readouterr().err.splitlines() == [
        "Encoding passage texts: 60 of 100 in 35 s",
        "Encoding passage texts: 100 of 100 in 63 s",
    ]


def test_many_short_pieces_of_one_kind_end_with_a_line_every_30_s_together(clock, capsys):
    for _ in range(100):
        with Progress(5, "Rescoring", "pair", clock=clock) as progress:
            clock.now += 1
            progress.update(5)
    assert len(capsys.readouterr().err.splitlines()) == 4  # after 1, 31, 61 and 91 s


def test_nothing_to_do_passing_work_failed_work_and_a_wish_for_silence_give_no_line(clock, capsys, monkeypatch):
    with Progress(5, "Encoding", "text", clock=clock) as progress:
        progress.skip(5)
    with Progress(5, "Searching", "batch", leave=False, clock=clock) as progress:
        progress.update(5)
    with contextlib.suppress(RuntimeError), Progress(5, "Encoding", "text", clock=clock) as progress:
        progress.update(3)
        raise RuntimeError
    with Progress(5, "Training", "step", disable=True, clock=clock) as progress:
        progress.update(5)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with Progress(5, "Training", "step", clock=clock) as progress:
        progress.update(5)
    assert capsys.readouterr().err == ""


def test_in_a_terminal_there_is_a_bar_from_the_first_thing_that_is_done(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(4, "Encoding", "text", clock=clock) as progress:
        progress.skip(2)
        assert sys.stderr.getvalue() == ""
        progress.update(2)
    assert "\rEncoding: 100%|" in sys.stderr.getvalue()
    assert "4/4" in sys.stderr.getvalue()


def test_a_process_without_stderr_has_no_progress(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(4, "Encoding", "text", clock=clock) as progress:
        progress.update(4)
    assert capsys.readouterr().out == ""


def test_texts_that_come_from_a_store_are_not_told_as_encoded(clock, tiny_bert, tmp_path, capsys, caplog):
    texts = [passage_about(topic) for topic in TOPICS]
    embed_passages(encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path)), texts)
    assert "Encoding passage texts: 10 of 10" in capsys.readouterr().err
    module._ended.clear()
    with caplog.at_level("INFO"):
        again = encoder_for(tiny_bert, "--embeddings_dir", str(tmp_path))
        list(again.encode_passages(texts, quiet=True))
        assert "were in --embeddings_dir" not in caplog.text
        list(again.encode_passages(texts))
    assert "10 of 10 passage texts were in --embeddings_dir" in caplog.text
    assert "Encoding" not in capsys.readouterr().err
