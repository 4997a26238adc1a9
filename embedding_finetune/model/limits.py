"""What a loaded model takes: lengths, instructions, dimensions, fixed positions; the flags are checked against it."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError
from embedding_finetune.model.bi_encoder import embedding_dimensions
from embedding_finetune.model.checkpoint import EmbeddingConfig

_UNLIMITED = 10**9


def length_limit(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens, special ones included, that tokenizer and position embeddings both take."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or _UNLIMITED
    if positions < 1:  # XLNet's way to say that there is no limit
        positions = _UNLIMITED
    return min(positions - first_position(backbone), tokenizer.model_max_length)


def first_position(backbone: PreTrainedModel) -> int:
    """The position id of a text's first token: RoBERTa and MPNet count from after the padding index."""
    padding = getattr(_position_table(backbone), "padding_idx", None)
    return 0 if padding is None else padding + 1


def check_max_length(flag: str, value: int, limit: int) -> None:
    """Raise UserError when a length flag asks for more tokens than the model takes."""
    if value > limit:
        raise UserError(f"{flag} {value}: the model takes at most {limit} tokens")


def check_instructions(
    tokenizer: PreTrainedTokenizerBase, config: EmbeddingConfig, *, query_max_len: int, passage_max_len: int
) -> None:
    """Raise UserError where instruction and special tokens fill a length: all texts would have the same tokens."""
    for kind, instruction, max_length in (
        ("query", config.query_instruction, query_max_len),
        ("passage", config.passage_instruction, passage_max_len),
    ):
        ids = tokenizer(instruction.lower() if config.lower_case else instruction, verbose=False)["input_ids"]
        if len(ids) >= max_length and not instruction:
            raise UserError(f"--{kind}_max_len {max_length} has no room beside the {len(ids)} special tokens; raise it")
        if len(ids) >= max_length:
            raise UserError(
                f"--{kind}_max_len {max_length} leaves no token for the {kind} itself: "
                f"--{kind}_instruction_for_retrieval takes {len(ids)} of them, special tokens included; "
                f"raise --{kind}_max_len, or shorten the instruction"
            )


def check_truncate_dim(backbone: PreTrainedModel, config: EmbeddingConfig) -> None:
    """Raise UserError when --truncate_dim is larger than the number of dimensions."""
    most = embedding_dimensions(backbone, config)
    if config.truncate_dim is not None and config.truncate_dim > most:
        raise UserError(f"--truncate_dim {config.truncate_dim}: the model's embeddings have {most} dimensions")


def freeze_position_embeddings(backbone: PreTrainedModel) -> None:
    """Exclude the position embeddings from training. Raises UserError if the backbone has none."""
    table = _position_table(backbone)
    if table is None:
        raise UserError(f"--fix_position_embedding: a {type(backbone).__name__} has no position embeddings to fix")
    table.requires_grad_(False)


def _position_table(backbone: PreTrainedModel) -> nn.Module | None:
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    return table if isinstance(table, nn.Module) else None
