"""Training in rounds: what is mined, how long a round is, at which rate it learns, and how it is resumed."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.tiny_runs import equal, flags, kill_after_checkpoint, refusal, weights

import finetune
import mine_hard_neg
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.mining.choice import Selection
from embedding_finetune.mining.negatives import mine_negatives
from embedding_finetune.training import rounds as rounds_module
from embedding_finetune.training.batches import EpochSampler
from embedding_finetune.training.one_file import OneFileSampler
from embedding_finetune.training.rounds import MINED_FILE, RoundSampler
from embedding_finetune.training.stages import Stages

CHOICE = ["--range_for_sampling", "1-5", "--negative_number", "3"]


@pytest.fixture
def pool(tmp_path):
    others = [passage_about(topic).replace("red", "old") for topic in TOPICS]
    return write_jsonl(tmp_path / "pool.jsonl", [{"text": text} for text in others])


def rounds(model, data, pool, folder, **changes):
    given = {
        "candidate_pool": pool,
        "train_group_size": 3,
        "neighbours_in_batch": 2,
        "learning_rate": 1e-2,
        "mining_rounds": 2,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 9,
        **changes,
    }
    return [*flags(model, data, folder, **given), *CHOICE]


def kept_with(checkpoint):
    """The positions of each row's negatives, as a checkpoint keeps them."""
    with np.load(checkpoint / MINED_FILE) as saved:
        return np.split(saved["positions"], np.cumsum(saved["lengths"])[:-1])


def test_each_rounds_negatives_are_those_that_mine_hard_neg_gives_for_the_model_saved_there(
    tiny_bert, pairs, pool, tmp_path
):
    folder = tmp_path / "out"
    finetune.main(rounds(tiny_bert, pairs, pool, folder))
    rows, candidates = read_jsonl(pairs), tmp_path / "union.jsonl"
    texts = [*(text for row in rows for text in row["pos"]), *(row["text"] for row in read_jsonl(pool))]
    write_jsonl(candidates, [{"text": text} for text in texts])
    corpus = Corpus(texts)
    mined = {}
    for model, checkpoint in ((tiny_bert, "checkpoint-2"), (folder / "checkpoint-4", "checkpoint-8")):
        argv = ["--model_name_or_path", model, "--input_file", pairs, "--output_file", tmp_path / "mined.jsonl"]
        mine_hard_neg.main(list(map(str, [*argv, "--candidate_pool", candidates, *CHOICE])))
        expected = [corpus.positions(row["neg"]).tolist() for row in read_jsonl(tmp_path / "mined.jsonl")]
        mined[checkpoint] = [positions.tolist() for positions in kept_with(folder / checkpoint)]
        assert mined[checkpoint] == expected
    assert mined["checkpoint-2"] != mined["checkpoint-8"]
    assert any(position >= len(TOPICS) for positions in mined["checkpoint-2"] for position in positions)  # of the pool


def test_the_audits_of_all_rounds_are_told_and_in_the_summary(tiny_bert, pairs, pool, tmp_path, caplog):
    pytest.importorskip("peft")
    finetune.main(rounds(tiny_bert, pairs, pool, tmp_path / "out", lora_rank=2, save_adapter_only=True))
    audits = json.loads((tmp_path / "out" / "training_summary.json").read_text())["mining_rounds"]
    assert [audit["round"] for audit in audits] == [1, 2]
    assert all(audit["candidates"] == 20 and audit["negatives"] == 90 for audit in audits)
    assert audits[0]["weights_sha256"] != audits[1]["weights_sha256"]
    assert caplog.text.count("negatives above their positive") == 2


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_that_is_killed_in_any_round_resumes_to_the_same_bits(tiny_bert, pairs, pool, tmp_path, step):
    whole, folder = tmp_path / "whole", tmp_path / "out"
    finetune.main(rounds(tiny_bert, pairs, pool, whole))
    argv = rounds(tiny_bert, pairs, pool, folder)
    kill_after_checkpoint(argv, step)
    finetune.main([*argv, "--resume_from_checkpoint", "True"])
    assert equal(weights(whole), weights(folder))
    summaries = [json.loads((path / "training_summary.json").read_text()) for path in (whole, folder)]
    audits = [[{**audit, "seconds": None} for audit in summary["mining_rounds"]] for summary in summaries]
    assert audits[0] == audits[1]


def test_a_later_round_without_negatives_goes_on_and_the_first_is_refused(
    tiny_bert, pairs, pool, tmp_path, monkeypatch, caplog, capsys
):
    def mine_for(*rounds_with_negatives):
        number = itertools.count(1)

        def mine(*args, **scratch):
            mined = mine_negatives(*args, **scratch)
            if next(number) not in rounds_with_negatives:
                empty = [Selection([], [], kept=0, random_fills=0, dropped=Counter()) for _ in mined.selections]
                mined = mined._replace(selections=empty)
            return mined

        monkeypatch.setattr(rounds_module, "mine_negatives", mine)

    mine_for(1)
    finetune.main(rounds(tiny_bert, pairs, pool, tmp_path / "out"))
    assert "this round's batches are drawn at random" in caplog.text
    audits = json.loads((tmp_path / "out" / "training_summary.json").read_text())["mining_rounds"]
    assert [audit["negatives"] for audit in audits] == [90, 0]
    mine_for(2)
    assert "no row has a negative: widen" in refusal(rounds(tiny_bert, pairs, pool, tmp_path / "other"), capsys)


def test_each_round_mines_what_was_judged_first_and_never_what_answers(tiny_bert, pairs, pool, tmp_path, caplog):
    rows, outside = read_jsonl(pairs), "Nobody has this passage in a pool."
    query, candidate = rows[0]["query"], read_jsonl(pool)[3]["text"]
    lines = [(query, outside, False), (query, candidate, True), (rows[1]["query"], candidate, False)]
    judgements = write_jsonl(
        tmp_path / "j.jsonl", [dict(zip(("query", "passage", "relevant"), line)) for line in lines]
    )
    folder = tmp_path / "out"
    flags = {"judgements": judgements, "max_score": -1.5}  # which refuses everything else
    finetune.main(rounds(tiny_bert, pairs, pool, folder, **flags))
    audits = json.loads((folder / "training_summary.json").read_text())["mining_rounds"]
    assert [(audit["negatives_confirmed"], audit["negatives"]) for audit in audits] == [(2, 2), (2, 2)]
    with np.load(folder / "checkpoint-8" / MINED_FILE) as saved:
        assert saved["lengths"].tolist() == [1, 1, *[0] * (len(rows) - 2)]
    assert "3 of 3 judgements are about its queries, and add 1 positives" in caplog.text
    kill_after_checkpoint(rounds(tiny_bert, pairs, pool, tmp_path / "killed", **flags), 6)
    finetune.main(rounds(tiny_bert, pairs, pool, tmp_path / "killed", resume_from_checkpoint=True, **flags))
    assert equal(weights(tmp_path / "killed"), weights(folder))


def test_a_run_goes_on_only_with_its_own_candidates_and_length(tiny_bert, pairs, pool, tmp_path, capsys):
    folder = tmp_path / "out"
    finetune.main(rounds(tiny_bert, pairs, pool, folder, max_steps=4))
    turned = write_jsonl(tmp_path / "turned.jsonl", read_jsonl(pool)[::-1])
    for changes, said in (
        ({"candidate_pool": turned}, "other passages to mine from"),
        ({"max_steps": 8}, "rounds of another length"),
        ({"mining_rounds": 4}, "--mining_rounds 4, where it had 2"),
        ({"absolute_margin": 0.1}, "--absolute_margin 0.1, where it had the default"),
    ):
        given = {"max_steps": 4, "resume_from_checkpoint": True, **changes}
        with pytest.raises(SystemExit):
            finetune.main(rounds(tiny_bert, pairs, pool, folder, **given))
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_negatives_that_are_damaged_are_one_line(tiny_bert, pairs, pool, tmp_path, capsys):
    folder = tmp_path / "out"
    finetune.main(rounds(tiny_bert, pairs, pool, folder))
    path = folder / "checkpoint-6" / MINED_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit):
        finetune.main(rounds(tiny_bert, pairs, pool, folder, resume_from_checkpoint=path.parent))
    assert f"{path}: is missing or damaged" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_group_size": 1, "neighbours_in_batch": 0}, "needs a --train_group_size of at least 2"),
        ({"distillation_weight": 1}, "leave --distillation_weight out"),
        ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "leave --dataloader_persistent_workers"),
        ({"mining_rounds": 0}, "--range_for_sampling needs --mining_rounds"),
        ({"mining_rounds": 9}, "the run has 8 steps; give fewer rounds"),
    ],
)
def test_what_rounds_cannot_do_is_refused_in_one_line(tiny_bert, pairs, pool, tmp_path, capsys, changes, said):
    argv = rounds(tiny_bert, pairs, pool, tmp_path / "out", hold_out=3, **changes)
    with pytest.raises(SystemExit) as stop:
        finetune.main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


# The order of rows


def test_a_round_goes_through_the_rows_in_epochs_of_its_own():
    sampler = RoundSampler(EpochSampler(5, seed=0), Stages([4, 2]), keys_per_step=2)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [epoch for epoch, _ in first] == [0] * 5 + [1] * 3
    assert [epoch for epoch, _ in second] == [2] * 4
    assert sorted(row for _, row in first[:5]) == list(range(5))
    assert (len(first), len(second)) == (8, len(sampler))


def test_rounds_of_one_file_a_batch_mix_no_files():
    files = np.array([0] * 5 + [1] * 3)
    sampler = RoundSampler(OneFileSampler(files, per_process=2, processes=1, seed=0), Stages([7]), keys_per_step=2)
    keys = list(sampler)
    batches = [[key for key in keys[start : start + 2] if key is not None] for start in range(0, 14, 2)]
    assert all(len({files[key.row] for key in batch}) == 1 for batch in batches)
