"""Giving back the memory of an output that a consumer has saved, and filling it again for its backward pass."""

import weakref
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch
from torch import Tensor

from megamem.runtime.discard import discard


def product(x: Tensor, weight: Tensor, made: list[int]) -> Tensor:
    """tanh(x) @ weight, whose first factor is not kept."""
    output = torch.tanh(x)
    result = output @ weight
    source = x.detach()

    def rebuild(target: Tensor) -> None:
        made.append(target.numel())
        torch.tanh(source, out=target)

    assert discard(output, rebuild, result) == output.nbytes
    return result


def leaves() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return tuple(torch.randn(6, 6, generator=random).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def test_gradients_are_those_of_a_kept_output() -> None:
    x, weight = leaves()
    expected = torch.autograd.grad((torch.tanh(x) @ weight).square().sum(), (x, weight))
    made: list[int] = []
    found = torch.autograd.grad(product(x, weight, made).square().sum(), (x, weight))
    assert made == [36]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_memory_is_free_in_between() -> None:
    x, weight = leaves()
    output = torch.tanh(x)
    result = output @ weight
    discard(output, lambda target: None, result)
    assert output.untyped_storage().nbytes() == 0 and output.shape == (6, 6)


def test_a_retained_graph_is_filled_once() -> None:
    x, weight = leaves()
    made: list[int] = []
    result = product(x, weight, made).sum()
    first = torch.autograd.grad(result, (x, weight), retain_graph=True)
    second = torch.autograd.grad(result, (x, weight))
    assert made == [36]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_it_lets_go_as_the_backward_pass_goes_on() -> None:
    """The loss, and with it the graph, may live on; the memory may not."""
    x, weight = leaves()
    output = torch.tanh(x)
    storage = weakref.ref(output.untyped_storage())
    result = output @ weight
    source = x.detach()
    discard(output, lambda target: torch.tanh(source, out=target), result)
    del output
    loss = result.sum()
    loss.backward()
    assert storage() is None and loss.grad_fn is not None


@pytest.mark.parametrize("case", ["no gradient", "part of a storage", "same memory"])
def test_what_is_left_as_it_is(case: str) -> None:
    x, weight = leaves()
    output: Any = torch.tanh(x)
    result = output @ weight
    if case == "no gradient":
        result = result.detach()
    elif case == "part of a storage":
        output = output[:3]
    else:
        result = output.view(36)
    assert discard(output, lambda target: None, result) == 0
    assert output.untyped_storage().nbytes() > 0
