import dataclasses
import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from helpers.data import REPOSITORY, TOPICS, padded_ids, passage_about, read_jsonl, write_jsonl
from helpers.quick_python import quick_python
from helpers.tiny import make_tiny_bert
from safetensors.torch import load_file

import evaluate
import finetune
from embedding_finetune import __version__
from embedding_finetune.command_line import UserError
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.task import load_task
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import PaddedLayout
from embedding_finetune.model.training_kernels import use_cheap_dropout
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.batches import EmbedCollator, TrainDataset
from embedding_finetune.training.rows import load_rows
from embedding_finetune.training.run_folder import last_checkpoint
from embedding_finetune.training.setup import make_loss
from embedding_finetune.training.trainer import RetrievalTrainer


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer over forty rows and a tiny BERT without dropout."""
    topics = [first + " " + second for first in TOPICS for second in ("a", "b", "c", "d")]
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {
                "query": f"reset the {topic}",
                "pos": [passage_about(topic.split()[0]) + topic],
                "neg": [f"call {topic} {i}" for i in range(4)],
            }
            for topic in topics
        ],
    )
    model_folder = make_tiny_bert(tmp_path / "bert", dropout=0.0)

    def make(name="out", group_size=2, evaluate=False, **flags):
        backbone, tokenizer, config = load_backbone(str(model_folder), flag="--model")
        config = config.with_flags(normalized=flags.get("normalized"))
        args = RetrieverTrainingArguments(
            output_dir=str(tmp_path / name),
            **{
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "max_steps": 3,
                "save_strategy": "no",
                "disable_tqdm": True,
                "temperature": 0.1,
                **flags,
            },
        )
        return RetrievalTrainer(
            make_loss(BiEncoder(backbone, config), args),
            args,
            train_dataset=TrainDataset(load_rows(str(data)), group_size=group_size, seed=args.seed),
            data_collator=EmbedCollator(
                tokenizer,
                config,
                group_size=group_size,
                query_max_len=16,
                passage_max_len=32,
                layout=PaddedLayout(tokenizer, 32, args.tokens_per_sub_batch or 1024),
            ),
            saved_config=dataclasses.replace(config, max_seq_length=32),
            trained_before=np.empty(0, np.int64),
            task=load_task(data, Corpus(row["pos"][0] for row in read_jsonl(data))) if evaluate else None,
        )

    return make


def test_a_rows_instruction_is_trained_like_a_query_that_has_it_written_out(tiny_bert, tmp_path):
    own = [("open the ", topic) if n % 2 else (None, topic) for n, topic in enumerate(TOPICS)]
    records = {
        "instructed": [{"query": t, "pos": [passage_about(t)], "instruction": i} for i, t in own],
        "written": [{"query": ("how: " if i is None else i) + t, "pos": [passage_about(t)]} for i, t in own],
    }
    queries = write_jsonl(tmp_path / "queries.jsonl", records["instructed"])
    summaries = {}
    for name, flag in (("instructed", "how: "), ("written", "")):
        data = write_jsonl(tmp_path / f"{name}.jsonl", records[name])
        flags = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "disable_tqdm": True}
        flags["eval_query_file_jsonl_path"] = queries if name == "instructed" else data
        argv = training_flags(tiny_bert, data, tmp_path / name / "out", **flags)
        finetune.main([*argv, "--query_instruction_for_retrieval", flag])
        summaries[name] = json.loads((tmp_path / name / "out" / "training_summary.json").read_text())
    one, other = (load_file(tmp_path / name / "out" / "model.safetensors") for name in records)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for when in ("metrics_before", "metrics_after"):
        assert summaries["instructed"][when] == summaries["written"][when]
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"text": passage_about(topic)} for topic in TOPICS])
    argv = ["--model_name", tmp_path / "instructed" / "out", "--index_file_jsonl_path", pool]
    measured = evaluate.main([str(part) for part in (*argv, "--query_file_jsonl_path", queries)])
    assert measured == summaries["instructed"]["metrics_after"]


def test_an_instruction_that_fills_the_length_ends_the_run_before_training(tiny_bert, tmp_path, capsys):
    rows = [{"query": t, "pos": [passage_about(t)]} for t in TOPICS]
    rows[6]["instruction"] = "open the red light and hold it"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit) as stop:
        finetune.main(training_flags(tiny_bert, data, tmp_path / "out", query_max_len=8))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--query_max_len 8 leaves no token for the query of row 7 (counted from 1)" in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_files(tmp_path):
    """Ten and six rows, and a folder of one row."""
    rows = [{"query": f"reset the {t} {n}", "pos": [passage_about(t)]} for n in range(2) for t in TOPICS]
    (tmp_path / "folder").mkdir()
    parts = {"a.jsonl": rows[:10], "b.jsonl": rows[10:16], "folder/c.jsonl": rows[16:17]}
    for name, part in parts.items():
        write_jsonl(tmp_path / name, part)
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "folder")]


def test_with_one_file_per_batch_no_step_sees_rows_of_two_files(tiny_bert, two_files, tmp_path, monkeypatch):
    seen, compute = [], RetrievalTrainer.compute_loss

    def note_rows(self, model, inputs, *args, **kwargs):
        seen.append(inputs["rows"].tolist())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RetrievalTrainer, "compute_loss", note_rows)
    flags = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "one_file_per_batch": True, "disable_tqdm": True}
    first, *others = two_files
    argv = training_flags(tiny_bert, first, tmp_path / "out", **flags)
    finetune.main([*argv, "--train_data", *others])
    file_of = [0] * 10 + [1] * 6 + [2]
    assert all(len({file_of[row] for row in batch}) == 1 for batch in seen)
    assert [len(seen), sum(map(len, seen))] == [2 * (3 + 2 + 1), 2 * 17]
    assert sorted(row for batch in seen[:6] for row in batch) == list(range(17))
    assert seen[:6] != seen[6:]
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert (summary["rows"], summary["steps"], summary["epochs"]) == (17, 12, 2)


def test_a_run_of_one_file_per_batch_resumes_in_mid_epoch_to_the_same_bits(tiny_bert, two_files, tmp_path):
    flags = {"max_steps": 11, "per_device_train_batch_size": 4, "one_file_per_batch": True, "disable_tqdm": True}
    flags |= {"learning_rate": 1e-3, "save_steps": 8}
    for name in ("whole", "parts"):
        first, *others = two_files
        argv = training_flags(tiny_bert, first, tmp_path / name, **flags)
        finetune.main([*argv, "--train_data", *others])
    argv = training_flags(tiny_bert, first, tmp_path / "parts", **flags)
    checkpoint = str(tmp_path / "parts" / "checkpoint-8")
    finetune.main([*argv, "--train_data", *others, "--resume_from_checkpoint", checkpoint])
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_of_one_file_per_batch_goes_on_only_with_the_batches_and_files_that_it_began_with(
    tiny_bert, two_files, tmp_path, capsys
):
    first, *others = two_files
    flags = {"max_steps": 4, "per_device_train_batch_size": 4, "one_file_per_batch": True, "save_steps": 2}
    finetune.main([*training_flags(tiny_bert, first, tmp_path / "out", **flags), "--train_data", *others])
    whole = write_jsonl(
        tmp_path / "whole.jsonl", [row for name in "ab" for row in read_jsonl(tmp_path / f"{name}.jsonl")]
    )
    changed = [
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            two_files,
            "batches of 2 rows of one file",
        ),
        ({}, [str(whole), two_files[2]], "the rows in other files"),
        ({"one_file_per_batch": False}, two_files, "--one_file_per_batch"),
    ]
    for change, data, complaint in changed:
        argv = training_flags(tiny_bert, data[0], tmp_path / "out", **(flags | change), resume_from_checkpoint=True)
        with pytest.raises(SystemExit) as stop:
            finetune.main([*argv, "--train_data", *data[1:]])
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err.splitlines()[-1]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.bi_encoder.backbone.state_dict().items()}


def test_accumulated_micro_batches_give_the_mean_of_their_gradients(make_trainer):
    trainer = make_trainer(gradient_accumulation_steps=4, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0)
    before = weights(trainer)
    batches = list(make_trainer().get_train_dataloader())[:4]
    expected = make_trainer().model.train()
    for batch in batches:
        del batch["rows"], batch["cut_texts"]
        (expected(**batch)["loss"] / 4).backward()
    trainer.train()
    for name, parameter in expected.bi_encoder.backbone.named_parameters():
        if parameter.grad is not None:
            step = before[name] - weights(trainer)[name]
            assert torch.allclose(step, parameter.grad, rtol=1e-4, atol=1e-6), name


def test_bf16_keeps_parameters_and_optimizer_state_float32(make_trainer):
    trainer = make_trainer(bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    states = trainer.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


def test_training_twice_gives_the_same_weights_and_another_seed_gives_others(make_trainer):
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(seed=seed)
        trainer.train()
        runs.append(weights(trainer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_loss_of_a_step_is_that_of_scores_divided_by_the_temperature(make_trainer, temperature, normalized):
    flags = {"temperature": temperature, "normalized": normalized, "max_steps": 1}
    (batch, *_), untrained = make_trainer(**flags).get_train_dataloader(), make_trainer(**flags).bi_encoder
    texts = untrained.eval()(padded_ids(batch["texts"]), batch["texts"]["attention_mask"])  # (D, H)
    assert torch.allclose(texts.norm(dim=1), torch.ones(len(texts))) is normalized
    queries, passages = texts[batch["query_index"]], texts[batch["passage_index"].flatten()]  # (4, H), (8, H)
    loss = 0.0
    for number, query in enumerate(queries):
        scores = [(query @ passage).item() / temperature for passage in passages]
        loss += (np.logaddexp.reduce(scores) - scores[2 * number]) / 4
    assert make_trainer(**flags).train().training_loss == pytest.approx(loss, rel=1e-4)
    assert loss > 0.1


def test_epochs_differ_in_order_and_in_their_negatives(make_trainer):
    trainer = make_trainer()
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([batch["passage_ids"].tolist() for batch in loader])
    assert epochs[0] != epochs[1]
    first, second = ({ids[0]: ids[1] for batch in epoch for ids in batch} for epoch in epochs)
    assert first.keys() == second.keys()
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch_gives_the_uninterrupted_weights(make_trainer, workers):
    flags = {"max_steps": 17, "save_strategy": "steps", "save_steps": 13, "dataloader_num_workers": workers}
    whole = make_trainer("whole", **flags)
    whole.train()
    first = make_trainer("parts", **flags)
    first.train()
    again = make_trainer("parts", **flags)
    again.train(resume_from_checkpoint=str(first.args.output_dir) + "/checkpoint-13")
    assert again.state.global_step == 17
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_the_log_is_on_stderr_and_stdout_stays_empty(make_trainer, capsys):
    make_trainer(disable_tqdm=False, logging_steps=1).train()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1  loss" in captured.err


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_sub_batches_give_the_same_training_with_dropout_on(make_trainer, checkpointing):
    losses, runs = [], []
    for recompute in (False, True):
        trainer = make_trainer(
            recompute_sub_batches=recompute,
            tokens_per_sub_batch=40,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing and recompute,
            optim="sgd",
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        use_cheap_dropout(trainer.bi_encoder.backbone)
        losses.append(trainer.train().training_loss)
        runs.append(weights(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name in runs[0]:
        assert torch.allclose(runs[0][name], runs[1][name], rtol=1e-5, atol=1e-7), name


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_rows(make_trainer):
    trainer = make_trainer(train_sampling_strategy="sequential", max_steps=5)
    compute = trainer.model.forward

    def poisoned(**batch):
        output = compute(**batch)
        return {"loss": output["loss"] * float("nan")} if trainer.state.global_step == 2 else output

    trainer.model.forward = poisoned
    with pytest.raises(UserError, match=r"nan at step 3, in a batch of the rows 9, 10, 11, 12 \(counted from 1\)"):
        trainer.train()


def test_evaluating_while_training_changes_neither_weights_nor_mode(make_trainer):
    alone = make_trainer(max_steps=6)
    alone.train()
    watched = make_trainer(max_steps=6, evaluate=True, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    use_modes, forward = [], watched.model.forward

    def note_mode(**batch):
        use_modes.append(watched.bi_encoder.backbone.training)
        return forward(**batch)

    watched.model.forward = note_mode
    watched.train()
    assert use_modes == [True] * 6
    assert [entry["step"] for entry in watched.state.log_history if "eval_MRR@10" in entry] == [0, 2, 4, 6]
    for name, tensor in weights(alone).items():
        assert torch.equal(tensor, weights(watched)[name]), name


def test_the_best_weights_are_loaded_and_patience_stops_the_run(make_trainer, monkeypatch):
    scores = iter([0.1, 0.5, 0.9, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(
        "embedding_finetune.training.trainer.measure", lambda *_, **__: {"MRR@10": np.array([next(scores)])}
    )
    trainer = make_trainer(
        evaluate=True,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_on_start=True,
        early_stopping_patience=2,
    )
    result = trainer.train()
    assert trainer.state.global_step == 8  # 0.1 at 0, 0.5 at 2, 0.9 at 4, then 0.4 and 0.3
    summary = trainer.summary(result.metrics)
    assert summary["best_step"] == 4
    assert (summary["metrics_before"], summary["metrics_after"]) == ({"MRR@10": 0.1}, {"MRR@10": 0.9})
    best = load_file(f"{trainer.args.output_dir}/checkpoint-4/model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(trainer).items())


def training_flags(model, data, output, **flags):
    flags = {"model_name_or_path": model, "train_data": data, "output_dir": output, **flags}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def test_the_metrics_of_training_are_those_of_evaluate_and_stand_in_the_summary(
    tiny_bert, pairs, candidates, tmp_path, caplog
):
    output = tmp_path / "tuned"
    with caplog.at_level("INFO"):
        finetune.main(
            training_flags(
                tiny_bert,
                pairs,
                output,
                max_steps=6,
                learning_rate=1e-3,
                eval_query_file_jsonl_path=pairs,
                eval_index_file_jsonl_path=candidates,
                query_instruction_for_retrieval="how: ",
                report_to="tensorboard",
            )
        )
    summary = json.loads((output / "training_summary.json").read_text())
    flags = ("--index_file_jsonl_path", str(candidates), "--query_file_jsonl_path", str(pairs))
    assert summary["metrics_after"] == evaluate.main(["--model_name", str(output), *flags])
    instruction = ("--query_instruction_for_retrieval", "how: ")
    assert summary["metrics_before"] == evaluate.main(["--model_name", str(tiny_bert), *flags, *instruction])
    assert (summary["rows"], summary["steps"], summary["checkpoint"]) == (30, 6, str(output))
    assert summary["version"] == __version__
    assert "30 of 30 queries and 10 of 10 relevant passages are also in the training data" in caplog.text
    assert list(output.rglob("events.out.tfevents*"))


def test_without_an_index_the_positives_of_training_and_evaluation_are_searched(tiny_bert, pairs, tmp_path, caplog):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"query": "new", "pos": ["a new passage", passage_about("pump")]}])
    with caplog.at_level("INFO"):
        finetune.main(
            training_flags(tiny_bert, pairs, tmp_path / "out", max_steps=1, eval_query_file_jsonl_path=queries)
        )
    assert "1 queries, 11 distinct passages" in caplog.text
    assert "0 of 1 queries and 1 of 2 relevant passages are also in the training data" in caplog.text


@pytest.mark.parametrize(
    ("workers", "killed_after", "files"),
    [(0, 12, "one"), (2, 14, "one"), (2, 14, "one per batch")],  # an epoch has 8 steps, or 9
)
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(tiny_bert, pairs, tmp_path, workers, killed_after, files):
    flags = {
        "max_steps": 26,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "seed": 5,
        "dataloader_num_workers": workers,
        "disable_tqdm": True,
    }
    if files == "one per batch":
        lines = pairs.read_text().splitlines(keepends=True)
        (pairs := tmp_path / "data").mkdir()
        (pairs / "a.jsonl").write_text("".join(lines[:17]))
        (pairs / "b.jsonl").write_text("".join(lines[17:]))
        flags["one_file_per_batch"] = True
    finetune.main(training_flags(tiny_bert, pairs, tmp_path / "whole", **flags))

    flags |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    killed = f"""
import os, signal, finetune
from embedding_finetune.training import trainer
compute = trainer.RetrievalTrainer.compute_loss
def compute_and_die(self, *args, **kwargs):
    loss = compute(self, *args, **kwargs)
    if self.state.global_step == {killed_after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
trainer.RetrievalTrainer.compute_loss = compute_and_die
finetune.main({training_flags(tiny_bert, pairs, tmp_path / "parts", **flags)!r})
"""
    process = subprocess.run([*quick_python(), "-c", killed], cwd=REPOSITORY, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert last_checkpoint(tmp_path / "parts") == str(tmp_path / "parts" / "checkpoint-12")
    assert not (tmp_path / "parts" / "training_summary.json").exists()
    finetune.main(training_flags(tiny_bert, pairs, tmp_path / "parts", resume_from_checkpoint=True, **flags))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(
        whole["encoder.layer.0.output.dense.weight"],
        load_file(tiny_bert / "model.safetensors")["encoder.layer.0.output.dense.weight"],
    )


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, state in ((3, "{}"), (12, "{}"), (15, '{"half'), (18, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-12")
    assert last_checkpoint(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"eval_strategy": "steps"}, "--eval_query_file_jsonl_path"),
        ({"eval_index_file_jsonl_path": "x"}, "--eval_query_file_jsonl_path"),
        ({"eval_query_file_jsonl_path": "no.jsonl"}, "--eval_query_file_jsonl_path: no.jsonl does not exist"),
        ({"early_stopping_patience": "0"}, "--early_stopping_patience"),
        ({"early_stopping_patience": "2"}, "eval"),
        ({"resume_from_checkpoint": "True"}, "holds no finished checkpoint"),
        ({"resume_from_checkpoint": "no_folder"}, "--resume_from_checkpoint no_folder"),
        ({"torch_compile": "True"}, "--torch_compile"),
        ({"report_to": "wandb"}, "wandb"),
        ({"neighbours_in_batch": "-1"}, "--neighbours_in_batch -1"),
        ({"neighbours_in_batch": "2", "per_device_train_batch_size": "1"}, "--per_device_train_batch_size"),
        ({"neighbours_in_batch": "2", "use_inbatch_neg": "False"}, "--use_inbatch_neg"),
        ({"neighbours_in_batch": "2", "train_sampling_strategy": "sequential"}, "--train_sampling_strategy"),
        ({"neighbours_in_batch": "2"}, "--neighbours_in_batch: no row's negatives are positives of other rows"),
        ({"one_file_per_batch": "True", "per_device_train_batch_size": "1"}, "--per_device_train_batch_size"),
        ({"one_file_per_batch": "True", "use_inbatch_neg": "False"}, "--use_inbatch_neg"),
    ],
)
def test_flags_that_could_not_do_anything_are_refused(tiny_bert, pairs, tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit) as stop:
        finetune.main(training_flags(tiny_bert, pairs, tmp_path / "out", **flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert complaint in error
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


def test_position_embeddings_can_be_kept_as_they_are(tiny_bert, pairs, tmp_path):
    finetune.main(training_flags(tiny_bert, pairs, tmp_path / "out", max_steps=2, fix_position_embedding=True))
    before, after = load_file(tiny_bert / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(before["embeddings.position_embeddings.weight"], after["embeddings.position_embeddings.weight"])
    assert not torch.equal(before["embeddings.word_embeddings.weight"], after["embeddings.word_embeddings.weight"])


def test_a_huge_group_size_trains_as_one_that_the_rows_can_fill(tiny_bert, tmp_path):
    rows = [
        {"query": f"my {topic} is red", "pos": [passage_about(topic)], "neg": [f"{topic} light {n}" for n in range(2)]}
        for topic in TOPICS
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    weights = []
    for size in ("3", "2147483647"):
        output = tmp_path / size
        argv = ["--model_name_or_path", tiny_bert, "--train_data", data, "--output_dir", output, "--max_steps", "2"]
        finetune.main([str(part) for part in (*argv, "--train_group_size", size, "--per_device_train_batch_size", "4")])
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
