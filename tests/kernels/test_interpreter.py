"""The ground that the kernels' tests stand on: Triton's interpreter converts as the GPU does, with our correction only.

The second test fails once Triton is right by itself, and the correction in conftest.py can go: issue 8322, pull request
11897 of triton-lang/triton.
"""

from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytest.importorskip("triton", reason="pip install 'megamem[dev]'")

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as tritons

TARGETS = {
    "bf16": (tl.bfloat16, torch.bfloat16, 3.3e38),
    "e4m3": (tl.float8e4nv, torch.float8_e4m3fn, 448.0),
    "e5m2": (tl.float8e5, torch.float8_e5m2, 57344.0),
}


def torchs_bits(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What PyTorch makes of them, as integers."""
    is_wide = dtype.itemsize == 2
    return values.to(dtype).view(torch.int16 if is_wide else torch.uint8).to(torch.int32) & (
        0xFFFF if is_wide else 0xFF
    )


def bits_of(module: Any, values: torch.Tensor, target: Any) -> torch.Tensor:
    """What the interpreter makes of fp32 values where a kernel says `.to(target)`, as integers."""
    rounding = None if target == tl.bfloat16 else tritons._ir.ROUNDING_MODE.RTNE
    converted = module._convert_float(values.numpy().view(np.uint32), tl.float32, target, rounding)
    return torch.from_numpy(converted.astype(np.int32))


def samples(largest: float) -> torch.Tensor:
    """Values of every magnitude that the type has."""
    random = torch.Generator().manual_seed(5)
    exponents = torch.empty(20000).uniform_(-20.0, 18.0, generator=random)
    values = torch.randn(20000, generator=random) * exponents.exp2()
    return torch.cat([values.clamp(-largest, largest), torch.tensor([0.0, -0.0, largest, -largest])])


@pytest.mark.parametrize("name", list(TARGETS))
def test_corrected_it_converts_as_torch_does(interpreter: ModuleType, name: str) -> None:
    target, dtype, largest = TARGETS[name]
    values = samples(largest)
    assert torch.equal(bits_of(interpreter, values, target), torchs_bits(values, dtype))
    if dtype.itemsize == 1:
        beyond = torch.tensor([1.2, 100.0, float("inf"), -1.2]) * largest
        assert torch.equal(bits_of(interpreter, beyond, target), torchs_bits(beyond.clamp(-largest, largest), dtype))


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_correction_is_still_needed(name: str) -> None:
    """Uncorrected. When this fails Triton has been repaired: remove this type from `rounding_converter`."""
    target, dtype, largest = TARGETS[name]
    values = samples(largest)
    is_wrong = bits_of(tritons, values, target) != torchs_bits(values, dtype)
    assert is_wrong.float().mean() > 0.01
