"""Fixtures: a tiny random model, a small made-up data set, the real demo model."""

import os
import signal
from pathlib import Path

import pytest
from helpers.data import DEMO_MODEL, TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.tiny import make_tiny_bert, make_tiny_reranker
from hypothesis import settings

# Under nohup, or in the background of a script, the tests and their processes would inherit that these are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes depends on what else the machine does.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Nothing in the tests may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA GPU")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="session")
def other_bert(tmp_path_factory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny") / "other", seed=7)


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory) -> Path:
    return make_tiny_reranker(tmp_path_factory.mktemp("tiny") / "reranker")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    if not (DEMO_MODEL / "model.safetensors").exists():
        pytest.skip("the demo model is not there: `make .demo/model` fetches it")
    return DEMO_MODEL


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Thirty training rows, three questions for each of ten passages."""
    questions = ("how do i reset the {}?", "my {} is red", "who do i call for the {}")
    return write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {"query": question.format(topic), "pos": [passage_about(topic)], "source": topic}
            for topic in TOPICS
            for question in questions
        ],
    )


@pytest.fixture
def candidates(tmp_path) -> Path:
    return write_jsonl(tmp_path / "candidates.jsonl", [{"context": [passage_about(topic)]} for topic in TOPICS])


@pytest.fixture
def mined(pairs, tmp_path) -> Path:
    """The rows of `pairs`, each with four negatives: positives of other rows."""
    rows = read_jsonl(pairs)
    others = [[other["pos"][0] for other in rows if other["pos"] != row["pos"]] for row in rows]
    return write_jsonl(tmp_path / "mined.jsonl", [{**row, "neg": own[:4]} for row, own in zip(rows, others)])


@pytest.fixture
def encoded(monkeypatch):
    """The texts that went through the tokenizer, and so through the model."""
    from embedding_finetune.model.tokens import TextKind

    seen = []
    tokenize = TextKind.tokenize

    def counting(kind, tokenizer, texts, instructions=None):
        seen.extend(texts)
        return tokenize(kind, tokenizer, texts, instructions)

    monkeypatch.setattr(TextKind, "tokenize", counting)
    return seen
