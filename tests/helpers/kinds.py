"""Tiny random models of every kind of transformers that takes text, from one table of sizes and few exceptions."""

from pathlib import Path

from helpers.tiny import make_tokenizer

POSITIONS = 64

_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
_HEADS = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_SEQ2SEQ = {**_HEADS, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
_GEMMA = {"head_dim": 16, "num_key_value_heads": 1}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 2}

# None leaves an option out.
_OWN = {
    "albert": {"embedding_size": 16},
    "bart": _SEQ2SEQ,
    "big_bird": {"attention_type": "original_full"},
    "bloom": {"n_layer": 2, "n_head": 2},
    "convbert": {"embedding_size": 32},
    "ctrl": {**_GPT, "dff": 64},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 16},
    "esm": {"position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 4},
    "flaubert": _XLM,
    "funnel": {
        "num_hidden_layers": None,
        "block_sizes": [1, 1],
        "block_repeats": [1, 1],
        "num_decoder_layers": 1,
        "d_head": 16,
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "use_bidirectional_attention": True, "sliding_window": 16},
    "gpt2": _GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {**_GPT, "rotary_dim": 8},
    "helium": {"head_dim": 16},
    "led": {**_SEQ2SEQ, "attention_window": 8},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "mbart": _SEQ2SEQ,
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": POSITIONS},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "opt-350m": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "attention_head_size": 16},
    "roformer": {"embedding_size": 32},
    "squeezebert": {
        "embedding_size": 32,
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
    },
    "mt5": _T5,
    "t5": _T5,
    "umt5": _T5,
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2},
    "xlm": _XLM,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "max_position_embeddings": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": {"use_expectation": True},
}
_ROBERTAS = """camembert data2vec-text ibert layoutlmv3 lilt longformer luke markuplm mpnet roberta roberta-prelayernorm
xlm-roberta xlm-roberta-xl xmod""".split()
"""They count positions from after the padding index, which is 1."""

WORKING = """albert apertus arcee bert bert-generation big_bird biogpt bitnet bloom camembert cohere ctrl data2vec-text
deberta deberta-v2 deepseek_v3 diffllama distilbert doge electra ernie ernie4_5 esm eurobert exaone4 falcon falcon_mamba
flaubert gemma gemma2 gemma3_text git glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite gte helium jetmoe
jina_embeddings_v3 layoutlm lfm2 lilt llama longformer luke mamba markuplm megatron-bert minimax mistral mixtral
mobilebert modernbert modernbert-decoder mpnet mpt mra mt5 nomic_bert olmo olmo2 olmoe openai-gpt opt persimmon phi phi3
phimoe qwen2 qwen3 qwen3_moe rembert roberta roberta-prelayernorm roc_bert roformer rwkv seed_oss smollm3 splinter
squeezebert stablelm starcoder2 t5 tapas umt5 visual_bert xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod""".split()
ENCODERS_ALONE = "mt5 t5 umt5".split()
SEEING_PADDING = "convbert fnet nystromformer".split()
NOT_EMBEDDING = "blenderbot canine cpmant m2m_100 opt-350m pegasus reformer vit wav2vec2".split()
NOT_TRAINABLE = "bart clip_text_model ibert led mbart".split()
"""They take no inputs_embeds, or take them for something else."""
FLOAT32_ONLY = "minimax mra openai-gpt xglm".split()


def make_config(kind: str):
    """The tiny config of a kind, a model_type of transformers; "opt-350m" is an OPT with projected embeddings."""
    from transformers import AutoConfig

    robertas = kind in _ROBERTAS
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": POSITIONS + 2 * robertas,
        "vocab_size": 160,
        "pad_token_id": int(robertas),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
        **_OWN.get(kind, {}),
    }
    options = {name: value for name, value in options.items() if value is not None}
    config = AutoConfig.for_model("opt" if kind == "opt-350m" else kind, **options)
    for name in ("init_std", "initializer_range"):
        if hasattr(config, name):
            setattr(config, name, 0.2)  # the usual 0.02 makes small random models embed all texts alike
    return config


def class_of(kind: str):
    """The Auto class whose models embed texts: of T5 and its kin the encoder alone."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if kind in ENCODERS_ALONE else AutoModel


def make_kind(kind: str, folder: Path, *, padding_side: str = "right") -> Path:
    """Save a tiny random model of a kind, with a WordPiece tokenizer."""
    import torch

    torch.manual_seed(0)
    class_of(kind).from_config(make_config(kind)).save_pretrained(folder)
    make_tokenizer(padding_side=padding_side, model_max_length=POSITIONS).save_pretrained(folder)
    return folder
