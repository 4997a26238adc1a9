"""Tokenizers of the kinds that published models have, and pieces of text that are hard for them."""

from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from embedding_finetune.model.tokens import TextKind
from helpers.data import REPOSITORY, read_jsonl
from helpers.tiny import make_tokenizer

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def trained(kind):
    """A tokenizer of the kind of GPT-2's, XLM-R's or Llama's, its vocabulary learned from the sample data."""
    texts = [text for row in read_jsonl(REPOSITORY / "candidate_context.jsonl") for text in row["context"]]
    options = {"vocab_size": 600, "special_tokens": SPECIAL, "show_progress": False}
    if kind in ("byte-level BPE", "RoBERTa's"):
        backend, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**options)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "BPE of whole texts":
        backend, trainer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True)), trainers.BpeTrainer(**options)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        texts = [part for text in texts for part in text.split(". ")]
    else:
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", **options)
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(texts[:200], trainer)
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    if kind == "RoBERTa's":
        backend.post_processor = processors.RobertaProcessing(ends[1], ends[0], trim_offsets=True)
    else:
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


KINDS = ["WordPiece", "byte-level BPE", "RoBERTa's", "BPE of whole texts", "Unigram", "slow"]
MADE = {}


def tokenizer_of(kind):
    """The tokenizer of a kind, made once: a test that changes it changes it back."""
    if kind not in MADE:
        MADE[kind] = {"WordPiece": make_tokenizer, "slow": ByT5Tokenizer}.get(kind, lambda: trained(kind))()
    return MADE[kind]


PIECES = st.sampled_from(
    [
        *(
            "how do i reset the pump? ",
            "a",
            " ",
            "\n\t",
            "x" * 99,
            "x" * 101,
            "x" * 5000,
            "e\u0301\u0302",
            "\u0301" * 40,
        ),
        *(
            "한글",
            "😀",
            "▁",
            "</s>",
            "[SEP] ",
            "ΑΣ",
            "1,234.5",
            "aaab" * 30,
            "日本語のテキスト",
            "https://example.com/a?b=c ",
        ),
    ]
)


def tokenize(tokenizer, texts, *, instruction, max_length, lower_case=False):
    """The token ids that TextKind.tokenize gives, as lists, and how many texts it has cut."""
    tokens, cut = TextKind("passage", instruction, max_length, lower_case, True).tokenize(tokenizer, texts)
    return [text.ids.tolist() for text in tokens], cut
