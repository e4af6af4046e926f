"""The Triton row kernels, in the interpreter: equal to the plain PyTorch ones.

`test_ahead_of_time.py` compiles them for the GPUs they are for; only a GPU can tell their speed
(ci/bench/linear_cross_entropy.py).
"""

from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytest.importorskip("triton", reason="pip install 'megamem[dev]'")

import torch

from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy, linear_cross_entropy_reference, rows
from megamem.kernels.linear_cross_entropy.rows import empty_statistics

EVERYTHING = {
    "softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1, "logit_scale": 0.7, "entropy": True, "arg_max": True,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "smoothing": {"label_smoothing": 0.1},
    "entropy": {"entropy": True},
    "arg-max": {"arg_max": True, "logit_scale": 2.0},
    "everything": EVERYTHING,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32 = 2e-6


@pytest.fixture
def interpreted(interpreter: ModuleType) -> ModuleType:
    """The module of the kernels, with each of them run by the interpreter."""
    from megamem.kernels.linear_cross_entropy import triton as kernels

    return kernels


def operands(num_tokens: int, num_columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk of logits, with a row stride that is not its width, and labels inside and outside of it."""
    random = torch.Generator().manual_seed(2)
    logits = (3.0 * torch.randn(num_tokens, num_columns + 8, generator=random)).to(dtype)[:, :num_columns]
    labels = torch.randint(-20, num_columns + 200, (num_tokens,), generator=random)
    return logits, labels


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_pytorch(interpreted: ModuleType, case: dict[str, Any], dtype: torch.dtype) -> None:
    """Two chunks, the second narrower than a block and beginning at word 100."""
    options = LossOptions(vocab_size=300, **case)
    found, expected = (empty_statistics(12, options, torch.device("cpu")) for _ in range(2))
    for first_word, num_columns in ((0, 100), (100, 37)):
        logits, labels = operands(12, num_columns, dtype)
        untouched = logits.clone()
        interpreted.add_statistics_(logits, labels, found, options, first_word)
        assert torch.equal(logits, untouched)
        rows.add_statistics_(logits.clone(), labels, expected, options, first_word)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)  # the logits' sums cancel
    if options.arg_max:
        assert torch.equal(found[-1], expected[-1])


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_gradient_is_that_of_pytorch(
    interpreted: ModuleType, case: dict[str, Any], dtype: torch.dtype, in_place: bool
) -> None:
    """In place; and from fp32 logits to another dtype."""
    options = LossOptions(vocab_size=300, **case)
    logits, labels = operands(12, 77, dtype if in_place else torch.float32)
    coefficients = torch.rand(len(options.coefficients), 12, generator=torch.Generator().manual_seed(3))
    coefficients[0] += 9.0  # the maximum
    results = []
    for operations in (interpreted, rows):
        source = logits.clone()
        target = source if in_place else torch.full((12, 77), float("nan"), dtype=dtype)
        operations.replace_by_gradient_(source, labels, coefficients, target, options, 50)
        results.append(target)
    # One rounding to 16 bits may fall on the other side.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("width", [1, 15, 16, 4096, 4097])
def test_every_width_of_chunk(interpreted: ModuleType, width: int) -> None:
    options = LossOptions(vocab_size=5000, **EVERYTHING)
    logits, labels = operands(3, width, torch.float32)
    found, expected = (empty_statistics(3, options, torch.device("cpu")) for _ in range(2))
    interpreted.add_statistics_(logits, labels, found, options, 0)
    rows.add_statistics_(logits.clone(), labels, expected, options, 0)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-4)  # total and weighted: sums of 4097 numbers
    coefficients = torch.rand(len(options.coefficients), 3)
    coefficients[0] += 12.0  # the maximum
    gradients = [logits.clone(), logits.clone()]
    interpreted.replace_by_gradient_(gradients[0], labels, coefficients, gradients[0], options, 0)
    rows.replace_by_gradient_(gradients[1], labels, coefficients, gradients[1], options, 0)
    torch.testing.assert_close(*gradients, rtol=2e-6, atol=1e-6)


def test_the_whole_operation_with_the_kernels(interpreted: ModuleType) -> None:
    options = LossOptions(vocab_size=200, **EVERYTHING)
    random = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(10, 16, generator=random), torch.randn(203, 16, generator=random)
    labels = torch.randint(200, (10,), generator=random)
    labels[3] = -100
    found: list[list[torch.Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        if dtype == torch.float32:
            outputs = linear_cross_entropy(*leaves, labels, options, backend="triton", chunk=64)
        else:
            outputs = linear_cross_entropy_reference(*leaves, labels, options)
        assert outputs.entropy is not None and outputs.arg_max is not None
        (outputs.loss.sum() + 2 * outputs.entropy.sum() - outputs.log_probability.sum()).backward()
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    for value, expected in zip(*found, strict=True):
        assert (value - expected).abs().max() <= FP32 * expected.abs().max()


def test_the_operators_keep_their_contracts(interpreted: ModuleType) -> None:
    """What they say they write to is all they write to, and their fake implementations agree."""
    logits, labels = operands(4, 40, torch.float32)
    options = LossOptions(vocab_size=40)
    checks = ("test_schema", "test_faketensor")
    statistics = empty_statistics(4, options, torch.device("cpu"))
    torch.library.opcheck(
        interpreted._statistics_operator, (logits, labels, statistics, 0, 1.0, 0.0, 0, 0, 0), test_utils=checks
    )
    coefficients = torch.rand(3, 4)
    for source in (None, logits):
        target = torch.rand(4, 40)
        torch.library.opcheck(
            interpreted._gradient_operator, (target, source, labels, coefficients, 0, 1.0, 0.0, 0, 0), test_utils=checks
        )
