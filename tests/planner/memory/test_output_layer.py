"""What plans say that the loss holds, against every operator of a real one, traced without memory behind it."""

from __future__ import annotations

from typing import Any

import pytest

from megamem.ir.job import Job, Layout
from megamem.ir.model import Model
from megamem.planner.memory.device import chunk_of_words, output_bytes

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

TOKENS, HIDDEN, WORDS = 8192, 1024, 64000
SIZES = {"num_layers": 1, "hidden_size": HIDDEN, "ffn_hidden_size": HIDDEN, "num_attention_heads": 8}
MODEL = Model(**SIZES, num_query_groups=8, kv_channels=128, vocab_size=WORDS)


def traced(chunk: int) -> int:
    """Bytes at most, besides hidden states, weight and main_grad; logits by chunks of the vocabulary."""
    from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
    from megamem.testing.live import LiveStorages

    device = torch.device("meta")
    weight: Any = torch.nn.Parameter(torch.empty(WORDS, HIDDEN, dtype=torch.bfloat16, device=device))
    weight.main_grad = torch.empty(WORDS, HIDDEN, dtype=torch.float32, device=device)
    weight.grad_added_to_main_grad = False
    hidden = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device, requires_grad=True)
    labels = torch.empty(TOKENS, dtype=torch.int64, device=device)
    with LiveStorages() as live:
        live.ignore([hidden, weight, weight.main_grad, labels])
        options = LossOptions(vocab_size=WORDS)
        found = linear_cross_entropy(
            hidden, weight, labels, options, into_main_grad=True, backend="triton", chunk=chunk or None
        )
        found.loss.mean().backward()
        return live.peak_bytes


@pytest.mark.parametrize("chunk", [0, 2048, 32000])
def test_the_loss_holds_what_plans_say(chunk: int) -> None:
    job = Job(model=MODEL, layout=Layout(), seq_length=TOKENS, bf16=True)
    assert output_bytes(job, fused=True, chunk=chunk) == pytest.approx(traced(chunk), rel=0.01)


@pytest.mark.parametrize("tokens", [1, 100, 8192, 1 << 20])
@pytest.mark.parametrize("entries", [1, 5, 40, 700, 32000, 50257, 128256])
def test_the_chunk_is_the_kernel_s(tokens: int, entries: int) -> None:
    from megamem.kernels.linear_cross_entropy.passes import chunk_columns

    assert chunk_of_words(tokens, entries, 2) == chunk_columns(tokens, entries, 2)
