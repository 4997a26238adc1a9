import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import padded_texts
from embedding_finetune.training.loss import (
    PADDING_ID,
    LossOptions,
    RetrievalLoss,
    contrastive_loss,
    distillation_loss,
    masked_columns,
    masked_in_batch,
)


def reference_loss(queries, passages, temperature, in_batch, ids=None, known=None, margin=None):
    """The definition as nested loops over Python floats."""
    total = 0.0
    for b, query in enumerate(queries.tolist()):
        groups = range(len(passages)) if in_batch else [b]
        seen, logits, target = set(), [], None
        for c in groups:
            for g, passage in enumerate(passages[c].tolist()):
                logit = sum(x * y for x, y in zip(query, passage)) / temperature
                own = (c, g) == (b, 0)
                positive = sum(x * y for x, y in zip(query, passages[b, 0].tolist()))
                if margin is not None and c != b and logit * temperature > positive + margin + 1e-6:
                    if ids is not None:
                        seen.add(int(ids[c, g]))
                    continue
                if ids is not None:
                    text = int(ids[c, g])
                    masked = text == PADDING_ID
                    if known is not None:
                        masked = masked or text in seen or text in known[b].tolist()
                    seen.add(text)
                    if masked and not own:
                        continue
                target = logit if own else target
                logits.append(logit)
        total += math.log(sum(math.exp(logit - target) for logit in logits))
    return total / len(queries)


def test_the_in_batch_loss_of_two_queries_worked_by_hand():
    # Orthonormal queries, each equal to its positive; the negatives are the zero vector.
    queries = torch.eye(2)
    passages = torch.stack([torch.stack([row, torch.zeros(2)]) for row in queries])
    # Row: own positive e^(1/0.5), other positive e^0, two negatives e^0.
    expected = -math.log(math.exp(2) / (math.exp(2) + 3))
    assert contrastive_loss(queries, passages, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)
    own_group_only = -math.log(math.exp(2) / (math.exp(2) + 1))
    loss = contrastive_loss(queries, passages, temperature=0.5, use_inbatch_neg=False)
    assert loss.item() == pytest.approx(own_group_only, rel=1e-6)


def test_one_query_and_one_passage_have_loss_zero():
    assert contrastive_loss(torch.ones(1, 3), torch.ones(1, 1, 3), temperature=0.02).item() == 0


@settings(max_examples=60)
@given(
    batch=st.integers(1, 5),
    group=st.integers(1, 4),
    in_batch=st.booleans(),
    with_known=st.booleans(),
    margin=st.sampled_from([None, 0.0, 0.5, -0.5]),
    seed=st.integers(0, 1000),
)
def test_the_loss_equals_a_nested_loop_over_unmasked_columns(batch, group, in_batch, with_known, margin, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, 4, generator=generator)
    passages = torch.randn(batch, group, 4, generator=generator)
    ids = torch.randint(PADDING_ID, 6, (batch, group), generator=generator)
    ids[:, 0] = ids[:, 0].clamp(min=0)
    known = torch.randint(PADDING_ID, 6, (batch, 2), generator=generator) if with_known else None
    loss = contrastive_loss(
        queries,
        passages,
        temperature=0.7,
        use_inbatch_neg=in_batch,
        masked=masked_in_batch(ids, known, queries=batch, use_inbatch_neg=in_batch),
        false_negative_margin=margin,
    )
    expected = reference_loss(queries, passages, 0.7, in_batch, ids, known, margin)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_passage_far_above_the_positive_is_no_negative_worked_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Query 0 scores its positive 0.5, its own negative 0.9, the others' passages 0.7 and 0.55.
    passages = torch.tensor([[[0.5, 0.1], [0.9, 0.2]], [[0.7, 0.8], [0.55, 0.3]]])
    others_of_first = {None: [0.9, 0.7, 0.55], 0.1: [0.9, 0.55], 0.01: [0.9]}
    for margin, others in others_of_first.items():
        first = math.log(1 + sum(math.exp(score - 0.5) for score in others))
        second = math.log(1 + sum(math.exp(score - 0.8) for score in (0.3, 0.1, 0.2)))
        loss = contrastive_loss(queries, passages, temperature=1.0, false_negative_margin=margin)
        assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_a_confirmed_negative_counts_however_high_it_scores_worked_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    passages = torch.tensor([[[0.5, 0.1], [0.9, 0.2]], [[0.7, 0.8], [0.65, 0.3]]])
    confirmed = torch.tensor([[False, False, True, False], [False] * 4])
    first = math.log(1 + sum(math.exp(score - 0.5) for score in (0.9, 0.7)))  # 0.65 is masked, 0.7 was judged
    second = math.log(1 + sum(math.exp(score - 0.8) for score in (0.3, 0.1, 0.2)))
    loss = contrastive_loss(queries, passages, temperature=1.0, false_negative_margin=0.1, confirmed=confirmed)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_the_margin_finds_confirmed_negatives_among_the_passages_of_a_batch_by_their_ids(tiny_bert):
    backbone, _, config = load_backbone(str(tiny_bert), flag="--model")
    ids = torch.tensor([[1, 2], [3, 4]])
    embeddings = torch.nn.functional.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)))
    queries, passages = embeddings[:2], embeddings[2:].reshape(2, 2, 32)
    known = torch.full((2, 1), PADDING_ID)

    def loss_of(margin, confirmed_ids):
        options = LossOptions(temperature=0.5, false_negative_margin=margin)
        return RetrievalLoss(BiEncoder(backbone, config), options)._contrastive(
            queries, passages, ids, known, confirmed_ids
        )

    all_masked, plain = loss_of(0.0, None), loss_of(None, None)
    everything = torch.tensor([[3, 4], [1, 2]])
    assert all_masked < plain
    assert torch.equal(loss_of(0.0, everything), plain)
    assert torch.equal(loss_of(None, everything), plain)
    assert torch.equal(loss_of(0.0, torch.full((2, 2), PADDING_ID)), all_masked)


def test_an_infinite_margin_is_the_plain_loss_to_the_bit():
    queries, passages = torch.randn(7, 5), torch.randn(7, 3, 5)
    plain, infinite = (
        contrastive_loss(queries, passages, temperature=0.02, false_negative_margin=margin)
        for margin in (None, math.inf)
    )
    assert torch.equal(plain, infinite)


def test_distillation_is_the_divergence_from_the_teachers_softmax_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    passages = torch.tensor([[[0.6, 0.8], [0.8, 0.6]], [[0.0, 1.0], [1.0, 0.0]]])
    teacher = torch.tensor([[3.0, 1.0], [5.0, float("-inf")]])  # the second query has one text only
    loss = distillation_loss(queries, passages, teacher, temperature=0.5, teacher_temperature=2.0)
    p = [math.exp(1.5), math.exp(0.5)]
    q = [math.exp(1.2), math.exp(1.6)]
    p, q = ([value / sum(values) for value in values] for values in (p, q))
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert loss.item() == pytest.approx(divergence / 2, rel=1e-5)


def test_distillation_is_zero_for_the_teacher_itself_and_its_gradient_is_finite():
    torch.manual_seed(0)
    queries, passages = torch.randn(3, 4, requires_grad=True), torch.randn(3, 2, 4)
    teacher = torch.einsum("bh,bgh->bg", queries, passages).detach() / 0.1
    teacher[2, 1] = float("-inf")
    loss = distillation_loss(queries, passages, teacher, temperature=0.1, teacher_temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert queries.grad.abs().max() < 1e-5


def test_masking_with_no_such_texts_equals_the_plain_loss_exactly():
    torch.manual_seed(0)
    queries, passages = torch.randn(4, 8), torch.randn(4, 3, 8)
    ids = torch.arange(12).reshape(4, 3)
    known = torch.tensor([[0, 100], [3, 101], [6, 102], [9, PADDING_ID]])
    plain = contrastive_loss(queries, passages, temperature=0.02)
    masked = masked_in_batch(ids, known, queries=4)
    assert torch.equal(plain, contrastive_loss(queries, passages, temperature=0.02, masked=masked))


def test_a_positive_that_two_queries_share_is_not_a_negative_of_either():
    ids = torch.tensor([[5, 7, 5, 8]])  # query 0: target column 0; query 1: target column 2, the same text
    known = torch.tensor([[5, 90], [5, 91]])
    masked = masked_columns(ids, torch.tensor([0, 2]), known)
    assert masked.tolist() == [[False, False, True, False], [True, False, False, False]]


def test_a_text_in_several_columns_counts_once_and_the_query_itself_never():
    ids = torch.tensor([[5, 7, 7, 90]])
    masked = masked_columns(ids, torch.tensor([0]), torch.tensor([[5, 90]]))
    assert masked.tolist() == [[False, False, True, True]]


def masked_in_loops(columns, targets, known):
    """The definition of masked_columns, column by column."""
    return [
        [
            number != target and (text == PADDING_ID or (known is not None and (text in ids or text in row[:number])))
            for number, text in enumerate(row)
        ]
        for row, target, ids in zip(
            columns.expand(len(targets), -1).tolist(),
            targets.tolist(),
            known.tolist() if known is not None else [()] * len(targets),
        )
    ]


@settings(max_examples=200)
@given(
    queries=st.integers(1, 5),
    width=st.integers(1, 8),
    known=st.sampled_from([None, 0, 1, 2, 7]),
    shared=st.booleans(),
    texts=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_masked_columns_are_those_of_the_definition(queries, width, known, shared, texts, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(PADDING_ID, texts, (1 if shared else queries, width), generator=generator)
    targets = torch.randint(0, width, (queries,), generator=generator)
    known_ids = None if known is None else torch.randint(PADDING_ID, texts, (queries, known), generator=generator)
    before = columns.clone()
    masked = masked_columns(columns, targets, known_ids)
    assert masked.tolist() == masked_in_loops(columns, targets, known_ids)
    assert torch.equal(columns, before)


def test_the_mask_is_computed_once_for_all_matryoshka_dimensions(tiny_bert, monkeypatch):
    from embedding_finetune.training import loss as module

    calls = []
    monkeypatch.setattr(module, "masked_columns", lambda *given: calls.append(1) or masked_columns(*given))
    backbone, _, config = load_backbone(str(tiny_bert), flag="--model")
    model = RetrievalLoss(BiEncoder(backbone, config), LossOptions(matryoshka={32: 1.0, 16: 1.0, 8: 1.0}))
    ids = torch.randint(5, 60, (4, 9))
    model(
        padded_texts(ids, torch.ones_like(ids)),
        query_index=torch.tensor([0, 1]),
        passage_index=torch.tensor([[2], [3]]),
        passage_ids=torch.tensor([[20], [30]]),
        known_ids=torch.tensor([[20], [30]]),
    )
    assert calls == [1]


def test_a_row_with_every_negative_masked_stays_finite_with_zero_gradient():
    queries = torch.randn(2, 4, requires_grad=True)
    passages = torch.randn(2, 2, 4)
    ids = torch.tensor([[5, 5], [5, PADDING_ID]])
    masked = masked_in_batch(ids, torch.tensor([[5], [5]]), queries=2)
    loss = contrastive_loss(queries, passages, temperature=0.02, masked=masked)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(queries.grad, torch.zeros_like(queries))


def test_scores_are_float32_under_bfloat16_autocast():
    # 0.9990 and 0.9985 are the same number in bfloat16; divided by 0.02 they differ by 0.025.
    query = torch.tensor([[1.0, 0.0]])
    passages = torch.tensor([[[0.9990, 0.0], [0.9985, 0.0]]])
    exact = contrastive_loss(query, passages, temperature=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(query, passages, temperature=0.02), exact)
    assert exact.item() == pytest.approx(math.log(1 + math.exp(-0.0005 / 0.02)), rel=1e-3)


def test_groups_gathered_from_other_ranks_shift_the_targets():
    torch.manual_seed(0)
    queries, passages = torch.randn(4, 8), torch.randn(4, 3, 8)
    whole = contrastive_loss(queries, passages, temperature=0.1)
    parts = [contrastive_loss(queries[rank : rank + 2], passages, temperature=0.1, first_group=rank) for rank in (0, 2)]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_module_adds_the_teachers_divergence_to_the_contrastive_loss_of_the_texts_embeddings(tiny_bert, recompute):
    backbone, _, config = load_backbone(str(tiny_bert), flag="--model")
    model = BiEncoder(backbone, config).eval()
    ids = torch.randint(5, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    texts = padded_texts(ids, torch.ones_like(ids), ends=[2, 4, 5])
    # Both queries are told apart from text 3, which the first one has as its negative and the second as its positive.
    batch = {"query_index": torch.tensor([0, 1]), "passage_index": torch.tensor([[2, 3], [3, 4]])}
    batch |= {"passage_ids": torch.tensor([[20, 30], [30, 40]]), "known_ids": torch.tensor([[20, 1], [30, 2]])}
    teacher = torch.tensor([[2.0, 1.0], [3.0, float("-inf")]])
    options = LossOptions(temperature=0.3, distillation_weight=0.5, teacher_temperature=2.0)
    loss = RetrievalLoss(model, options, recompute_sub_batches=recompute)
    embeddings = model(ids, torch.ones_like(ids))
    queries, passages = embeddings[:2], embeddings[torch.tensor([[2, 3], [3, 4]])]
    masked = masked_in_batch(batch["passage_ids"], batch["known_ids"], queries=2)
    contrast = contrastive_loss(queries, passages, temperature=0.3, masked=masked)
    divergence = distillation_loss(queries, passages, teacher, temperature=0.3, teacher_temperature=2.0)
    assert loss(texts, **batch)["loss"].item() == pytest.approx(contrast.item(), rel=1e-5)
    expected = contrast.item() + 0.5 * divergence.item()
    assert loss(texts, **batch, teacher_scores=teacher)["loss"].item() == pytest.approx(expected, rel=1e-5)
