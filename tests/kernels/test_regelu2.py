"""ReGELU2: the forward pass is GELU, the backward pass the slope of three ramps; kernels against the definition."""

from math import inf, isnan
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch
from torch import Tensor
from torch.nn import functional

from megamem.kernels.regelu2 import SLOPES, THRESHOLDS, regelu2
from megamem.kernels.regelu2.reference import WEIGHTS

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def ramps(x: Tensor) -> Tensor:
    """The function whose slope the backward pass takes."""
    return sum(a * (x - c).relu() for a, c in zip(WEIGHTS, THRESHOLDS, strict=True))  # type: ignore[return-value]


def run(function: Any, x: Tensor, bias: Tensor | None, upstream: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, bias) if leaf is not None]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def operands(dtype: torch.dtype, width: int = 211, tokens: tuple[int, ...] = (3, 5)) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = (*tokens, width), (width,), (*tokens, width)
    x, bias, upstream = (torch.randn(*shape, generator=random) for shape in shapes)
    return (4 * x).to(dtype), bias.to(dtype), upstream.to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def test_the_ramps_are_0_on_the_left_and_x_on_the_right() -> None:
    assert sum(WEIGHTS) == pytest.approx(1.0, abs=1e-12)
    assert sum(a * c for a, c in zip(WEIGHTS, THRESHOLDS, strict=True)) == pytest.approx(0.0, abs=1e-7)
    assert pytest.approx((0.0, -0.0492226, 1.0487406, 1.0)) == SLOPES


def test_no_threshold_nearby_is_better() -> None:
    """The constants are a minimum of the square of the distance from GELU, as published."""
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)

    def distance(thresholds: list[float]) -> float:
        """With the best weights that keep the two conditions: on a line of them, the lowest point of a parabola."""
        first, second, third = thresholds
        base = torch.tensor([0.0, third / (third - second), -second / (third - second)], dtype=torch.float64)
        along = torch.tensor(
            [1.0, -(third - first) / (third - second), (second - first) / (third - second)], dtype=torch.float64
        )
        ramp = torch.stack([(x - c).relu() for c in thresholds])
        apart, change = base @ ramp - functional.gelu(x), along @ ramp
        best = apart - change * (apart @ change) / (change @ change)
        return float(best.square().sum() * (x[1] - x[0]))

    least = distance(list(THRESHOLDS))
    assert least == pytest.approx(0.0095, abs=1e-4)
    for number in range(3):
        for step in (-0.05, 0.05):
            moved = list(THRESHOLDS)
            moved[number] += step
            assert distance(moved) > least


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of exp(-x) of a sigmoid far to the left
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_output_is_gelu_and_gradient_is_the_ramps(
    interpreter: ModuleType, backend: Any, dtype: torch.dtype, approximate: Any, with_bias: bool
) -> None:
    x, bias, upstream = operands(dtype)
    given = bias if with_bias else None
    found = run(
        lambda x, bias=None: regelu2(x, bias=bias, approximate=approximate, backend=backend), x, given, upstream
    )
    wide = None if given is None else bias.double()
    total = x.float() if given is None else x.float() + bias.float()  # the bits are of this sum in fp32
    expected = [functional.gelu(total.double(), approximate=approximate)]
    expected += run(lambda x, bias=None: ramps(x if bias is None else x + bias), x.double(), wide, upstream.double())[
        1:
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert relative(ours, theirs) < 1.5 * ROUNDING[dtype]


@pytest.mark.parametrize(("scale", "error"), [(0.1, 0.96), (0.5, 0.54), (1.0, 0.357), (3.0, 0.200), (10.0, 0.111)])
def test_how_wrong_the_gradient_is(scale: float, error: float) -> None:
    """As the docstring says: by the scale of the input, against GELU's own gradient."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(400, 1000, generator=random) * scale
    ones = torch.ones_like(x)
    found, expected = run(regelu2, x, None, ones)[1], run(functional.gelu, x, None, ones)[1]
    assert relative(found, expected) == pytest.approx(error, rel=0.02)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.02)  # right in the mean


@pytest.mark.parametrize("width", [1, 3, 4, 5, 64, 211, 1100])
def test_bits_are_the_definition_s(interpreter: ModuleType, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every width, in one program and in several; at the thresholds themselves and beside them too."""
    from megamem.kernels.regelu2 import reference
    from megamem.kernels.regelu2 import triton as kernels

    monkeypatch.setattr(kernels, "_TILE", 128)
    x, _, upstream = operands(torch.float32, width, (4,))
    edges = torch.tensor(THRESHOLDS)
    edges = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
    x.view(-1)[: min(len(edges), x.numel())] = edges[: x.numel()]
    outputs, bits = zip(*(module.forward(x, None, "none") for module in (reference, kernels)), strict=True)
    assert torch.equal(*bits) and bits[0].shape == (4, -(-width // 4))
    assert relative(*outputs) < ROUNDING[torch.float32]
    assert torch.equal(reference.backward(upstream, bits[0]), kernels.backward(upstream, bits[0]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_and_missing_input(interpreter: ModuleType, backend: Any) -> None:
    x = operands(torch.float32, 64, (6, 4))[0]
    for view in (x[::2], x.transpose(0, 1), x.transpose(0, 2).contiguous().transpose(0, 2), x[..., 10:51], x[0, 0]):
        leaf = view.detach().requires_grad_()
        found = regelu2(leaf, backend=backend)
        torch.testing.assert_close(found.detach(), functional.gelu(view), rtol=2e-6, atol=1e-6)
        found.sum().backward()  # an upstream gradient without memory of its own
        assert leaf.grad is not None and torch.isin(leaf.grad, torch.tensor(SLOPES)).all()
    for shape in ((0, 128), (3, 0, 128), (5, 0)):
        none = torch.zeros(shape, requires_grad=True)
        bias = torch.zeros(shape[-1], requires_grad=True)
        found = regelu2(none, bias=bias, backend=backend)
        found.sum().backward()
        assert found.shape == shape and none.grad is not None and none.grad.shape == shape
        assert bias.grad is not None and not bias.grad.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinities
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_infinity_and_nan(interpreter: ModuleType, backend: Any) -> None:
    """The output shows them; two bits cannot, so the gradient is the upstream one's, or nothing far to the left."""
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], requires_grad=True)
    output = regelu2(x, backend=backend)
    nan, infinite, negative, one = output.detach()[0].tolist()
    assert isnan(nan) and infinite == inf and isnan(negative) and one == pytest.approx(0.84134, abs=1e-5)
    output.backward(torch.tensor([[2.0, 3.0, 4.0, float("nan")]]))
    assert x.grad is not None
    assert x.grad[0, :3].tolist() == [2.0, 3.0, 0.0] and x.grad[0, 3].isnan()


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        regelu2(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="int"):
        regelu2(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="no dimension"):
        regelu2(torch.tensor(1.0))
    with pytest.raises(ValueError, match="bias is"):
        regelu2(torch.zeros(2, 4), bias=torch.zeros(2))
    with pytest.raises(ValueError, match="'sigmoid'"):
        regelu2(torch.zeros(2, 4), approximate="sigmoid")  # type: ignore[arg-type]
    x = torch.randn(2, 4, requires_grad=True)
    upstream = torch.ones(2, 4, requires_grad=True)
    (first,) = torch.autograd.grad(regelu2(x), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_is_saved() -> None:
    saved: list[Tensor] = []
    x = torch.randn(8, 1024, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        regelu2(x, bias=torch.zeros(1024, requires_grad=True))
    assert [tensor.nbytes for tensor in saved] == [x.nbytes // 8]


def test_the_operators_keep_their_contracts(interpreter: ModuleType) -> None:
    from megamem.kernels.regelu2 import triton as kernels

    x, output, bits = torch.randn(3, 64), torch.empty(3, 64), torch.zeros(3, 16, dtype=torch.uint8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._forward_operator, (output, bits, x, torch.randn(64), "gelu"), test_utils=checks)
    torch.library.opcheck(kernels._backward_operator, (output, x, bits), test_utils=checks)
