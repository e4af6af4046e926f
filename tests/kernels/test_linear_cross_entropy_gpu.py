"""On a GPU: Triton's kernels as they are compiled there, cuBLAS's sums, and no wait for the device."""

from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy, linear_cross_entropy_reference

pytestmark = pytest.mark.gpu

EVERYTHING = {
    "softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1, "logit_scale": 0.7, "entropy": True, "arg_max": True,
}  # fmt: skip
# Half a unit in the last place of 1, times what logits of up to 8 make of it, as in test_linear_cross_entropy.py.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 20 * 2.0**-8, torch.float16: 20 * 2.0**-11}


def run(function: Any, hidden: Any, weight: Any, labels: Any, options: LossOptions, **kwargs: Any) -> list[Any]:
    """Outputs and gradients; the upstream gradients differ from token to token."""
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    outputs = function(hidden, weight, labels, options, **kwargs)
    upstream = torch.linspace(0.5, 1.5, len(labels), device=labels.device)
    sum((output * upstream).sum() for output in outputs[:3] if output is not None).backward()
    return [*outputs, hidden.grad, weight.grad]


@pytest.mark.parametrize("wanted", [{}, EVERYTHING, {"fp32_logits": True}], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("num_tokens", "rows", "padding"), [(300, 4001, 7), (1, 130, 0), (257, 20000, 96)])
def test_against_the_definition(
    wanted: dict[str, Any], dtype: Any, backend: str, num_tokens: int, rows: int, padding: int
) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="pip install triton")
    torch.manual_seed(0)
    options = LossOptions(vocab_size=rows, **wanted)
    hidden = torch.randn(num_tokens, 64, device="cuda").to(dtype)
    weight = (torch.randn(rows + padding, 64, device="cuda") * 0.3).to(dtype)
    labels = torch.randint(rows, (num_tokens,), device="cuda")
    labels[1::5] = -100
    expected = run(linear_cross_entropy_reference, hidden.double(), weight.double(), labels, options)
    found = run(linear_cross_entropy, hidden, weight, labels, options, backend=backend)
    again = run(linear_cross_entropy, hidden, weight, labels, options, backend=backend)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is None or (index == 3 and dtype != torch.float32):  # 16-bit logits have ties
            continue
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        assert error < TOLERANCE[dtype], index
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("wanted", [{}, EVERYTHING], ids=str)
def test_only_the_first_call_waits_for_the_device(wanted: dict[str, Any]) -> None:
    pytest.importorskip("triton", reason="pip install triton")
    options = LossOptions(vocab_size=5000, **wanted)
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight: Any = torch.nn.Parameter(torch.randn(5000, 32, device="cuda", dtype=torch.bfloat16))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(5000, 32, device="cuda"), False
    labels = torch.randint(5000, (64,), device="cuda")
    upstream = torch.ones(64, device="cuda")
    linear_cross_entropy(hidden, weight, labels, options, into_main_grad=True).loss.backward(upstream)
    hidden.grad = weight.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, options, into_main_grad=True).loss.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.main_grad.any()


def test_memory_of_a_real_output_layer() -> None:
    """8192 tokens, h = 4096, V = 128256 in bf16: at most 0.3 GiB, as traced without a GPU."""
    pytest.importorskip("triton", reason="pip install triton")
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    hidden = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight: Any = torch.nn.Parameter(torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16) / 64)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(128256, 4096, device="cuda"), False
    labels = torch.randint(128256, (8192,), device="cuda")
    options = LossOptions(vocab_size=128256)
    for _ in range(2):  # the first step makes cuBLAS's workspace
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, labels, options, into_main_grad=True).loss.mean().backward()
    assert torch.cuda.max_memory_allocated() - before <= 0.3 * (1 << 30)
