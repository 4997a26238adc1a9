"""A model and its tokenizer are tried on a text before they are used: a model that does not work ends in one line.

Shapes: N texts, T tokens, H dimensions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.encoding_kernels import is_out_of_memory
from embedding_finetune.model.packing import Packed, places_of
from embedding_finetune.model.padding import pad
from embedding_finetune.model.sub_batches import padded_texts

TRIED_TEXT = "how do i reset the pump, and who is to be called when the red light of the alarm is on for an hour?"
_TRIED_TOKENS = 13
"""The tokens of that text that are used; padding makes them 16."""

_TOLERANCE = 1e-3
_COARSE_TOLERANCE = 0.25
"""How far padding may move a result, as a fraction of its length: in float32, and in bfloat16 and float16.

Measured on tiny random models of 110 kinds of transformers 5.24: at most 7e-7 in float32, except 0.11 with ConvBERT,
0.22 with Nystromformer and 0.94 with FNet; at most 0.01 in bfloat16, except 0.08 in mixtures of experts, where rounding
may change the choice of an expert. all-MiniLM-L6-v2: 8e-7 in float32, 8e-4 in float16, 0 in bfloat16. So the first
tolerance finds models that see their padding: every model is tried in float32 before its weights are rounded. The
second one finds only gross errors.
"""

Inputs = Mapping[str, Tensor]
"""input_ids and attention_mask, (N, T) each, and what else a model takes."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, what: str) -> None:
    """Raise UserError for a tokenizer without a vocabulary, or with tokens that the model has no embedding for.

    For a folder without tokenizer files transformers makes an empty tokenizer, which gives all texts the same tokens.
    """
    vocabulary = tokenizer.get_vocab()
    added = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
    if not any(token.strip("▁") for token in vocabulary.keys() - added):
        raise UserError(
            f"{what}: the tokenizer knows no words, only {len(vocabulary)} special tokens; the folder lacks its "
            "tokenizer's files (tokenizer.json, or vocab.txt and the like)"
        )
    rows, largest = _embedding_rows(model), max(vocabulary.values())
    if rows is not None and largest >= rows:
        raise UserError(
            f"{what}: the tokenizer numbers its tokens up to {largest}, but the model has {rows} token embeddings, "
            f"for the numbers up to {rows - 1}; give the tokenizer that belongs to the model"
        )


def _embedding_rows(model: PreTrainedModel) -> int | None:
    """How many tokens have an embedding; None where the model does not say."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def check_states(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, limit: int, what: str) -> None:
    """Raise UserError unless a freshly loaded backbone gives each token a state (H,) that padding does not change.

    limit: the most tokens that the model takes.
    """
    name = type(backbone).__name__

    @torch.no_grad()
    def states(inputs: Inputs) -> Tensor | None:
        return getattr(backbone(**inputs), "last_hidden_state", None)

    try:
        tried = states(_inputs_to_try(tokenizer, limit)[0])  # (1, T, H)
    except Exception as error:
        raise UserError(
            f"{what}: a {name} does not embed text by itself ({first_line(error)}); "
            "give an encoder's or a decoder's checkpoint"
        ) from error
    if tried is None:
        raise UserError(f"{what}: a {name} gives no last_hidden_state; give a text encoder's checkpoint")
    hidden_size = getattr(backbone.config, "hidden_size", None)
    if tried.shape[-1] != hidden_size:
        raise UserError(
            f"{what}: the states of a {name} have {tried.shape[-1]} dimensions, where its config has a hidden_size of "
            f"{hidden_size}; such models are not supported"
        )

    @torch.no_grad()
    def states_of_text(inputs: Inputs) -> Tensor:
        hidden: Tensor = backbone(**inputs).last_hidden_state
        return hidden[0][inputs["attention_mask"][0].bool()]

    check_padding([states_of_text], backbone, tokenizer, partial(_inputs_to_try, tokenizer, limit), what=what)


def check_encoding(
    model: BiEncoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    limit: int,
    what: str,
    packed_from: int | None = None,
) -> None:
    """Raise UserError unless a model prepared for encoding gives a text the same embedding alone and beside another.

    packed_from: the position id of a text's first token, for a backbone that takes packed texts.
    """

    @torch.no_grad()
    def embedding(inputs: Inputs) -> Tensor:
        if packed_from is None:
            embeddings: Tensor = model(**inputs)
            return embeddings[0]
        real = inputs["attention_mask"].bool()
        lengths = real.sum(dim=1).tolist()
        position_ids, ends = (torch.from_numpy(array).to(real.device) for array in places_of(lengths, packed_from))
        packed = Packed(position_ids, ends, max(lengths))
        return model.embed_packed(packed, None, input_ids=inputs["input_ids"][real][None])[0]

    inputs_to_try = partial(_inputs_to_try, tokenizer, limit)
    check_padding([embedding], model.backbone, tokenizer, inputs_to_try, dtype=dtype, what=what)


def check_training(model: BiEncoder, tokenizer: PreTrainedTokenizerBase, *, limit: int, what: str) -> None:
    """Raise UserError unless a model prepared for training gives a text the same embedding alone, padded, and by table.

    Training looks up the embeddings of tokens itself and passes them to the model. Not every model accepts them.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        paths = [
            lambda inputs: model(**inputs)[0],
            lambda inputs: model.encode_in_sub_batches(padded_texts(**inputs))[0],
        ]
        with torch.enable_grad():  # attention is computed differently with gradients
            inputs_to_try = partial(_inputs_to_try, tokenizer, limit)
            check_padding(paths, model.backbone, tokenizer, inputs_to_try, what=f"{what}, in training")
    finally:
        for module, training in modes.items():
            module.training = training


def check_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs_to_try: Callable[[], tuple[Inputs, Inputs]],
    *,
    what: str,
) -> None:
    """Raise UserError unless a classifier gives a pair of texts the same score alone and padded.

    inputs_to_try: the pair alone, and the pair before another one, padded on the tokenizer's side.
    """

    @torch.no_grad()
    def score(inputs: Inputs) -> Tensor:
        logit = model(**inputs).logits[0, 0]
        return torch.stack([logit, torch.ones_like(logit)])  # for scores near 0 the tolerance is absolute

    check_padding([score], model, tokenizer, inputs_to_try, what=what, result="score")


def check_padding(
    paths: Sequence[Callable[[Inputs], Tensor]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs_to_try: Callable[[], tuple[Inputs, Inputs]],
    *,
    what: str,
    result: str = "embedding",
    dtype: torch.dtype | None = None,
) -> None:
    """Raise UserError unless all paths give a text the same result, in a batch of its own and padded.

    A path takes Inputs and returns the result of their first text, of any shape. inputs_to_try: the text alone, and
    before another one, padded on the tokenizer's side. result: its name in error messages. dtype: what the model
    computes in; None for the dtype of its parameters. No random numbers are consumed.
    """
    name, dtype = type(model).__name__, dtype or next(model.parameters()).dtype
    try:
        difference = _largest_difference(paths, model, inputs_to_try)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise UserError(f"{what}: out of GPU memory on a short text: {first_line(error)}") from error
        remedy = (
            "such models are not supported" if dtype == torch.float32 else f"give --dtype float32 instead of {dtype}"
        )
        raise UserError(f"{what}: a {name} fails on a short text: {first_line(error)}; {remedy}") from error
    if not math.isfinite(difference):
        raise UserError(
            f"{what}: a {name} gives a text the {result} NaN, infinity or 0; "
            "the model's weights are damaged, or they need --dtype float32"
        )
    if difference > _tolerance(dtype):
        remedy = _remedy(paths, model, tokenizer, inputs_to_try, dtype)
        raise UserError(
            f"{what}: a {name} sees the padding on the {tokenizer.padding_side} of a text, which changes its {result} "
            f"by {difference:.1%}, so results depend on the batch; {remedy}"
        )


def _largest_difference(
    paths: Sequence[Callable[[Inputs], Tensor]],
    model: PreTrainedModel,
    inputs_to_try: Callable[[], tuple[Inputs, Inputs]],
) -> float:
    """Between the first path's result for a text alone and all other results, as a fraction of its length."""
    alone, padded = ({name: tensor.to(model.device) for name, tensor in inputs.items()} for inputs in inputs_to_try())
    with torch.random.fork_rng(devices=[]):
        results = [path(inputs).detach().float() for inputs in (alone, padded) for path in paths]
    return max(float((result - results[0]).norm() / results[0].norm()) for result in results)


def _remedy(
    paths: Sequence[Callable[[Inputs], Tensor]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs_to_try: Callable[[], tuple[Inputs, Inputs]],
    dtype: torch.dtype,
) -> str:
    """What to do where padding changes a result: pad on the other side if that helps."""
    side = tokenizer.padding_side
    other = tokenizer.padding_side = {"left": "right", "right": "left"}[side]
    try:
        helps = _largest_difference(paths, model, inputs_to_try) <= _tolerance(dtype)
    finally:
        tokenizer.padding_side = side
    if helps:
        return f'write "padding_side": "{other}" into its tokenizer_config.json'
    return "such models are not supported"


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE if dtype == torch.float32 else _COARSE_TOLERANCE


def _inputs_to_try(tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[Inputs, Inputs]:
    """A text alone, and the same text before a shorter one, both padded to the next multiple of 8."""
    ids = tokenizer(TRIED_TEXT, verbose=False)["input_ids"]  # it is cut below
    ids = ids[: max(min(_TRIED_TOKENS, limit - 1), 1)]
    shorter = ids[: max(len(ids) - 4, 1)]
    return pad(tokenizer, [ids], limit=len(ids)), pad(tokenizer, [ids, shorter], limit=max(limit, len(ids)))
