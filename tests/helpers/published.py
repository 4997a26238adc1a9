"""Checkpoints of well-known embedding models with random weights: their classes, config values and side files.

Sizes are the published ones, or small for quick tests; everything else is as published. A tokenizer knows few words
always: which ones plays no part in what is tested.
"""

import json
from pathlib import Path
from typing import NamedTuple

from helpers.tiny import WORDS

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
QWEN = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
MODERN = {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12}

VOCABULARY = {"Bert": 30522, "MPNet": 30527}

BGE_QUERY = "Represent this sentence for searching relevant passages: "
QWEN_QUERY = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


class Published(NamedTuple):
    """One model: its config class and sizes, how it pools, and what it asks for.

    prompts: those in its files. instructions: those that its model card asks for in flags, query's and passage's.
    """

    kind: str
    size: dict
    pooling: str = "mean"
    max_seq_length: int = 512
    prompts: dict = {}  # noqa: RUF012
    instructions: tuple[str, str] = ("", "")
    padding_side: str = "right"


VERIFIED = {
    "bge-large-en-v1.5": Published("Bert", LARGE, "cls", instructions=(BGE_QUERY, "")),
    "bge-base-en-v1.5": Published("Bert", BASE, "cls", instructions=(BGE_QUERY, "")),
    "gte-large": Published("Bert", LARGE),
    "gte-base": Published("Bert", BASE),
    "stella-base-en-v2": Published("Bert", BASE),
    "e5-large-v2": Published("Bert", LARGE, instructions=("query: ", "passage: ")),
    "all-mpnet-base-v2": Published("MPNet", BASE, max_seq_length=384),
}
FURTHER = {
    "bge-m3": Published("XLMRoberta", LARGE, "cls", max_seq_length=8192),
    "multilingual-e5-base": Published("XLMRoberta", BASE, instructions=("query: ", "passage: ")),
    "modernbert-embed-base": Published("ModernBert", MODERN, instructions=("search_query: ", "search_document: ")),
    "distilbert-base": Published("DistilBert", BASE),
    "qwen3-embedding-0.6b": Published("Qwen3", QWEN, "lasttoken", prompts={"query": QWEN_QUERY}, padding_side="left"),
    "qwen3, padded right": Published("Qwen3", QWEN, "lasttoken", prompts={"query": QWEN_QUERY}),
}


def make(name: str, folder: Path, *, full_size: bool = False) -> Path:
    """Save the model of that name with random weights."""
    import torch
    import transformers

    published = (VERIFIED | FURTHER)[name]
    tokenizer = make_tokenizer(published)
    torch.manual_seed(0)
    config = make_config(published, len(tokenizer), full_size=full_size)
    model = getattr(transformers, f"{published.kind}Model")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_side_files(folder, published, config.hidden_size)
    return folder


def make_config(published: Published, vocabulary: int, *, full_size: bool):
    import transformers

    size = published.size if full_size else SMALL
    positions = published.max_seq_length + (2 if published.kind in ("MPNet", "XLMRoberta") else 0)
    options = {"vocab_size": vocabulary, "max_position_embeddings": positions, **size}
    if full_size:
        options["vocab_size"] = VOCABULARY[published.kind]
    else:
        options["initializer_range"] = 0.2  # the published 0.02 makes small random models embed all texts alike
    if published.kind == "DistilBert":
        names = {"hidden_size": "dim", "intermediate_size": "hidden_dim"}
        names |= {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        options = {names.get(option, option): value for option, value in options.items()}
    if published.kind == "XLMRoberta":
        options |= {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    if published.kind == "MPNet":
        options |= {"pad_token_id": 1, "layer_norm_eps": 1e-5}
    if published.kind == "ModernBert":
        options |= {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    if published.kind == "Qwen3":
        options |= {"num_key_value_heads": options["num_attention_heads"] // 2, "head_dim": 128 if full_size else 16}
        options |= {"pad_token_id": None, "eos_token_id": 0, "bos_token_id": None}
    return getattr(transformers, f"{published.kind}Config")(**options)


def make_tokenizer(published: Published):
    """A tokenizer of the model's own class."""
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import BPE

    letters = [f"{prefix}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    pieces = [*WORDS, *letters]
    options = {"model_max_length": published.max_seq_length, "padding_side": published.padding_side}
    if published.kind in ("Bert", "DistilBert"):
        vocabulary = ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])
        return transformers.BertTokenizer(vocab=vocabulary, **options)
    if published.kind == "MPNet":
        return transformers.MPNetTokenizer(vocab=ids(["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *pieces]), **options)
    if published.kind == "XLMRoberta":
        words = [piece.removeprefix("##") for piece in pieces]
        scored = [(piece, -float(len(piece) == 1)) for word in words for piece in (word, f"▁{word}")]
        vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("<mask>", 0.0)]
        return transformers.XLMRobertaTokenizer(
            vocab=[*vocabulary[:5], *dict(scored).items(), vocabulary[5]], **options
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if published.kind == "ModernBert":
        special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
        backend = Tokenizer(BPE(vocab=ids([*special.values(), *alphabet]), merges=[], unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)
    tokenizer = transformers.Qwen2Tokenizer(vocab=ids(["<|endoftext|>", *alphabet]), merges=[], **options)
    # As Qwen3-Embedding's: the end of the text is a token, and the one that is pooled.
    end = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[end]
    )
    return tokenizer


def ids(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def write_side_files(folder: Path, published: Published, dimensions: int) -> None:
    """What sentence-transformers reads, in its old spelling."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    flags = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    pooling = {f"pooling_mode_{flag}": method == published.pooling for method, flag in flags.items()}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": dimensions, **pooling},
        "sentence_bert_config.json": {"max_seq_length": published.max_seq_length, "do_lower_case": False},
    }
    if published.prompts:
        files["config_sentence_transformers.json"] = {"prompts": published.prompts, "default_prompt_name": None}
    (folder / "1_Pooling").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
