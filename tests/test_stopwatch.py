from types import SimpleNamespace

from embedding_finetune.mining import stopwatch
from embedding_finetune.mining.stopwatch import Stopwatch


def test_laps_of_one_name_add_up_and_all_laps_are_the_whole_run(monkeypatch):
    times = iter([100.0, 101.5, 104.0, 104.25])
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: next(times)))
    watch = Stopwatch()
    assert watch.total == 0
    for name in ("encode", "search", "encode"):
        watch.lap(name)
    assert watch.seconds == {"encode": 1.5 + 0.25, "search": 2.5}
    assert watch.total == 4.25
