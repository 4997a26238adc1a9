import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.retrieval.budget import TokenBudget

CPU = torch.device("cpu")


def test_the_default_suits_the_device_and_a_given_number_stands():
    assert TokenBudget(None, CPU).tokens == 4096
    assert TokenBudget(None, torch.device("mps")).tokens == 8192
    assert TokenBudget(None, torch.device("cuda")).tokens == 65_536
    assert TokenBudget(11, CPU).tokens == 11


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), tokens=st.integers(1, 100), fits=st.integers(1, 100)
)
def test_all_items_go_through_in_order_in_parts_that_fit(sizes, tokens, fits):
    budget, parts = TokenBudget(tokens, CPU), []

    def work(part):
        if sum(part) > fits and len(part) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        parts.append(part)
        return list(part)

    results = list(budget.within(sizes, sum, work))
    assert [size for part in results for size in part] == sizes
    assert all(len(part) == 1 or sum(part) <= min(tokens, fits) for part in parts)
    assert budget.tokens <= tokens


def test_after_a_halving_later_parts_fit_at_once():
    budget, tried = TokenBudget(100, CPU), []

    def work(part):
        tried.append(sum(part))
        if sum(part) > 30:
            raise RuntimeError("MPS backend out of memory")
        return part

    for _ in range(2):
        list(budget.within([10] * 10, sum, work))
    assert tried == [100, 50, *[20, 10, 20] * 4]
    assert budget.tokens == 25


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("something else")])
def test_an_item_that_does_not_fit_alone_and_other_errors_are_raised(error):
    def work(part):
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(TokenBudget(100, CPU).within([10] if "memory" in str(error) else [10, 10], sum, work))
