"""Norms: against PyTorch's in float64, with their input as it is and in 8 bits; kernels against the definition."""

from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch
from torch import Tensor
from torch.nn import functional as F

from megamem.kernels.backends import node_of
from megamem.kernels.block_codec import BlockFormat
from megamem.kernels.norm import normalise, rebuilder

ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KINDS = ["rms", "layer", "rms with bias"]
EPS = 1e-5


def operands(kind: str, dtype: torch.dtype, width: int, tokens: tuple[int, ...] = (3, 4)) -> list[Tensor | None]:
    """Input with a mean and outliers as residual streams have them, weight, bias, upstream gradient."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(*tokens, width, generator=random) + 0.5
    x[..., ::37] *= 8.0
    weight = torch.randn(width, generator=random) * 0.2 + 1.0
    bias = torch.randn(width, generator=random) if kind != "rms" else None
    upstream = torch.randn(*tokens, width, generator=random)
    return [None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias, upstream)]


def expected_of(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = x.shape[-1:]
    if kind == "layer":
        return F.layer_norm(x, shape, weight, bias, EPS)
    result = F.rms_norm(x, shape, weight, EPS)
    return result if bias is None else result + bias


def run(function: Any, upstream: Tensor, leaves: list[Tensor | None]) -> list[Tensor | None]:
    """Output and gradients."""
    given = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = function(*given)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(None if leaf is None else leaf.grad for leaf in given)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def compare(kind: str, dtype: torch.dtype, tolerance: float, width: int = 200, **options: Any) -> None:
    """With PyTorch in float64: the output to rounding, gradients to the tolerance."""
    x, weight, bias, upstream = operands(kind, dtype, width)
    assert upstream is not None
    centred = kind == "layer"
    found = run(lambda *given: normalise(*given, eps=EPS, centred=centred, **options), upstream, [x, weight, bias])
    wide = [None if leaf is None else leaf.double() for leaf in (x, weight, bias)]
    expected = run(lambda *given: expected_of(kind, *given), upstream.double(), wide)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is not None and theirs is not None:
            assert ours.dtype == dtype and ours.shape == theirs.shape
            assert relative(ours, theirs) < (tolerance if number else ROUNDING[dtype]), number


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_exact_storage(kind: str, dtype: torch.dtype) -> None:
    compare(kind, dtype, ROUNDING[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("element", "tolerance"), [("e4m3", 0.03), ("e5m2", 0.06), ("int8", 0.025)])
def test_storage_in_8_bits(kind: str, element: Any, tolerance: float) -> None:
    """The output is exact, gradients carry at most the error of the codec; INT8's is of the outliers."""
    compare(kind, torch.bfloat16, tolerance, width=384, format=BlockFormat(element=element))


@pytest.mark.parametrize("format", [None, BlockFormat(), BlockFormat(element="int8", group=32)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_output_is_rebuilt_from_what_was_saved(
    interpreter: ModuleType, kind: str, format: Any, backend: Any
) -> None:
    x, weight, bias, _ = operands(kind, torch.bfloat16, 200)
    assert x is not None and weight is not None
    output = normalise(
        x.requires_grad_(), weight, bias, eps=EPS, centred=kind == "layer", format=format, backend=backend
    )  # fmt: skip
    again = torch.full((12, 200), float("nan"), dtype=torch.bfloat16)
    rebuilder(output)(again)
    error = relative(again, output.detach().view(12, 200))
    assert error == 0.0 if format is None else 1e-3 < error < 0.03


@pytest.mark.parametrize("format", [None, BlockFormat(), BlockFormat(group=48)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_kernels_are_the_definition(
    interpreter: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    format: BlockFormat | None,
    wide: bool,
) -> None:
    """To rounding; the codes of the input bit for bit. Wide rows have a kernel of their own for the sums."""
    from megamem.kernels.norm import triton as kernels

    monkeypatch.setattr(kernels, "_MOST_PARTS", 3)
    if wide:
        monkeypatch.setattr(kernels, "_SUMMED_WIDTH", 100)
        monkeypatch.setattr(kernels, "_SUMS_WIDTH", 128)
    x, weight, bias, upstream = operands(kind, dtype, 212, tokens=(5,))
    assert upstream is not None
    results: list[list[Any]] = []
    codes: list[list[Tensor]] = []
    for backend in ("torch", "triton"):
        leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in (x, weight, bias)]
        output = normalise(*leaves, eps=EPS, centred=kind == "layer", format=format, backend=backend)  # type: ignore[arg-type]
        node = node_of(output)
        codes.append([] if format is None else [tensor.float() for tensor in node.saved_tensors[:2]])
        output.backward(upstream)
        results.append([output.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*codes, strict=True))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or relative(theirs, ours) < ROUNDING[dtype]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_and_missing_input(interpreter: ModuleType, backend: Any) -> None:
    x, weight, bias, _ = operands("layer", torch.float32, 64, tokens=(6, 4))
    assert x is not None and weight is not None
    for view in (x[::2], x.transpose(0, 1), x.transpose(0, 2).contiguous().transpose(0, 2), x[0, 0]):
        leaf = view.detach().requires_grad_()
        found = normalise(leaf, weight, bias, eps=EPS, centred=True, format=BlockFormat(), backend=backend)
        torch.testing.assert_close(found.detach(), expected_of("layer", view, weight, bias), rtol=3e-6, atol=1e-6)
        found.sum().backward()  # an upstream gradient without memory of its own
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    for shape in ((0, 64), (3, 0, 64)):
        none = torch.zeros(shape, requires_grad=True)
        scale = weight.clone().requires_grad_()
        found = normalise(none, scale, bias, eps=EPS, centred=True, format=BlockFormat(), backend=backend)
        assert found.shape == shape
        found.sum().backward()
        assert scale.grad is not None and not scale.grad.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinities
def test_infinity_and_nan_are_not_hidden(interpreter: ModuleType, backend: Any, bad: float) -> None:
    """They make all of their row NaN, output and gradient; other rows are as without them."""
    x, weight, _, upstream = operands("rms", torch.float32, 256, tokens=(3,))
    assert x is not None and weight is not None
    x[1, 200] = bad
    leaf = x.clone().requires_grad_()
    output = normalise(leaf, weight, eps=EPS, format=BlockFormat(), backend=backend)
    expected = expected_of("rms", x, weight, None)
    assert torch.equal(output.isnan(), expected.isnan())
    output.backward(upstream)
    assert leaf.grad is not None
    assert leaf.grad[1].isnan().all() and leaf.grad[[0, 2]].isfinite().all()


def test_what_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match="int32"):
        normalise(x.int(), weight, eps=EPS)
    with pytest.raises(ValueError, match=r"weight is \[8\]"):
        normalise(x, torch.ones(7), eps=EPS)
    with pytest.raises(ValueError, match=r"bias is \[8\]"):
        normalise(x, weight, torch.ones(2, 8), eps=EPS)
    pytest.importorskip("triton", reason="pip install 'megamem[dev]'")
    with pytest.raises(ValueError, match="at most 16384 with Triton"):
        normalise(torch.zeros(1, 16385), torch.ones(16385), eps=EPS, backend="triton")


@pytest.mark.parametrize("format", [None, BlockFormat()], ids=str)
def test_what_is_saved(format: BlockFormat | None) -> None:
    """The input or its codes, and two numbers a token."""
    saved: list[Tensor] = []
    x, weight, bias, _ = operands("layer", torch.bfloat16, 1024, tokens=(16,))
    assert x is not None and weight is not None and bias is not None
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        normalise(x.requires_grad_(), weight, bias, eps=EPS, centred=True, format=format)
    total = sum(tensor.nbytes for tensor in saved) - weight.nbytes - bias.nbytes
    assert total == 2 * 4 * 16 + (x.nbytes if format is None else format.nbytes(x.shape))


def test_the_operators_keep_their_contracts(interpreter: ModuleType) -> None:
    from megamem.kernels.norm import triton as kernels

    checks = ("test_schema", "test_faketensor")
    x, output, weight, mean, rstd = torch.randn(3, 64), torch.empty(3, 64), torch.ones(64), *torch.empty(2, 3)
    codes, scales = torch.empty(3, 64, dtype=torch.uint8), torch.empty(3, 2)
    arguments = (output, mean, rstd, codes, scales, x, weight, weight.clone(), EPS, "e4m3", 32, False, False)
    torch.library.opcheck(kernels._forward_operator, arguments, test_utils=checks)
    kernels._forward_operator(*arguments)
    rebuilt = (output, codes, scales, mean, rstd, weight, weight.clone(), "e4m3", 32, False)
    torch.library.opcheck(kernels._rebuild_operator, rebuilt, test_utils=checks)
    parts = (torch.empty(3, 64), torch.empty(2, 64), torch.empty(2, 64))
    backward = (*parts, torch.randn(3, 64), codes, scales, mean, rstd, weight, "e4m3", 32, False)
    torch.library.opcheck(kernels._backward_operator, backward, test_utils=checks)
