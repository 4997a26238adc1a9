import pytest
from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.tiny_runs import flags, refusal

from embedding_finetune.training.freezing import REFUSED_BESIDE

VALUES = {
    "train_group_size": 4,
    "neighbours_in_batch": 3,
    "one_file_per_batch": True,
    "mining_rounds": 2,
    "matryoshka_dims": 16,
    "distillation_weight": 1,
    "lora_rank": 4,
    "merge_with_base": 0.5,
    "negatives_cross_device": True,
    "use_inbatch_neg": False,
    "config_name": "other",
    "tokenizer_name": "other",
}


@pytest.fixture
def argv(tiny_bert, tmp_path):
    rows = [{"query": f"reset the {topic}", "pos": [passage_about(topic)]} for topic in TOPICS]
    given = flags(tiny_bert, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", freeze_passages=True)
    place = given.index("--train_group_size")
    return given[:place] + given[place + 2 :]


@pytest.mark.parametrize("flag", VALUES)
def test_a_flag_about_passages_that_are_trained_is_refused_in_one_line(argv, capsys, flag):
    line = refusal([*argv, f"--{flag}", str(VALUES[flag])], capsys)
    assert line.startswith(f"finetune.py: error: --freeze_passages True and --{flag} {VALUES[flag]}")
    assert "leave it out" in line


def test_every_refused_flag_is_tried():
    assert VALUES.keys() == REFUSED_BESIDE.keys()


def test_a_pool_of_one_passage_is_refused(argv, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [{"query": word, "pos": ["the pump"]} for word in ("reset", "open")])
    assert "no query would have a negative: there is one passage; give --candidate_pool" in refusal(argv, capsys)
