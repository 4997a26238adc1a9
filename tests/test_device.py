"""Where models run: what the machine has, not what torch was built for; and what happens when its memory ends.

And what a GPU would say: no tensor meets one of another device, and the host hardly waits. See pretend_cuda.py.
"""

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about, read_jsonl
from helpers.pretend_cuda import move, moved, pretend_cuda
from helpers.running import embed_passages, encoder_for, encoding_arguments
from helpers.tiny import make_tiny_bert, make_tiny_reranker, make_tokenizer
from helpers.training import train, write_rows

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.model import packing
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.checkpoint import EmbeddingConfig
from embedding_finetune.model.encoding_kernels import (
    is_out_of_memory,
    leave_out_pooler,
    prepare_for_encoding,
    working_device,
)
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import PackedLayout, PaddedLayout
from embedding_finetune.model.training_kernels import set_dropout, use_cheap_dropout
from embedding_finetune.retrieval import token_encoder
from embedding_finetune.retrieval.budget import TokenBudget
from embedding_finetune.retrieval.reranker import load_reranker
from embedding_finetune.retrieval.tower import Tower
from embedding_finetune.training import loss_watch
from embedding_finetune.training.arguments import RetrieverTrainingArguments
from embedding_finetune.training.batches import EmbedCollator, TrainExample
from embedding_finetune.training.flag_errors import memory_errors_name_the_remedy
from embedding_finetune.training.loss import LossOptions, RetrievalLoss
from embedding_finetune.training.loss_watch import LossWatch

TEXTS = [passage_about(topic) * repeat for topic in TOPICS for repeat in (1, 2)] + ["a", "press"]


@pytest.fixture
def torch_built_for_cuda(monkeypatch):
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    assert torch.accelerator.current_accelerator().type == "cuda"
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")


def test_all_three_scripts_run_on_the_cpu_where_torch_is_built_for_cuda(
    torch_built_for_cuda, tiny_bert, pairs, candidates, tmp_path, monkeypatch
):
    mined, tuned, reranker = tmp_path / "mined.jsonl", tmp_path / "tuned", make_tiny_reranker(tmp_path / "reranker")
    mining = f"--model_name_or_path {tiny_bert} --input_file {pairs} --output_file {mined} --range_for_sampling 0-5"
    mine_hard_neg.main([*mining.split(), "--negative_number", "2", "--reranker_name_or_path", str(reranker)])
    assert len(read_jsonl(mined)) == 30
    training = f"--model_name_or_path {tiny_bert} --train_data {mined} --output_dir {tuned} --max_steps 2 --bf16 True"
    finetune.main([*training.split(), "--per_device_train_batch_size", "4", "--train_group_size", "2"])
    files = ["--index_file_jsonl_path", str(candidates), "--query_file_jsonl_path", str(pairs)]
    metrics = evaluate.main(["--model_name", str(tuned), *files])
    assert metrics["MRR@10"] > 0
    monkeypatch.undo()
    assert evaluate.main(["--model_name", str(tuned), *files]) == metrics


def test_an_accelerator_that_is_there_is_used(monkeypatch):
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert working_device() == torch.device("cuda")


def test_weights_change_precision_before_they_move(tiny_bert, monkeypatch):
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    moved = []
    monkeypatch.setattr(backbone, "to", lambda device: moved.append({p.dtype for p in backbone.parameters()}))
    prepare_for_encoding(backbone, dtype=torch.float16, device=torch.device("cpu"), torch_compile=False)
    assert moved == [{torch.float16}]


MPS_ERROR = "MPS backend out of memory (MPS allocated: 17.9 GiB, max allowed: 18.1 GiB). Tried to allocate 1 GiB"


def test_only_what_says_that_memory_has_ended_counts_as_that():
    assert is_out_of_memory(RuntimeError(MPS_ERROR))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("something else"))


def test_running_out_of_memory_on_mps_halves_the_batch_too(tiny_bert, monkeypatch, caplog):
    assert TokenBudget(None, torch.device("mps")).tokens == 8192
    whole = embed_passages(encoder_for(tiny_bert), TEXTS)
    encoder = encoder_for(tiny_bert)
    encode = encoder.passages.model.forward

    def small(input_ids, attention_mask):
        if input_ids.numel() > 100:
            raise RuntimeError(MPS_ERROR)
        return encode(input_ids, attention_mask)

    monkeypatch.setattr(encoder.passages.model, "forward", small)
    assert np.array_equal(embed_passages(encoder, TEXTS), whole)
    assert "out of GPU memory: --tokens_per_batch is" in caplog.text


def test_a_reranker_that_runs_out_of_memory_halves_its_batch(tmp_path, monkeypatch, caplog):
    folder = make_tiny_reranker(tmp_path / "reranker")
    whole = load_reranker(str(folder), encoding_arguments()).scores(["pump"] * len(TEXTS), TEXTS)
    reranker = load_reranker(str(folder), encoding_arguments())
    forward = reranker.model.forward

    def small(input_ids, **rest):
        if input_ids.numel() > 150:
            raise RuntimeError(MPS_ERROR)
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(reranker.model, "forward", small)
    assert np.array_equal(reranker.scores(["pump"] * len(TEXTS), TEXTS), whole)
    assert reranker.budget.tokens <= 150
    monkeypatch.setattr(reranker.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        reranker.scores(["pump"], ["valve"])


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


class RunsOutInTheBackwardPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings):
        return embeddings.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(MPS_ERROR)


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_running_out_of_memory_in_training_is_one_line_with_the_flags_that_save_it(
    where, tiny_bert, tmp_path, monkeypatch, capsys
):
    if where == "forward":
        monkeypatch.setattr(RetrievalLoss, "forward", out_of_memory)
    elif where == "backward":
        encode = BiEncoder.encode_in_sub_batches
        monkeypatch.setattr(
            BiEncoder,
            "encode_in_sub_batches",
            lambda *texts, **options: RunsOutInTheBackwardPass.apply(encode(*texts, **options)),
        )
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    with pytest.raises(SystemExit) as exit:
        train(tiny_bert, write_rows(tmp_path), tmp_path / "tuned")
    assert exit.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert "error: out of GPU memory: give --recompute_sub_batches True" in errors[0]
    assert "--tokens_per_sub_batch" in errors[0]
    assert errors[0].endswith("a --per_device_train_batch_size below 5")


@pytest.mark.parametrize(
    ("flags", "remedies"),
    [
        ({}, "--tokens_per_sub_batch 4096, or a --per_device_train_batch_size below 8, or --bf16 True, or --lora_rank"),
        ({"tokens_per_sub_batch": 512}, "a --tokens_per_sub_batch below 512, or a --per_device_train_batch_size"),
        ({"bf16": True, "lora_rank": 4}, "--tokens_per_sub_batch 4096, or a --per_device_train_batch_size below 8$"),
    ],
)
def test_where_a_remedy_was_taken_the_next_one_is_named(flags, remedies, tmp_path):
    args = RetrieverTrainingArguments(output_dir=str(tmp_path), recompute_sub_batches=True, **flags)
    with pytest.raises(UserError, match=f"^out of GPU memory: give {remedies}"), memory_errors_name_the_remedy(args):
        out_of_memory()
    with pytest.raises(RuntimeError, match="another"), memory_errors_name_the_remedy(args):
        raise RuntimeError("another")


def test_running_out_of_memory_in_an_evaluation_blames_no_flag_of_training(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("embedding_finetune.training.trainer.measure", out_of_memory)
    with pytest.raises(SystemExit) as exit:
        train(tiny_bert, write_rows(tmp_path), tmp_path / "out", "--hold_out", "3")
    assert exit.value.code == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .endswith("error: out of GPU memory in an evaluation: use a GPU that nothing else uses")
    )


def test_a_loss_that_is_no_number_is_told_before_its_weights_are_measured(tiny_bert, tmp_path, monkeypatch, capsys):
    """The last loss has not come yet when the evaluation begins."""

    def send(losses, loss, *, step, rows):
        value = torch.tensor(float("nan") if step == 3 else 1.0)
        losses._on_their_way.append(loss_watch._Seen(value, step, rows, None))

    monkeypatch.setattr(LossWatch, "look_at", send)
    flags = ("--hold_out", "3", "--eval_strategy", "steps", "--eval_steps", "3")
    with pytest.raises(SystemExit) as exit:
        train(tiny_bert, write_rows(tmp_path), tmp_path / "out", *flags)
    assert exit.value.code == 2
    assert "the loss is nan at step 3, in a batch of the rows" in capsys.readouterr().err


LONG = "reset the pump valve filter motor gate panel sensor alarm pressure light " * 4


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_an_instruction_that_fills_the_length_ends_every_script_in_one_line(kind, tmp_path, pairs, candidates, capsys):
    model = make_tiny_bert(tmp_path / "bert")
    flags = [f"--{kind}_instruction_for_retrieval", LONG, f"--{kind}_max_len", "32"]
    runs = {
        mine_hard_neg: f"--model_name_or_path {model} --input_file {pairs} --output_file {tmp_path / 'mined.jsonl'}",
        finetune: f"--model_name_or_path {model} --train_data {pairs} --output_dir {tmp_path / 'tuned'}",
        evaluate: f"--model_name {model} --index_file_jsonl_path {candidates} --query_file_jsonl_path {pairs}",
    }
    for script, argv in runs.items():
        with pytest.raises(SystemExit) as exit:
            script.main([*argv.split(), *flags])
        assert exit.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"error: --{kind}_max_len 32 leaves no token for the {kind} itself: --{kind}_instruction_for" in last
        assert "50 of them" in last  # 12 words four times, [CLS] and [SEP]
    assert not (tmp_path / "mined.jsonl").exists()


FLAGS = {
    "plain": {},
    "own groups": {"use_inbatch_neg": False},
    "matryoshka": {"matryoshka": {32: 1.0, 8: 0.5}},
    "margin": {"false_negative_margin": 0.1},
    "teacher": {"distillation_weight": 0.5},
}


def training_batch(layout, with_teacher, prompts):
    """A batch of four rows, each with a negative, as the collator makes it, without what stays on the host."""
    config = EmbeddingConfig(query_instruction="how: " if prompts else "", include_prompt=not prompts)
    lengths = {"query_max_len": 32, "passage_max_len": 64}
    tokenizer = make_tokenizer(padding_side="left" if layout == "left" else "right")
    chosen = PackedLayout(0, 60) if layout == "packed" else PaddedLayout(tokenizer, 64, 60, 10)
    collator = EmbedCollator(tokenizer, config, group_size=2, **lengths, layout=chosen, with_teacher=with_teacher)
    examples = [
        TrainExample(
            row=row, query=topic, instruction=None, passages=[passage_about(topic) * (1 + row), topic],
            passage_ids=[row, 10 + row], known_ids=np.array([row]), confirmed_ids=[10 + (row + 1) % 4],
            teacher_scores=[2.0, 1.0], weight=1.0,
        )
        for row, topic in enumerate(TOPICS[:4])
    ]  # fmt: skip
    batch = collator(examples)
    return {name: value for name, value in batch.items() if name not in ("rows", "cut_texts")}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_training_meets_no_other_device_hardly_waits_and_gives_the_cpus_gradients(
    tiny_bert, monkeypatch, layout, flags, recompute
):
    monkeypatch.setattr(packing, "_by_kernel", attention_without_waits)
    batch = training_batch(layout, flags == "teacher", prompts=flags == "margin")
    assert len(batch["texts"]["sub_batches"]) >= 4
    gradients = []
    for on_gpu in (False, True):
        backbone, _, config = load_backbone(str(tiny_bert), flag="--model")
        set_dropout(backbone, 0.0)
        use_cheap_dropout(backbone)
        if layout == "packed":
            backbone.set_attn_implementation("packed")
        model = BiEncoder(backbone.train(), config.with_flags(pooling="mean"))
        loss = RetrievalLoss(model, LossOptions(temperature=0.1, **FLAGS[flags]), recompute_sub_batches=recompute)
        if not on_gpu:
            loss(**batch)["loss"].backward()
            gradients.append([p.grad for p in loss.parameters() if p.grad is not None])
            continue
        move(loss)
        there = moved(batch)
        with pretend_cuda(monkeypatch) as recorded:
            value = loss(**there)["loss"]
            assert recorded.total() <= 2, recorded.waits
            assert not recorded.copies
            value.backward()
        assert not recorded.copies
        gradients.append([p.grad.held for p in loss.parameters() if p.grad is not None])
    for expected, found in zip(*gradients, strict=True):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-6)


def attention_without_waits(query, key, value, boundaries, *rest):
    """Attention text by text, in place of the kernel; the host is taken to know the boundaries."""
    return packing.text_by_text(query, key, value, getattr(boundaries, "held", boundaries), *rest)


@pytest.mark.parametrize("packed", [False, True])
def test_encoding_copies_each_batch_there_and_home_and_waits_for_nothing_else(tiny_bert, monkeypatch, packed):
    monkeypatch.setattr(packing, "_by_kernel", attention_without_waits)
    expected = embed_passages(encoder_for(tiny_bert, "--dtype", "float32"), TEXTS)
    encoder = encoder_for(tiny_bert, "--dtype", "float32")
    backbone, _, _ = load_backbone(str(tiny_bert), flag="--model")
    leave_out_pooler(backbone)
    use_cheap_dropout(backbone)
    if packed:
        backbone.set_attn_implementation("packed")
    model = move(BiEncoder(backbone, encoder.passages.model.embedding_config).eval())
    there = Tower(
        model, encoder.passages.tokenizer, query_max_len=128, passage_max_len=128, tokens_per_batch=100,
        packed_from=0 if packed else None,
    )  # fmt: skip
    batches = []
    embed = model.embed_packed if packed else model.forward
    monkeypatch.setattr(
        model,
        "embed_packed" if packed else "forward",
        lambda *args, **named: batches.append(1) or embed(*args, **named),
    )
    with pretend_cuda(monkeypatch) as recorded:
        found = np.concatenate([block for _, block in there.encode_passages(TEXTS)])
    assert recorded.waits == {}
    assert len(batches) > 3
    assert recorded.copies["home"] == len(batches)
    assert recorded.copies["there"] == (3 if packed else 2) * len(batches)
    assert np.allclose(found, expected, atol=1e-5)


def test_one_batch_is_in_flight_while_the_next_is_put_together(tiny_bert, monkeypatch):
    encoder, happened = encoder_for(tiny_bert, "--tokens_per_batch", "100"), []
    forward = encoder.passages.model.forward
    monkeypatch.setattr(encoder.passages.model, "forward", lambda **batch: happened.append("start") or forward(**batch))
    arrived = token_encoder._InFlight.arrived
    monkeypatch.setattr(token_encoder._InFlight, "arrived", lambda part: happened.append("end") or arrived(part))
    embed_passages(encoder, TEXTS)
    count = len(happened) // 2
    assert happened == ["start", "start", *["end", "start"] * (count - 2), "end", "end"]
    assert count > 2
