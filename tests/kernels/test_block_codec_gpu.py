"""On a GPU: the kernels as they are compiled there give the bits of the definition, computed on the CPU."""

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.kernels.block_codec import BlockFormat, Element, dequantise, quantise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("element", ["e4m3", "e5m2", "int8"])
def test_the_bits_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, element: Element, power_of_two: bool, soft: bool
) -> None:
    """Two million values over 60 orders of magnitude, some of them no numbers; the definition on the GPU too."""
    pytest.importorskip("triton", reason="pip install triton")
    from megamem.kernels.block_codec import triton as kernels

    if not soft and kernels.needs_soft(torch.device("cuda")):
        pytest.skip("this GPU converts nothing to float8")
    monkeypatch.setattr(kernels, "needs_soft", lambda device: soft)
    format = BlockFormat(element=element, power_of_two=power_of_two)
    random = torch.Generator().manual_seed(3)
    values = torch.randn(4096, 520, generator=random) * torch.empty(4096, 1).uniform_(-100, 100).exp2()
    values[7, 300], values[9, 519] = float("inf"), float("nan")
    expected = quantise(values, format)
    back = dequantise(expected, format, torch.bfloat16)
    for backend in ("triton", "torch"):
        found = quantise(values.cuda(), format, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(found.codes.cpu(), expected.codes)
        assert torch.equal(found.scales.cpu().nan_to_num(-1.0), expected.scales.nan_to_num(-1.0))
        returned = dequantise(found, format, torch.bfloat16, backend=backend).cpu()  # type: ignore[arg-type]
        assert torch.equal(returned.view(torch.int16), back.view(torch.int16)) or torch.equal(
            returned.nan_to_num(), back.nan_to_num()
        )
