"""The codec: its definition against float8 as PyTorch and ml formats define it, its kernels bit for bit against it."""

from types import ModuleType

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.kernels.block_codec import BlockFormat, Quantised, dequantise, quantise, quantise_reference

ELEMENTS = ("e4m3", "e5m2", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative root mean square error of normally distributed values. Rounding the scale up to a power of two widens the
# steps of int8 by 1.4 on average; float8 has steps that are relative anyway.
ERRORS = {"e4m3": 0.0265, "e5m2": 0.053, "int8": 0.0067}
POWER_ERRORS = {"e4m3": 0.0275, "e5m2": 0.055, "int8": 0.0095}
FORMATS = [BlockFormat(element=element, power_of_two=power) for element in ELEMENTS for power in (False, True)]  # type: ignore[arg-type]


def name_of(format: BlockFormat) -> str:
    return f"{format.element}-{format.group}{'-power' * format.power_of_two}"


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(values: torch.Tensor, format: BlockFormat) -> float:
    back = dequantise(quantise(values, format), format, torch.float32).double()
    return float((back - values).norm() / values.double().norm())


def assert_same(found: Quantised, expected: Quantised) -> None:
    """Bit for bit, NaN scales included."""
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales.view(torch.int32), expected.scales.view(torch.int32))


def every_code() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8)


def midpoints_and_neighbours(element: str) -> torch.Tensor:
    """All finite values of a code, all numbers halfway between two, and the fp32 numbers next to each of them.

    In groups of 128 that begin with the largest code, so that the scale is 1 to rounding.
    """
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}[element]
    values = every_code().view(dtype).float()
    values = values[values.isfinite()].unique()
    largest = values.max()
    middles = torch.cat([(values[1:] + values[:-1]) / 2, values])
    up, down = (torch.nextafter(middles, torch.full_like(middles, sign * 1e9)) for sign in (1, -1))
    points = torch.cat([middles, up, down])
    points = torch.cat([points, torch.zeros(-len(points) % 127)]).view(-1, 127)
    return torch.cat([largest.expand(len(points), 1), points], 1).clamp(-largest, largest)


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_relative_error(format: BlockFormat) -> None:
    assert relative_error(normal(64, 1024), format) < (POWER_ERRORS if format.power_of_two else ERRORS)[format.element]


@pytest.mark.parametrize("scale", [1e-30, 1e-2, 1e2, 1e30])
def test_error_does_not_depend_on_the_scale(scale: float) -> None:
    assert relative_error(normal(16, 512) * scale, BlockFormat()) < ERRORS["e4m3"]


@pytest.mark.parametrize("element", ELEMENTS)
def test_values_that_have_a_code_come_back_unchanged(element: str) -> None:
    """With a power of two as the scale, at every scale; the largest value in each group makes it so."""
    format = BlockFormat(element=element, group=256, power_of_two=True)  # type: ignore[arg-type]
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}[element]
    values = every_code().view(dtype).float()
    values = values.where(values.isfinite() & (values.abs() <= 127 if element == "int8" else values.isfinite()), 0.0)
    for factor in (1.0, 2.0**-40, 2.0**60):
        back = dequantise(quantise(values * factor, format), format, torch.float32)
        assert torch.equal(back, values * factor)


@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_are_the_nearest(element: str) -> None:
    """Halfway between two codes the even one, just beside it the nearer one: as PyTorch's own conversion."""
    format = BlockFormat(element=element, power_of_two=True)  # type: ignore[arg-type]
    points = midpoints_and_neighbours(element)
    codes, scales = quantise(points, format)
    assert torch.equal(scales, torch.ones_like(scales))
    if element == "int8":
        assert torch.equal(codes.view(torch.int8).float(), points.round())
    else:
        dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[element]
        assert torch.equal(codes, points.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_infinity_and_nan_come_back_as_nan(interpreter: ModuleType, element: str, backend: str) -> None:
    """All of their group; the groups beside it are as without them."""
    format = BlockFormat(element=element, group=16)  # type: ignore[arg-type]
    values = normal(4, 64)
    values[0, 20], values[1, 33], values[2, 63] = float("inf"), float("nan"), -float("inf")
    back = dequantise(quantise(values, format, backend=backend), format, torch.bfloat16, backend=backend)  # type: ignore[arg-type]
    bad = torch.zeros(4, 4, dtype=torch.bool)
    bad[0, 1] = bad[1, 2] = bad[2, 3] = True
    assert torch.equal(back.isnan(), bad.repeat_interleave(16, 1))
    assert back.isfinite().logical_or(back.isnan()).all()


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0), (2, 0, 5), (0, 0)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_values(interpreter: ModuleType, shape: tuple[int, ...], backend: str) -> None:
    format = BlockFormat()
    codes, scales = quantise(torch.empty(shape), format, backend=backend)  # type: ignore[arg-type]
    assert codes.shape == shape and scales.shape == (*shape[:-1], format.num_groups(shape[-1]))
    back = dequantise((codes, scales), format, torch.float16, backend=backend)  # type: ignore[arg-type]
    assert back.shape == shape and back.dtype == torch.float16


def test_zeros_keep_their_sign() -> None:
    values = torch.tensor([0.0, -0.0])
    back = dequantise(quantise(values, BlockFormat()), BlockFormat(), torch.float32)
    assert torch.equal(back, values) and torch.equal(back.signbit(), values.signbit())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        quantise(torch.zeros(4).to(dtype), BlockFormat())


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no dimension"):
        quantise(torch.tensor(1.0), BlockFormat())
    with pytest.raises(ValueError, match="'fp8'"):
        BlockFormat(element="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group is 1 to"):
        BlockFormat(group=0)
    codes, scales = quantise(torch.ones(2, 256), BlockFormat())
    with pytest.raises(TypeError, match="float64"):
        dequantise((codes, scales), BlockFormat(), torch.float64)
    with pytest.raises(TypeError, match="uint8"):
        dequantise((codes.view(torch.int8), scales), BlockFormat(), torch.float32)
    with pytest.raises(ValueError, match="do not belong together"):
        dequantise((codes, scales), BlockFormat(group=64), torch.float32)
    with pytest.raises(ValueError, match="'cuda'"):
        quantise(torch.ones(2), BlockFormat(), backend="cuda")  # type: ignore[arg-type]


def test_bytes_are_what_the_format_says() -> None:
    for shape, format in (((3, 5, 300), BlockFormat()), ((40,), BlockFormat(group=7)), ((2, 0), BlockFormat())):
        codes, scales = quantise(torch.ones(shape), format)
        assert format.nbytes(shape) == codes.nbytes + scales.nbytes


def test_a_range_of_tokens_is_coded_alike() -> None:
    values = normal(10, 3, 200)
    whole, part = quantise(values, BlockFormat()), quantise(values[4:7], BlockFormat())
    assert_same(Quantised(whole.codes[4:7], whole.scales[4:7]), part)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_kernels_on_two_million_values(
    interpreter: ModuleType, monkeypatch: pytest.MonkeyPatch, format: BlockFormat, soft: bool
) -> None:
    """Every code and every scale, over 60 orders of magnitude; with the hardware's conversion and without."""
    from megamem.kernels.block_codec import triton as kernels

    monkeypatch.setattr(kernels, "_TILE", 1 << 17)  # the interpreter's time is a number of programs
    monkeypatch.setattr(kernels, "needs_soft", lambda device: soft)
    random = torch.Generator().manual_seed(3)
    values = torch.randn(1 << 14, 128, generator=random) * torch.empty(1 << 14, 1).uniform_(-100, 100).exp2()
    values *= torch.empty(128).uniform_(-8, 0, generator=random).exp2()
    expected = quantise_reference(values, format)
    assert_same(kernels.quantise(values, format), expected)
    back = dequantise(expected, format, torch.bfloat16)
    assert torch.equal(kernels.dequantise(expected, format, torch.bfloat16), back)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of infinite codes
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_kernels_on_midpoints_and_every_code(
    interpreter: ModuleType, monkeypatch: pytest.MonkeyPatch, format: BlockFormat, soft: bool
) -> None:
    from megamem.kernels.block_codec import triton as kernels

    monkeypatch.setattr(kernels, "needs_soft", lambda device: soft)
    points = midpoints_and_neighbours(format.element)
    assert_same(kernels.quantise(points, format), quantise_reference(points, format))
    codes = Quantised(every_code().view(2, 128), torch.tensor([[1.0], [3.0]]))
    found, expected = kernels.dequantise(codes, format, torch.float32), dequantise(codes, format, torch.float32)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "group"), [(1, 128), (127, 128), (129, 128), (300, 96), (7, 3), (256, 1)])
def test_kernels_with_tails_and_any_group(interpreter: ModuleType, dtype: torch.dtype, width: int, group: int) -> None:
    format = BlockFormat(group=group)
    values = normal(3, 5, width).to(dtype)
    found = quantise(values, format, backend="triton")
    assert_same(found, quantise(values, format))
    back = dequantise(found, format, dtype, backend="triton")
    assert torch.equal(back, dequantise(found, format, dtype))


def test_kernels_with_any_strides(interpreter: ModuleType) -> None:
    """A column slice is read where it is; what has no unit stride is copied first."""
    values = normal(6, 4, 400)
    for view in (values[..., 100:300], values.transpose(0, 2), values[::2, 1], values[0].expand(3, 4, 400)):
        found = quantise(view, BlockFormat(), backend="triton")
        assert_same(found, quantise(view.clone(), BlockFormat()))
        assert found.codes.is_contiguous() and found.scales.is_contiguous()
        assert dequantise(found, BlockFormat(), torch.float32).is_contiguous()


def test_head_wise_groups(interpreter: ModuleType) -> None:
    """One scale for each head of 80 elements: a head of large values leaves the others alone."""
    values = normal(6, 2, 8 * 80)
    values[..., :80] *= 1000.0
    format = BlockFormat(element="int8", group=80)
    found = quantise(values, format, backend="triton")
    assert found.scales.shape == (6, 2, 8)
    back = dequantise(found, format, torch.float32, backend="triton")
    others = (back - values)[..., 80:].norm() / values[..., 80:].norm()
    assert others < ERRORS["int8"]


def test_the_operators_keep_their_contracts(interpreter: ModuleType) -> None:
    from megamem.kernels.block_codec import triton as kernels

    checks = ("test_schema", "test_faketensor")
    values = normal(3, 200)
    torch.library.opcheck(kernels._quantise_operator, (values, "e4m3", 128, False, False), test_utils=checks)
    codes, scales = quantise(values, BlockFormat())
    arguments = (codes, scales, "e4m3", 128, torch.bfloat16, False)
    torch.library.opcheck(kernels._dequantise_operator, arguments, test_utils=checks)
