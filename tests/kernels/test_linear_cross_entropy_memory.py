"""No tensor of tokens x vocabulary, at any time: every allocation of forward and backward is looked at.

On the CPU as it runs; and with meta tensors, at real sizes, on the path that a GPU takes: Triton's row operations (as
the operators they are registered as) and GEMMs that add into fp32. A meta tensor has no data, so that anything that
would read a value on the host, `.item()` and its relatives, fails there: the path has no host synchronisation.
"""

from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.kernels.linear_cross_entropy import (
    LossOptions,
    chunk_columns,
    gradient_coefficients,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    shard_input_gradient,
    shard_statistics_and_numerator,
)
from megamem.testing.live import LargestStorage, LiveStorages

GIB = 1 << 30
EVERYTHING = {
    "softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1, "logit_scale": 0.7, "entropy": True, "arg_max": True,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "everything": EVERYTHING, "fp32 logits": {"fp32_logits": True}}


def operands(
    num_tokens: int, size: int, rows: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor]:
    """Hidden states and weight that need gradients, the weight's in `main_grad`, and labels."""
    hidden = torch.ones(num_tokens, size, dtype=dtype, device=device, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(rows, size, dtype=dtype, device=device))
    weight.main_grad = torch.zeros(rows, size, dtype=torch.float32, device=device)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return hidden, weight, torch.zeros(num_tokens, dtype=torch.int64, device=device)


@pytest.mark.parametrize("wanted", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "rows"), [(512, 1000), (64, 8000), (300, 133)])
@pytest.mark.parametrize("path", ["cpu", "meta"])
def test_no_allocation_is_a_quarter_of_the_logits(
    wanted: dict[str, Any], dtype: torch.dtype, num_tokens: int, rows: int, path: str
) -> None:
    if path == "meta":
        pytest.importorskip("triton", reason="pip install 'megamem[dev]'")
    options = LossOptions(vocab_size=rows, **wanted)
    hidden, weight, labels = operands(num_tokens, 8, rows, dtype, path)
    with LargestStorage() as largest:
        outputs = linear_cross_entropy(
            hidden, weight, labels, options, into_main_grad=True, backend="torch" if path == "cpu" else "triton"
        )
        sum(output.sum() for output in outputs[:3] if output is not None).backward()
    assert hidden.grad is not None
    assert 0 < largest.elements < num_tokens * rows / 4, largest.where


def test_the_parts_with_one_barrier_allocate_no_more() -> None:
    options = LossOptions(vocab_size=1000, softcap=4.0, z_loss=1e-2)
    hidden, weight, labels = (tensor.detach() for tensor in operands(512, 8, 1000, torch.float32, "cpu"))
    with LargestStorage() as largest:
        statistics, numerator = shard_statistics_and_numerator(hidden, weight, labels, options)
        coefficients = gradient_coefficients(statistics, labels, options, loss_gradient_T=torch.ones(512))
        shard_input_gradient(numerator, statistics, coefficients, weight, labels, options)
    assert 0 < largest.elements < 512 * 1000 / 4, largest.where


def test_the_tracing_sees_logits_where_there_are_some() -> None:
    hidden, weight, labels = operands(64, 8, 1000, torch.float32, "cpu")
    with LargestStorage() as largest:
        linear_cross_entropy_reference(hidden, weight, labels, LossOptions(vocab_size=1000)).loss.sum().backward()
    assert largest.elements == 64 * 1000


@pytest.mark.parametrize(
    ("num_tokens", "wanted", "limit"),
    [(8192, {}, 0.3), (8192, {"fp32_logits": True}, 0.3), (8192, EVERYTHING, 0.3), (2048, {}, 0.3), (65536, {}, 1.6)],
    ids=str,
)
def test_memory_of_a_real_output_layer(num_tokens: int, wanted: dict[str, Any], limit: float) -> None:
    """h = 4096, V = 128256 in bf16: at 8192 tokens at most 0.3 GiB beside what was there, the input gradient included.

    Stock Megatron-Core has 5.9 GiB there: fp32 softmax and bf16 logits. At 65536 tokens 1 GiB of it is the input
    gradient in fp32, and the stock's 47 GiB.
    """
    pytest.importorskip("triton", reason="pip install 'megamem[dev]'")
    hidden, weight, labels = operands(num_tokens, 4096, 128256, torch.bfloat16, "meta")
    options = LossOptions(vocab_size=128256, **wanted)
    with LiveStorages() as live:
        outputs = linear_cross_entropy(hidden, weight, labels, options, into_main_grad=True, backend="triton")
        assert live.peak_bytes < limit * GIB
        del_after = sum(output.sum() for output in outputs[:3] if output is not None)
        held = live.live_bytes()
        del_after.backward()
    assert held <= 60 * num_tokens  # between forward and backward: bytes a token, nothing of the vocabulary
    assert 0.1 * GIB < live.peak_bytes <= limit * GIB or num_tokens == 2048
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("num_tokens", [1, 100, 8192, 1 << 20])
@pytest.mark.parametrize("rows", [1, 2, 100, 999, 16032, 128256, 262144])
@pytest.mark.parametrize("nbytes", [2, 6])
def test_width_of_chunks(num_tokens: int, rows: int, nbytes: int) -> None:
    width = chunk_columns(num_tokens, rows, nbytes)
    assert width == 1 or width < rows / 4
    if rows > 16000:  # sizes that matter: as wide as the memory allows, never so narrow that GEMMs starve
        assert width % 128 == 0 and width >= min(2048, rows // 5)
        assert width * num_tokens * nbytes <= 96 << 20 or width <= 2048
