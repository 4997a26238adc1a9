import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import make_tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import padded_texts
from embedding_finetune.training import pool_loss as module
from embedding_finetune.training.loss import LossOptions, contrastive_loss
from embedding_finetune.training.pool_loss import NO_PAIRS, Pairs, PoolLoss, pool_loss


def pairs(*column_and_row):
    columns, rows = np.array(column_and_row, dtype=np.int64).reshape(-1, 2).T
    return Pairs.of(columns, rows)


def plainly(queries, passages, targets, *, temperature, masked=(), margin=None, exempt=()):
    """The mean cross entropy, score by score."""
    losses = []
    for row, query in enumerate(queries):
        similarities = [(query * passage).sum() for passage in passages]
        own = similarities[targets[row]].detach()
        counted = [
            score / temperature
            for column, score in enumerate(similarities)
            if column == targets[row]
            or (
                (column, row) not in masked
                and not (margin is not None and score.detach() > own + margin and (column, row) not in exempt)
            )
        ]
        losses.append(torch.logsumexp(torch.stack(counted), 0) - similarities[targets[row]] / temperature)
    return torch.stack(losses).mean()


def test_a_query_at_its_passage_among_orthogonal_ones_has_a_loss_by_hand():
    """Scores 1/T and three times 0: -log(e^(1/T) / (e^(1/T) + 3))."""
    loss = pool_loss(torch.eye(4)[:1], torch.eye(4), np.array([0]), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 3) - 2, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 5),
    passages=st.integers(1, 30),
    scores_at_once=st.sampled_from([1, 7, 2**20]),
    temperature=st.sampled_from([0.02, 0.05, 1.0]),
    margin=st.sampled_from([None, 0.0, 0.1]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_loss_and_gradient_are_those_of_every_score_whatever_is_held_at_once(
    seed, queries, passages, scores_at_once, temperature, margin, share
):
    rng = np.random.default_rng(seed)
    vectors = [
        F.normalize(torch.tensor(rng.normal(size=(n, 6)), dtype=torch.float64), dim=1) for n in (queries, passages)
    ]
    targets = rng.integers(passages, size=queries)
    chosen = [
        [(c, r) for c in range(passages) for r in range(queries) if rng.random() < share] for _ in ("masked", "exempt")
    ]
    exact = vectors[0].clone().requires_grad_()
    expected = plainly(
        exact, vectors[1], targets, temperature=temperature, masked=chosen[0], margin=margin, exempt=chosen[1]
    )
    expected.backward()
    ours = vectors[0].float().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._SCORES_AT_ONCE, "cpu", scores_at_once)
        found = pool_loss(
            ours,
            vectors[1].float(),
            targets,
            temperature=temperature,
            masked=pairs(*chosen[0]),
            false_negative_margin=margin,
            exempt=pairs(*chosen[1]),
        )
    found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=2e-4)
    assert torch.allclose(ours.grad.double(), exact.grad, atol=2e-3)


def test_it_is_the_contrastive_loss_of_a_batch_that_holds_the_whole_pool():
    torch.manual_seed(0)
    queries, passages = (F.normalize(torch.randn(8, 16), dim=1).requires_grad_() for _ in range(2))
    whole = contrastive_loss(queries, passages[:, None], temperature=0.05)
    (expected,) = torch.autograd.grad(whole, queries)
    found = pool_loss(queries, passages.detach(), np.arange(8), temperature=0.05)
    (gradient,) = torch.autograd.grad(found, queries)
    assert found.item() == pytest.approx(whole.item(), abs=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts():
    """So ranks with equal shares get the gradient of one process with all rows."""
    torch.manual_seed(0)
    queries, passages = F.normalize(torch.randn(8, 16), dim=1), F.normalize(torch.randn(50, 16), dim=1)
    targets = np.arange(8) * 3
    whole = pool_loss(queries, passages, targets, temperature=0.05)
    halves = [pool_loss(queries[part], passages, targets[part], temperature=0.05) for part in (slice(4), slice(4, 8))]
    assert torch.stack(halves).mean().item() == pytest.approx(whole.item(), abs=1e-6)


def test_scores_are_float32_under_autocast():
    torch.manual_seed(0)
    queries, passages = F.normalize(torch.randn(4, 16), dim=1), F.normalize(torch.randn(9, 16), dim=1)
    exact = pool_loss(queries, passages, np.arange(4), temperature=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool_loss(queries, passages, np.arange(4), temperature=0.02), exact)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_copies_of_the_positive_are_not_above_it_however_many_queries_are_computed_at_once(rows):
    """Each query is nearest to its own passage, of which there are 40: at a margin of 0 all of them count."""
    torch.manual_seed(0)
    passages = F.normalize(torch.randn(9, 33), dim=1)
    queries = F.normalize(passages + 0.05 * torch.randn(9, 33), dim=1)
    scores = queries @ passages.T / 0.02
    exact = (torch.logsumexp(scores, dim=1) + math.log(40) - scores.diagonal()).mean().item()
    parts = [np.arange(first, first + rows) for first in range(0, 9, rows)]
    losses = [
        pool_loss(queries[part], passages.repeat(40, 1), part, temperature=0.02, false_negative_margin=0.0).item()
        for part in parts
    ]
    assert np.mean(losses) == pytest.approx(exact, abs=1e-4)


def test_pairs_outside_the_pool_are_left_out_and_the_others_found_by_column():
    found = pairs((7, 0), (-1, 1), (3, 1), (5, 0))
    assert found.columns.tolist() == [3, 5, 7]
    assert [part.tolist() for part in found.within(4, 8)] == [[0, 0], [1, 3]]
    assert [len(part) for part in NO_PAIRS.within(0, 100)] == [0, 0]


@pytest.mark.parametrize("mask_known_positives", [True, False])
def test_the_module_masks_what_is_known_and_its_passages_are_no_weights(tmp_path, mask_known_positives):
    backbone, tokenizer, config = load_backbone(str(make_tiny_bert(tmp_path / "bert", dropout=0.0)), flag="--model")
    encoder = BiEncoder(backbone.eval(), config)
    passages = F.normalize(torch.randn(6, 32), dim=1)
    options = LossOptions(temperature=0.1, mask_known_positives=mask_known_positives)
    loss = PoolLoss(encoder, options, passages)
    assert not any(tensor.data_ptr() == passages.data_ptr() for tensor in loss.state_dict().values())
    inputs = tokenizer(["reset the pump", "open the gate"], return_tensors="pt")
    texts = padded_texts(inputs["input_ids"], inputs["attention_mask"])
    known = pairs((4, 0), (1, 1))
    found = loss(texts, torch.tensor([0, 1, 0]), np.array([0, 1, 5]), known, NO_PAIRS)["loss"]
    embeddings = encoder(inputs["input_ids"], inputs["attention_mask"])[[0, 1, 0]].detach()
    masked = {(4, 0), (1, 1)} if mask_known_positives else ()
    expected = plainly(embeddings, passages, [0, 1, 5], temperature=0.1, masked=masked)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    found.backward()
    assert any(parameter.grad is not None for parameter in encoder.parameters())
