"""Token ids -> embeddings: every text gets its own, whatever it shares a batch with. See test_device.py for a GPU."""

from array import array

import numpy as np
import pytest
import torch
from helpers.running import encoder_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding_finetune.model.tokens import Tokens
from embedding_finetune.retrieval.token_encoder import TokenEncoder

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)


def texts_of(lengths):
    rng = np.random.default_rng(sum(lengths))
    return [
        Tokens(array("i", [2, *rng.integers(5, 60, length - 2).tolist(), 3]).tobytes(), min(number % 3, length - 1))
        for number, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def encoders(tiny_bert):
    padded, packed = (encoder_for(tiny_bert, "--dtype", "float32").passages for _ in range(2))
    packed.model.backbone.set_attn_implementation("packed")
    return padded, packed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(lengths=LENGTHS, tokens=st.sampled_from([1, 30, 100, 4096]), with_prompt=st.booleans())
def test_packed_and_padded_texts_get_the_embeddings_that_each_gets_alone(encoders, lengths, tokens, with_prompt):
    texts = texts_of(lengths)
    padded, packed = encoders
    done = []
    results = []
    for tower, first in ((padded, None), (packed, 0)):
        token_encoder = TokenEncoder(tower.model, tower.tokenizer, tokens_per_batch=tokens, packed_from=first)
        done.append(np.zeros(len(texts), dtype=int))
        results.append(
            token_encoder.embed(
                texts,
                max_length=40,
                with_prompt=with_prompt,
                done=lambda rows, _, count=done[-1]: np.add.at(count, rows, 1),
            )
        )
    assert all((count == 1).all() for count in done)
    assert np.abs(results[0] - results[1]).max() < 1e-5
    for text, found in zip(texts, results[0]):
        ids = torch.tensor(text.ids)[None].long()
        prompts = None if with_prompt else torch.tensor([text.prompt_length])
        with torch.no_grad():
            alone = padded.model(ids, torch.ones_like(ids), prompts)[0].numpy()
        assert np.abs(found - alone).max() < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_no_texts_have_no_embeddings(encoders, packed):
    tower = encoders[packed]
    empty = TokenEncoder(tower.model, tower.tokenizer, tokens_per_batch=None, packed_from=0 if packed else None)
    assert empty.embed([], max_length=40, with_prompt=True, done=lambda *_: None).shape == (0, 32)
