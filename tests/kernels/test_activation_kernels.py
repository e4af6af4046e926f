"""Fused activations: against autograd of their formulas, with their input as it is and in 8 bits; kernels against both.

Megatron-Core's own option for the same purpose converts the input to E4M3 without a scale; its error is beside ours.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch
from torch import Tensor
from torch.nn import functional as F

from megamem.kernels.activation import FUNCTIONS, Activation, activate, rebuilder
from megamem.kernels.backends import node_of
from megamem.kernels.block_codec import BlockFormat

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BASE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
CASES = {
    **{f"gated {name}": {"function": name} for name in FUNCTIONS},
    **{name: {"function": name, "gated": False} for name in FUNCTIONS},
    "clamp": {"function": "silu", "clamp": 0.8},
    "clamp and offset": {"function": "quick_gelu", "clamp": 1.1, "offset": 1.0},
}


def formula(x: Tensor, activation: Activation, bias: Tensor | None, weights: Tensor | None) -> Tensor:
    """In float64, differentiated by autograd."""
    if bias is not None:
        x = x + bias
    if not activation.gated:
        result = BASE[activation.function](x)
    else:
        gate, up = x.chunk(2, -1)
        if activation.clamp is not None:
            gate, up = gate.clamp(max=activation.clamp), up.clamp(-activation.clamp, activation.clamp)
        result = BASE[activation.function](gate) * (up + activation.offset)
    return result if weights is None else result * weights


def operands(
    activation: Activation, dtype: torch.dtype, width: int = 40, tokens: tuple[int, ...] = (3, 4), seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, bias, weights and upstream gradient."""
    random = torch.Generator().manual_seed(seed)
    columns = width * activation.halves
    made = [
        torch.randn(*shape, generator=random)
        for shape in ((*tokens, columns), (columns,), (*tokens, 1), (*tokens, width))
    ]
    return tuple(tensor.to(dtype) for tensor in made)  # type: ignore[return-value]


def run(function: Callable[..., Tensor], upstream: Tensor, *leaves: Tensor | None) -> list[Tensor | None]:
    """Output and gradients."""
    given = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = function(*given)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(None if leaf is None else leaf.grad for leaf in given)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def compare(
    activation: Activation,
    dtype: torch.dtype,
    tolerance: float,
    *,
    surrounded: bool = True,
    width: int = 40,
    **options: Any,
) -> None:
    """With autograd of the formula: the output to rounding, the input's gradient to the tolerance.

    Those of bias and weights are sums in which terms cancel, and errors less so: twice the tolerance.
    """
    x, bias, weights, upstream = operands(activation, dtype, width)
    leaves = (x, bias, weights) if surrounded else (x, None, None)
    found = run(lambda x, b, w: activate(x, activation, bias=b, weights=w, **options), upstream, *leaves)
    wide = [None if leaf is None else leaf.double() for leaf in leaves]
    expected = run(lambda x, b, w: formula(x, activation, b, w), upstream.double(), *wide)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is not None and theirs is not None:
            assert ours.dtype == dtype and ours.shape == theirs.shape
            assert relative(ours, theirs) < (ROUNDING[dtype], tolerance, 2 * tolerance, 2 * tolerance)[number], number


@pytest.mark.parametrize("surrounded", [False, True], ids=["alone", "bias and weights"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_exact_storage(case: dict[str, Any], dtype: torch.dtype, surrounded: bool) -> None:
    compare(Activation(**case), dtype, ROUNDING[dtype], surrounded=surrounded)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize(("element", "tolerance"), [("e4m3", 0.031), ("e5m2", 0.062), ("int8", 0.012)])
def test_storage_in_8_bits(case: dict[str, Any], element: Any, tolerance: float) -> None:
    """The output is exact, gradients carry the error of the codec; a clamp, where they jump, costs a little more."""
    tolerance *= 1.5 if "clamp" in case else 1.0
    compare(Activation(**case), torch.bfloat16, tolerance, format=BlockFormat(element=element), width=384)


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "int8"])
def test_nothing_crosses_the_clamp(element: Any) -> None:
    """Coded, exactly those elements have no gradient that have none in 16 bits."""
    activation = Activation(function="silu", clamp=0.7)
    x = operands(activation, torch.bfloat16, width=512, tokens=(16,))[0]
    x[:, ::3] = torch.linspace(0.6, 0.8, len(x[0, ::3])).bfloat16()  # next to it
    cut = []
    for format in (None, BlockFormat(element=element)):
        leaf = x.clone().requires_grad_()
        activate(leaf, activation, format=format).sum().backward()
        assert leaf.grad is not None
        cut.append((leaf.grad == 0) & (x.roll(512, 1).abs() > 0.1))  # where the other half is not coded as 0
    assert torch.equal(*cut)


@pytest.mark.parametrize("scale", [1e-2, 0.1, 0.5, 1.0, 1.5, 3.0, 10.0, 1e2, 1e3])
def test_swiglu_at_every_scale_of_its_input(scale: float) -> None:
    """Below 3 %. Without a scale, what is smaller than 2^-6 or larger than 448 is lost: 5.6 % at 1e-2, 68 % at 1e3."""
    activation = Activation(function="silu")
    x, _, _, upstream = operands(activation, torch.bfloat16, width=1024, tokens=(64,))
    x = x * scale
    expected = run(lambda x: formula(x, activation, None, None), upstream.double(), x.double())[1]
    ours = run(lambda x: activate(x, activation, format=BlockFormat()), upstream, x)[1]
    unscaled = x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16)
    theirs = run(lambda x: formula(x, activation, None, None), upstream.double(), unscaled.double())[1]
    assert ours is not None and theirs is not None and expected is not None
    assert relative(ours, expected) < 0.03
    assert relative(ours, expected) < relative(theirs, expected)
    if scale in (1e-2, 1e3):
        assert relative(theirs, expected) > 0.05


@pytest.mark.megatron
def test_swiglu_is_megatrons() -> None:
    """To the rounding of the operations that Megatron's does in 16 bits."""
    from megamem.testing.cpu import CpuRig

    x, _, _, upstream = operands(Activation(function="silu"), torch.bfloat16, width=256)
    with CpuRig():
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        theirs = run(lambda x: bias_swiglu_impl(x, None), upstream, x)
    ours = run(lambda x: activate(x, Activation(function="silu")), upstream, x)
    for found, expected in zip(ours, theirs, strict=True):
        assert found is not None and expected is not None
        assert relative(found.flatten(), expected.flatten()) < 3 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("format", [None, BlockFormat(), BlockFormat(element="int8", group=32)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_output_is_rebuilt_from_what_was_saved(interpreter: ModuleType, format: Any, backend: Any) -> None:
    """Bit for bit where the input was saved as it is; to the codec's error otherwise. It is what backward works on."""
    activation = Activation(function="silu")
    x, bias, weights, _ = operands(activation, torch.bfloat16, width=200)
    leaf = x.requires_grad_()
    output = activate(leaf, activation, bias=bias, weights=weights, format=format, backend=backend)
    again = torch.full((12, 200), float("nan"), dtype=torch.bfloat16)
    rebuilder(output)(again)
    if format is None:
        assert torch.equal(again, output.detach().view(12, 200))
    else:
        assert 1e-3 < relative(again, output.detach().view(12, 200)) < 0.05


@pytest.mark.parametrize("format", [None, BlockFormat(), BlockFormat(group=48)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_the_definition(
    interpreter: ModuleType, case: dict[str, Any], dtype: torch.dtype, format: BlockFormat | None
) -> None:
    """To rounding; the codes of the input bit for bit. Rows with a tail, and in two programs."""
    activation = Activation(**case)
    x, bias, weights, upstream = operands(activation, dtype, width=212, tokens=(3,))
    results, codes = [], []
    for backend in ("torch", "triton"):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, bias, weights)]
        output = activate(
            leaves[0], activation, bias=leaves[1], weights=leaves[2], format=format, backend=backend  # type: ignore[arg-type]
        )  # fmt: skip
        node = node_of(output)
        codes.append([] if format is None else [tensor.float() for tensor in node.saved_tensors])
        output.backward(upstream)
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*codes, strict=True))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        assert relative(theirs, ours) < ROUNDING[dtype]


def test_kernels_in_several_programs_a_token(interpreter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from megamem.kernels.activation import triton as kernels

    monkeypatch.setattr(kernels, "_TILE", 128)
    compare(Activation(function="silu"), torch.float32, 2e-6, width=700, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_and_missing_input(interpreter: ModuleType, backend: Any) -> None:
    activation, format = Activation(function="silu"), BlockFormat()
    x = operands(activation, torch.float32, width=64, tokens=(6, 4))[0]
    for view in (x[::2], x.transpose(0, 1), x.transpose(0, 2).contiguous().transpose(0, 2), x[..., 10:90], x[0, 0]):
        expected = activate(view.clone(), activation)
        leaf = view.detach().requires_grad_()
        found = activate(leaf, activation, format=format, backend=backend)
        torch.testing.assert_close(found.detach(), expected, rtol=2e-6, atol=1e-6)
        found.sum().backward()  # an upstream gradient without memory of its own
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    for shape in ((0, 128), (3, 0, 128), (5, 0)):
        none = torch.zeros(shape, requires_grad=True)
        bias = torch.zeros(shape[-1], requires_grad=True)
        weights = torch.zeros(*shape[:-1], 1, requires_grad=True)
        found = activate(none, activation, bias=bias, weights=weights, format=format, backend=backend)
        assert found.shape == (*shape[:-1], shape[-1] // 2)
        found.sum().backward()
        assert none.grad is not None and none.grad.shape == shape
        assert bias.grad is not None and not bias.grad.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinities
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("clamp", [None, 2.0])
def test_infinity_and_nan_are_not_hidden(interpreter: ModuleType, backend: Any, clamp: float | None) -> None:
    """The output is PyTorch's; the gradient of the group that holds it is NaN, and of no other."""
    activation = Activation(function="silu", clamp=clamp)
    x = operands(activation, torch.float32, width=256, tokens=(4,))[0]
    x[0, 7], x[1, 300], x[2, 200] = float("nan"), float("nan"), float("inf")
    leaf = x.clone().requires_grad_()
    output = activate(leaf, activation, format=BlockFormat(), backend=backend)
    torch.testing.assert_close(output.detach(), formula(x, activation, None, None), equal_nan=True)
    output.backward(torch.ones_like(output))
    assert leaf.grad is not None
    # Rows: a bad gate spoils both halves, a bad up only the gate's gradient. Columns: 4 groups, 2 of them in each half.
    spoilt = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    is_nan, expected = leaf.grad.isnan(), spoilt.repeat_interleave(128, 1)
    if clamp is None:
        assert torch.equal(is_nan, expected)
    else:  # what is cut off has gradient 0, whatever it is multiplied with, and an infinity is cut off
        assert not (is_nan & ~expected).any() and (is_nan.sum(1) > 0).tolist() == [True, True, False, False]
    assert leaf.grad.isfinite().logical_or(leaf.grad.isnan()).all()


def test_what_is_refused() -> None:
    swiglu = Activation(function="silu")
    with pytest.raises(TypeError, match="float64"):
        activate(torch.zeros(2, 4, dtype=torch.float64), swiglu)
    with pytest.raises(ValueError, match="no dimension"):
        activate(torch.tensor(1.0), swiglu)
    with pytest.raises(ValueError, match="even number"):
        activate(torch.zeros(2, 5), swiglu)
    with pytest.raises(ValueError, match="bias is"):
        activate(torch.zeros(2, 4), swiglu, bias=torch.zeros(2))
    with pytest.raises(ValueError, match="weights are"):
        activate(torch.zeros(2, 4), swiglu, weights=torch.zeros(2))
    with pytest.raises(ValueError, match="'relu'"):
        Activation(function="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clamp is positive"):
        Activation(function="silu", clamp=-1.0)
    with pytest.raises(ValueError, match="two halves"):
        Activation(function="gelu", gated=False, offset=1.0)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    output = activate(x, Activation(function="silu"))
    upstream = torch.ones_like(output).requires_grad_()
    (first,) = torch.autograd.grad(output, x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("format", [None, BlockFormat()], ids=str)
def test_what_is_saved(format: BlockFormat | None) -> None:
    """The input and nothing as large beside it; or codes and scales, and not the input."""
    saved: list[Tensor] = []
    x = torch.randn(8, 1024, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        activate(x, Activation(function="silu"), format=format)
    total = sum(tensor.nbytes for tensor in saved)
    assert total == (x.nbytes if format is None else format.nbytes((8, 2, 512)))


def test_the_operators_keep_their_contracts(interpreter: ModuleType) -> None:
    from megamem.kernels.activation import triton as kernels

    checks = ("test_schema", "test_faketensor")
    x, output = torch.randn(3, 2, 64), torch.empty(3, 64)
    attributes = ("silu", None, 0.9, 0.0, "e4m3", 32)
    codes, scales = torch.empty(3, 2, 64, dtype=torch.uint8), torch.empty(3, 2, 2)
    arguments = (output, codes, scales, x, None, torch.randn(2, 64), torch.randn(3, 1), *attributes, False, False)
    torch.library.opcheck(kernels._forward_operator, arguments, test_utils=checks)
    kernels._forward_operator(*arguments)
    gradient = (torch.empty(3, 2, 64), torch.empty(3, 1), torch.randn(3, 64), codes, scales, None, torch.randn(3, 1))
    torch.library.opcheck(
        kernels._backward_operator, (*gradient, "silu", None, 0.0, "e4m3", 32, False), test_utils=checks
    )
