"""Tiny random models, made on the spot."""

from pathlib import Path

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
