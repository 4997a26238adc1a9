"""Where models run: what the machine has, not what torch was built for; and what happens when its memory ends."""

import numpy as np
import pytest
import torch
from helpers.data import TOPICS, passage_about, read_jsonl
from helpers.running import embed_passages, encoder_for, encoding_arguments
from helpers.tiny import make_tiny_bert, make_tiny_reranker

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.model.encoding_kernels import is_out_of_memory, prepare_for_encoding, working_device
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.retrieval.encoder import default_tokens_per_batch
from embedding_finetune.retrieval.reranker import load_reranker

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
    assert default_tokens_per_batch(torch.device("mps")) == 8192
    whole = embed_passages(encoder_for(tiny_bert), TEXTS)
    encoder = encoder_for(tiny_bert)
    encode = encoder.model.forward

    def small(input_ids, attention_mask):
        if input_ids.numel() > 100:
            raise RuntimeError(MPS_ERROR)
        return encode(input_ids, attention_mask)

    monkeypatch.setattr(encoder.model, "forward", small)
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
    assert reranker.tokens_per_batch <= 150
    monkeypatch.setattr(reranker.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        reranker.scores(["pump"], ["valve"])


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
