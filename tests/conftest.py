"""Fixtures: tiny random models made on the spot, a small made-up data set, the real demo model."""

import json
import os
from pathlib import Path

import pytest

# Nothing in the tests may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_MODEL = REPOSITORY / ".demo" / "model"

WORDS = """
how do i reset the pump valve filter motor gate panel sensor alarm pressure light red green blue handle form
request leave travel badge desk week month claim expense open close clean replace check press hold seconds minutes
north south hall yard store keeper before after every call line a an of to for in on is it what who when where my
our with and or not no yes . , ? : 0 1 2 3 4 5 6 7 8 9 ##s ##ing ##ed ##er ##a ##b
""".split()

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}

TOPICS = ("pump", "valve", "filter", "motor", "gate", "panel", "sensor", "alarm", "badge", "desk")


def make_tokenizer(*, lower_case: bool = True, padding_side: str = "right", model_max_length: int = 128):
    """A WordPiece tokenizer over WORDS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [f"{prefix}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(special + WORDS + letters))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=model_max_length,
        padding_side=padding_side,
    )


def make_tiny_bert(folder: Path, *, seed: int = 0, dropout: float = 0.1, **tokenizer_options) -> Path:
    """Save a random 2-layer BERT without sentence-transformers files."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer(**tokenizer_options)
    torch.manual_seed(seed)
    config = BertConfig(
        **TINY,
        vocab_size=len(tokenizer),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1,  # the default, 0.02, makes random embeddings nearly equal
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_reranker(folder: Path, *, logits: int = 1) -> Path:
    """Save a random 2-layer BERT with a classification head."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(**TINY, vocab_size=len(tokenizer), num_labels=logits, initializer_range=0.3)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    if not (DEMO_MODEL / "model.safetensors").exists():
        pytest.skip("the demo model is not there: `make .demo/model` fetches it")
    return DEMO_MODEL


def encoding_arguments(*flags: str):
    """The flags that load_encoder and load_reranker take."""
    import argparse

    from embedding_finetune.arguments import add_encoding_arguments

    parser = argparse.ArgumentParser()
    add_encoding_arguments(parser)
    return parser.parse_args(flags)


def passage_about(topic: str) -> str:
    number = TOPICS.index(topic)
    return f"To reset the {topic} press the red handle and hold it for {number} seconds. Call the {topic} desk."


def search(queries, passages, top_k, *, ties="first"):
    """Scores and positions of the top k of one array of passages."""
    from embedding_finetune.retrieval.top_k import TopK

    top = TopK(queries, top_k, ties=ties)
    top.add(0, passages)
    positions, scores = top.ranking()
    return scores, positions


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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


def make_rotary_model(folder: Path, *, padding_side: str = "right") -> Path:
    """Save a random 2-layer ModernBERT: rotary positions, so that either padding side gives the same states."""
    import torch
    from transformers import ModernBertConfig, ModernBertModel

    tokenizer = make_tokenizer(padding_side=padding_side)
    torch.manual_seed(0)
    config = ModernBertConfig(
        **TINY,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.4,
    )
    ModernBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
