"""On a GPU: activations and norms as Triton compiles them there, against the definition computed on the CPU."""

from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.kernels.activation import FUNCTIONS, Activation, activate, rebuilder
from megamem.kernels.block_codec import BlockFormat
from megamem.kernels.norm import normalise
from megamem.kernels.norm import rebuilder as norm_rebuilder
from megamem.kernels.regelu2 import reference as regelu2_reference

pytestmark = pytest.mark.gpu

# One rounding to the dtype, and in fp32 the approximations of exp and rsqrt; relative, of norms.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}
FORMATS = [None, BlockFormat(), BlockFormat(element="int8", group=96), BlockFormat(element="e5m2", power_of_two=True)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


def compare(function: Any, rebuild: Any, leaves: list[torch.Tensor], upstream: torch.Tensor) -> None:
    """Output, output made again, and gradients, on the GPU and on the CPU; twice, for the bits."""
    results: list[list[torch.Tensor]] = []
    for device in ("cpu", "cuda", "cuda"):
        given = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
        output = function(*given)
        again = torch.full_like(output, float("nan"))
        rebuild(output)(again)
        output.backward(upstream.to(device))
        results.append([output.detach(), again, *(leaf.grad for leaf in given)])  # type: ignore[misc]
    for expected, found, twin in zip(*results, strict=True):
        assert relative(found, expected) < ROUNDING[leaves[0].dtype]
        assert torch.equal(found, twin)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("clamp", [None, 1.5])
def test_activations(format: Any, dtype: torch.dtype, function: Any, clamp: float | None) -> None:
    pytest.importorskip("triton", reason="pip install triton")
    activation = Activation(function=function, clamp=clamp)
    random = torch.Generator().manual_seed(1)
    x, bias, weights, upstream = (
        torch.randn(*shape, generator=random).to(dtype) for shape in ((65, 2 * 1096), (2 * 1096,), (65, 1), (65, 1096))
    )
    compare(
        lambda x, bias, weights: activate(x, activation, bias=bias, weights=weights, format=format),
        rebuilder, [x, bias, weights], upstream,
    )  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("width", [200, 4096, 12288])
@pytest.mark.parametrize("centred", [False, True])
def test_norms(format: Any, dtype: torch.dtype, width: int, centred: bool) -> None:
    pytest.importorskip("triton", reason="pip install triton")
    random = torch.Generator().manual_seed(2)
    x, upstream = (torch.randn(700, width, generator=random).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, generator=random).to(dtype) for _ in range(2))
    compare(
        lambda x, weight, bias: normalise(x, weight, bias, eps=1e-5, centred=centred, format=format),
        norm_rebuilder, [x, weight, bias], upstream,
    )  # fmt: skip


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("width", [37, 2048, 16384])
def test_regelu2(dtype: torch.dtype, width: int, approximate: Any) -> None:
    """Bits and gradients to the bit: sums and comparisons in fp32 have nothing to round otherwise."""
    pytest.importorskip("triton", reason="pip install triton")
    from megamem.kernels.regelu2 import triton as kernels

    random = torch.Generator().manual_seed(3)
    x, upstream = ((3 * torch.randn(65, width, generator=random)).to(dtype) for _ in range(2))
    bias = torch.randn(width, generator=random).to(dtype)
    expected, expected_bits = regelu2_reference.forward(x, bias, approximate)
    found, bits = kernels.forward(x.cuda(), bias.cuda(), approximate)
    assert relative(found, expected) < ROUNDING[dtype]
    assert torch.equal(bits.cpu(), expected_bits)
    gradient = kernels.backward(upstream.cuda(), bits)
    assert torch.equal(gradient.cpu(), regelu2_reference.backward(upstream, expected_bits))


def test_nothing_waits_for_the_device() -> None:
    pytest.importorskip("triton", reason="pip install triton")
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        hidden = normalise(x, weight, eps=1e-5, format=BlockFormat())
        activate(hidden, Activation(function="silu"), format=BlockFormat()).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
