"""What the sections of gpu.py share: models with random weights, texts and rows for them, clocks."""

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
GPU = torch.cuda.is_available()
HALF = "bfloat16" if GPU else "float32"
BLOCK = 32_768
QUERY_TOKENS, PASSAGE_TOKENS = (2.43, 0.30), (4.46, 0.48)
"""Mean and deviation of the logarithm of the number of tokens, counted in 3,000 rows of make_debian.py."""
_TOKENS_PER_WORD = 1.25
_LONGEST = 510


@dataclass(frozen=True)
class Size:
    """The shape of a BERT."""

    hidden: int
    layers: int
    heads: int

    @property
    def parameters(self) -> int:
        """Those of the layers: what a token is multiplied with."""
        return 12 * self.hidden**2 * self.layers


SIZES = {
    "minilm": Size(384, 6, 12),
    "bge-base": Size(768, 12, 12),
    "bge-large": Size(1024, 24, 16),
}
TINY = Size(32, 2, 2)


def words() -> tuple[list[str], dict[str, int]]:
    """Made-up words, the frequent ones first, and a WordPiece vocabulary of 30,522 tokens that knows them."""
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    tokens += ["##" + syllable for syllable in syllables]
    made: dict[str, None] = {}
    while len(tokens) + len(made) < 30_522:
        made["".join(rng.choice(syllables, rng.integers(2, 5)))] = None
    whole = list(made)
    return whole, {token: number for number, token in enumerate([*tokens, *whole])}


def texts(count: int, tokens: tuple[float, float], *, seed: int) -> list[str]:
    """Texts whose numbers of tokens have this distribution; a fourth of the words is of two tokens."""
    rng = np.random.default_rng(seed)
    whole, _ = words()
    frequency = 1 / np.arange(1, len(whole) + 1)
    lengths = np.clip(rng.lognormal(*tokens, count), 3, _LONGEST)
    sizes = np.maximum((lengths / _TOKENS_PER_WORD).astype(int), 1)
    drawn = rng.choice(len(whole), sizes.sum(), p=frequency / frequency.sum())
    is_long = rng.random(sizes.sum()) < _TOKENS_PER_WORD - 1
    flat = [whole[number] + ("ka" if long else "") for number, long in zip(drawn.tolist(), is_long.tolist())]
    ends = sizes.cumsum()
    return [" ".join(flat[end - size : end]) for size, end in zip(sizes.tolist(), ends.tolist())]


def model_folder(folder: Path, name: str) -> Path:
    """The model of a size, with mean pooling, as a folder, which the first call makes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = folder / name
    if path.exists():
        return path
    size, (_, vocabulary) = SIZES[name] if GPU else TINY, words()
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "pad", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        initializer_range=0.05,
    )
    with torch.device("cuda" if GPU else "cpu"):  # random numbers are drawn faster there
        model = BertModel(config)
    model.cpu().save_pretrained(path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512, "do_lower_case": False}))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": size.hidden, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def training_file(folder: Path, *, rows: int, negatives: int) -> Path:
    """Rows of a query, a positive and so many negatives."""
    path = folder / f"rows_{rows}_{negatives}.jsonl"
    if not path.exists():
        queries = texts(rows, QUERY_TOKENS, seed=1)
        passages = texts(rows * (1 + negatives), PASSAGE_TOKENS, seed=2)
        with path.open("w") as file:
            for number, query in enumerate(queries):
                own = passages[number * (1 + negatives) : (number + 1) * (1 + negatives)]
                file.write(json.dumps({"query": query, "pos": own[:1], "neg": own[1:]}) + "\n")
    return path


def allow_older_transformers() -> None:
    """Let the suite find what transformers 5.17 calls by other names."""
    from transformers import TrainingArguments

    for new, old in [("activation_checkpointing", "gradient_checkpointing")]:
        for ending in ("", "_kwargs"):
            if not hasattr(TrainingArguments, new + ending):
                setattr(TrainingArguments, new + ending, property(lambda self, name=old + ending: getattr(self, name)))


@contextmanager
def packed_if(allowed: bool) -> Iterator[None]:
    """Let texts lie end to end where that is possible, or nowhere."""
    from embedding_finetune.model import packing

    serves = packing.kernel_serves
    if not allowed:
        packing.kernel_serves = lambda *_: False
    try:
        yield
    finally:
        packing.kernel_serves = serves


@contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    """Let torch's attention consider cuDNN's kernels, or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def encoder_of(folder: Path, name: str, dtype: str, tokens_per_batch: int | None = None) -> Iterator[Any]:
    """The suite's Encoder of a model."""
    from embedding_finetune.retrieval.arguments import EncodingOptions
    from embedding_finetune.retrieval.encoder import load_encoder

    options = EncodingOptions(dtype=dtype, tokens_per_batch=tokens_per_batch)  # type: ignore[arg-type]
    yield load_encoder(str(model_folder(folder, name)), options, flag="--model")
    if GPU:
        torch.cuda.empty_cache()


def trainer_of(folder: Path, name: str, *flags: str, batch: int, group: int, steps: int, output: str) -> Any:
    """finetune.py's trainer."""
    from embedding_finetune.training.parser import parse_arguments
    from embedding_finetune.training.run_data import prepare, read_rows
    from embedding_finetune.training.setup import make_trainer

    data = training_file(folder, rows=batch * steps, negatives=group - 1)
    given = f"--model_name_or_path {model_folder(folder, name)} --train_data {data} --output_dir {output}/tuned"
    given += f" --per_device_train_batch_size {batch} --train_group_size {group} --max_steps {steps}"
    given += " --query_max_len 64 --passage_max_len 512 --save_strategy no --report_to none"
    arguments = parse_arguments([*given.split(), *flags], "")
    return make_trainer(*arguments, prepare(read_rows(arguments[1], arguments[2]), *arguments))


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if GPU:
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """The median time of a piece of work on the device, after two warm-ups."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def failure(error: Exception) -> str:
    """The last line of an error and where it came from."""
    traceback.print_exc()
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
