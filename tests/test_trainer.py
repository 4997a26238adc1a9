import pytest
import torch
from conftest import TOPICS, make_tiny_bert, passage_about, write_jsonl

from embedding_finetune.data import EmbedCollator, TrainDataset, load_rows
from embedding_finetune.model import BiEncoder, load_backbone
from embedding_finetune.trainer import RetrievalTrainer
from embedding_finetune.training_arguments import RetrieverTrainingArguments


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

    def make(name="out", group_size=2, temperature=0.1, **flags):
        backbone, tokenizer, config = load_backbone(str(model_folder), flag="--model")
        args = RetrieverTrainingArguments(
            output_dir=str(tmp_path / name),
            **{
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "max_steps": 3,
                "save_strategy": "no",
                "disable_tqdm": True,
                **flags,
            },
        )
        return RetrievalTrainer(
            BiEncoder(backbone, config, temperature=temperature, use_inbatch_neg=args.use_inbatch_neg),
            args,
            train_dataset=TrainDataset(load_rows(str(data)), group_size=group_size, seed=args.seed),
            data_collator=EmbedCollator(tokenizer, config, group_size=group_size, query_max_len=16, passage_max_len=32),
            saved_config=config,
        )

    return make


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.backbone.state_dict().items()}


def test_accumulated_micro_batches_give_the_mean_of_their_gradients(make_trainer):
    trainer = make_trainer(gradient_accumulation_steps=4, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0)
    before = weights(trainer)
    batches = list(make_trainer().get_train_dataloader())[:4]
    expected = make_trainer().model.train()
    for batch in batches:
        del batch["rows"]
        (expected(**batch)["loss"] / 4).backward()
    trainer.train()
    for name, parameter in expected.backbone.named_parameters():
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


def test_the_temperature_changes_the_training_also_without_normalisation(make_trainer):
    losses = []
    for temperature in (0.5, 1.0):
        trainer = make_trainer(temperature=temperature)
        trainer.model.embedding_config = trainer.model.embedding_config.with_flags(normalized=False)
        losses.append(trainer.train().training_loss)
    assert losses[0] != losses[1]


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
