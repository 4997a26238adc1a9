"""Texts -> token ids, cut to a length, with instructions before them.

Shapes: T tokens of a text.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from embedding_finetune.command_line import UserError
from embedding_finetune.data.texts import Instructions
from embedding_finetune.model.checkpoint import EmbeddingConfig

_TEXTS_AT_ONCE = 2048
"""Texts per call of the Rust tokenizer: it takes 64 bytes of memory per token until their ids are packed."""
_STEPS_OF_A_CALL = ("__call__", "_encode_plus", "_convert_encoding")


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, *, lower_case: bool
) -> Iterator[tuple[list[int], bool]]:
    """Yield the token ids of each text, special tokens included, and whether it was cut to `max_length` tokens."""
    if lower_case:
        texts = [text.lower() for text in texts]
    texts = beginnings(tokenizer, texts, max_length)
    encode = _encoded_in_rust if _is_all_rust(tokenizer) else _encoded_by_call
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        yield from encode(tokenizer, texts[first : first + _TEXTS_AT_ONCE], max_length)


def _is_all_rust(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a call of the tokenizer is no more than a call of its Rust tokenizer, with settings for it."""
    own, plain = type(tokenizer), PreTrainedTokenizerFast
    overridden = (getattr(own, name) is not getattr(plain, name) for name in _STEPS_OF_A_CALL)
    return issubclass(own, plain) and not any(overridden)


def _encoded_in_rust(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> Iterator[tuple[list[int], bool]]:
    """`_encoded` without the objects that transformers makes: they hold Python's lock more than twice as long.

    In an encoding run it is the main thread, which feeds the GPU, that waits for the lock.
    """
    tokenizer([""], truncation=True, max_length=max_length)  # transformers gives the Rust tokenizer its settings
    fewest = _fewest_where_cut(tokenizer, max_length)
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts):
        ids = encoding.ids
        yield ids, len(ids) >= fewest and bool(encoding.overflowing)


def _encoded_by_call(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> Iterator[tuple[list[int], bool]]:
    """`_encoded` for tokenizers that are Python, all or in part."""
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    fewest = _fewest_where_cut(tokenizer, max_length)
    for row, ids in enumerate(encoded["input_ids"]):
        if len(ids) < fewest:
            yield ids, False
        elif encoded.encodings is not None:
            yield ids, bool(encoded.encodings[row].overflowing)
        else:
            yield ids, len(tokenizer(texts[row], verbose=False)["input_ids"]) > max_length


def _fewest_where_cut(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The fewest tokens that a text has which was cut to `max_length`.

    Tokenizers written in Python add no end to a cut text that ends so by itself, and give fewer than max_length then.
    """
    return max_length - tokenizer.num_special_tokens_to_add()


_CHARACTERS_PER_TOKEN = 16
_FEWEST_CHARACTERS = 4096
_TOKENS_TO_SPARE = 128
"""Cutting a text in the middle of a word changes fewer tokens than this: WordPiece splits words of up to 100
characters."""
_LONG_TEXTS_AT_ONCE = 64
_SHOWN_CHARACTERS = 60


def beginnings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[str]:
    """The texts; very long ones are cut, without changing their first `max_length` tokens.

    A tokenizer takes some 200 bytes of memory per character. A text is cut to a length where twice as many characters
    begin with the same tokens, and where there are some tokens to spare: a token depends on the characters near it. A
    text with too few tokens to decide stays whole. All texts do where truncation removes the beginning.
    """
    texts, characters = list(texts), max(_CHARACTERS_PER_TOKEN * max_length, _FEWEST_CHARACTERS)
    long = [row for row, text in enumerate(texts) if len(text) > 2 * characters]
    if tokenizer.truncation_side == "right":
        for first in range(0, len(long), _LONG_TEXTS_AT_ONCE):
            _cut_long_texts(tokenizer, texts, long[first : first + _LONG_TEXTS_AT_ONCE], max_length, characters)
    return texts


def _cut_long_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], rows: list[int], max_length: int, characters: int
) -> None:
    """Cut the texts of these rows in place, as `beginnings` says. Each is longer than twice `characters`."""
    shorter = _token_ids(tokenizer, [texts[row][:characters] for row in rows])
    while rows:
        longer = _token_ids(tokenizer, [texts[row][: 2 * characters] for row in rows])
        undecided = []
        for row, shorter_ids, longer_ids in zip(rows, shorter, longer):
            enough = len(shorter_ids) >= max_length + _TOKENS_TO_SPARE
            if enough and shorter_ids[:max_length] == longer_ids[:max_length]:
                texts[row] = texts[row][:characters]
            elif len(texts[row]) > 4 * characters:
                undecided.append((row, longer_ids))
        rows, shorter = [row for row, _ in undecided], [ids for _, ids in undecided]
        characters *= 2


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without special tokens, not cut."""
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]


def pair_beginnings(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], passages: Sequence[str], max_length: int
) -> tuple[list[str], list[str]]:
    """Like `beginnings`, for texts that are tokenized in pairs, where truncation cuts the longer text first."""
    queries, passages = list(queries), list(passages)
    cut_queries, cut_passages = (beginnings(tokenizer, texts, max_length) for texts in (queries, passages))
    for row, (query, passage) in enumerate(zip(queries, passages)):
        if len(cut_queries[row]) == len(query) and len(cut_passages[row]) == len(passage):
            continue
        # A token is cut from the text that has more of them. So the text of fewer characters stays whole, and the other
        # one keeps at least as many tokens.
        fewest = max(max_length, len(_token_ids(tokenizer, [min(query, passage, key=len)])[0]))
        if len(query) < len(passage):
            passages[row] = beginnings(tokenizer, [passage], fewest)[0]
        else:
            queries[row] = beginnings(tokenizer, [query], fewest)[0]
    return queries, passages


def prompt_length(tokenizer: PreTrainedTokenizerBase, instruction: str, *, lower_case: bool = False) -> int:
    """How many tokens at the beginning of an encoded text belong to its instruction, with special tokens before it.

    A special token at the instruction's end is not counted: in a text it comes after the text.
    """
    if not instruction:
        return 0
    ids = tokenizer(instruction.lower() if lower_case else instruction)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


class Tokens(NamedTuple):
    """A text as the model takes it: texts of equal Tokens have equal embeddings."""

    packed: bytes  # the token ids as C's int: a ninth of the memory of a tuple, and Python keeps the hash of bytes
    prompt_length: int  # how many of the tokens, at the beginning, pooling leaves out

    @property
    def ids(self) -> np.ndarray:
        """The token ids: (T,) int32, read-only."""
        return np.frombuffer(self.packed, dtype=np.intc)


def distinct(texts: Iterable[Tokens]) -> tuple[list[Tokens], list[int]]:
    """Each text once, in first-seen order, and for each of `texts` its place among them."""
    places: dict[Tokens, int] = {}
    indices = [places.setdefault(text, len(places)) for text in texts]
    return list(places), indices


def first_rows(instructions: Iterable[str | None]) -> dict[str, int]:
    """Each distinct instruction, and the position of the first row that has it."""
    rows: dict[str, int] = {}
    for row, instruction in enumerate(instructions):
        if instruction is not None:
            rows.setdefault(instruction, row)
    return rows


class TextKind(NamedTuple):
    """How one kind of text becomes token ids: "query" or "passage"."""

    name: str
    instruction: str
    max_length: int
    lower_case: bool
    include_prompt: bool  # whether pooling includes the instruction

    def tokenize(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], instructions: Instructions = None
    ) -> tuple[list[Tokens], int]:
        """The tokens of texts of this kind, special tokens included, and how many texts were cut to max_length.

        Raises UserError for a text without tokens: a tokenizer that adds none of its own makes nothing of some texts.
        """
        own = [self.instruction if text is None else text for text in instructions or [None] * len(texts)]
        texts = [instruction + text for instruction, text in zip(own, texts)]
        packed: list[bytes] = []
        cut = 0
        for ids, was_cut in _encoded(tokenizer, texts, self.max_length, lower_case=self.lower_case):
            if not ids:
                text = texts[len(packed)][:_SHOWN_CHARACTERS]
                raise UserError(f"the model's tokenizer makes no token of the {self.name} {text!r}; leave it out")
            packed.append(array("i", ids).tobytes())
            cut += was_cut
        left_out = dict.fromkeys(own, 0)
        if not self.include_prompt:
            left_out = {text: prompt_length(tokenizer, text, lower_case=self.lower_case) for text in left_out}
        return list(map(Tokens, packed, map(left_out.__getitem__, own))), cut

    def check_instructions(self, tokenizer: PreTrainedTokenizerBase, first_rows: Mapping[str, int]) -> None:
        """Raise UserError where instructions of rows leave no room for a text: all would have the same tokens.

        first_rows: instruction -> the number of the first row that has it, from 0.
        """
        instructions = [text.lower() if self.lower_case else text for text in first_rows]
        if not instructions:
            return
        # As in `tokenize`: those of megabytes are cut, but not to fewer tokens than max_length.
        encoded = tokenizer(beginnings(tokenizer, instructions, self.max_length), verbose=False)["input_ids"]
        for (instruction, row), ids in zip(first_rows.items(), encoded):
            if instruction and len(ids) >= self.max_length:
                raise UserError(
                    f"--{self.name}_max_len {self.max_length} leaves no token for the {self.name} of row {row + 1} "
                    f'(counted from 1): its "instruction" {instruction[:_SHOWN_CHARACTERS]!r} fills it; '
                    f"raise --{self.name}_max_len, or shorten the instruction"
                )


def text_kinds(config: EmbeddingConfig, *, query_max_len: int, passage_max_len: int) -> tuple[TextKind, TextKind]:
    """The kinds "query" and "passage", as a checkpoint's config has them."""

    shared = (config.lower_case, config.include_prompt)
    return (
        TextKind("query", config.query_instruction, query_max_len, *shared),
        TextKind("passage", config.passage_instruction, passage_max_len, *shared),
    )
