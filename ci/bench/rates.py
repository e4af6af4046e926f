"""What the machine does by itself: GEMM and attention rates at the shapes measured, and the link to host memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
import torch.nn.functional as F
from rig import Shape


def timed_ms(run: Callable[[], object], repetitions: int) -> common.Json:
    """Milliseconds of the current stream, each repetition by a pair of events."""
    run()
    marks = []
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()  # type: ignore[no-untyped-call]
        run()
        end.record()  # type: ignore[no-untyped-call]
        marks.append((begin, end))
    torch.cuda.synchronize()
    return common.summary(max(begin.elapsed_time(end), 1e-6) for begin, end in marks)


def gemms(shape: Shape, tokens: int, dtype: torch.dtype, device: str, repetitions: int) -> common.Json:
    """The layer's four products on `tokens` tokens, in TFLOP/s."""
    gates = 2 if shape.kind == "llama" else 1
    sizes = {
        "qkv": (shape.hidden, shape.q + 2 * shape.kv),
        "projection": (shape.q, shape.hidden),
        "fc1": (shape.hidden, gates * shape.ffn),
        "fc2": (shape.ffn, shape.hidden),
    }
    found: common.Json = {"tokens": tokens}
    for name, (inner, outer) in sizes.items():
        left = torch.randn(tokens, inner, device=device, dtype=dtype)
        right = torch.randn(outer, inner, device=device, dtype=dtype)
        took = timed_ms(lambda left=left, right=right: left @ right.t(), repetitions)  # type: ignore[misc]
        found[name] = {"ms": took, "tflops": 2 * tokens * inner * outer / took["median"] / 1e9}
    return found


def attention(shape: Shape, tokens: int, dtype: torch.dtype, device: str, repetitions: int) -> common.Json:
    """Causal attention, forward and backward, in TFLOP/s; the backward pass counts 2.5 times the forward's FLOPs."""
    q = torch.randn(tokens, 1, shape.heads, shape.head_dim, device=device, dtype=dtype).permute(1, 2, 0, 3)
    k, v = (
        torch.randn(tokens, 1, shape.kv_groups, shape.head_dim, device=device, dtype=dtype).permute(1, 2, 0, 3)
        for _ in range(2)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    gqa = shape.kv_groups != shape.heads
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    gradient = torch.randn_like(output)

    def forward() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    flops = shape.attention_flops(tokens)
    ahead = timed_ms(forward, repetitions)
    back = timed_ms(
        lambda: torch.autograd.grad(output, (q, k, v), gradient, retain_graph=True), max(repetitions // 2, 1)
    )
    return {
        "tokens": tokens, "heads": shape.heads, "kv_groups": shape.kv_groups,
        "forward": {"ms": ahead, "tflops": flops / ahead["median"] / 1e9},
        "backward": {"ms": back, "tflops": 2.5 * flops / back["median"] / 1e9},
    }  # fmt: skip


def link(host: torch.Tensor, device: str, nbytes: int, repetitions: int) -> common.Json:
    """Copies of `nbytes` to and from pinned memory, alone and both at once, in GB/s (10^9) of each direction."""
    half = min(host.numel() // 2, nbytes)
    down, up = host[:half], host[half : 2 * half]
    sources, targets = (torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2))
    streams: list[Any] = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(to_host: bool) -> None:
        (down if to_host else targets).copy_(sources if to_host else up, non_blocking=True)

    def duplex() -> None:
        for stream, to_host in zip(streams, (True, False), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                copy(to_host)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    found: common.Json = {"nbytes": half}
    for name, run in {
        "to_host": lambda: copy(True),
        "to_device": lambda: copy(False),
        "duplex": duplex,
    }.items():
        took = timed_ms(run, repetitions)
        found[name] = {"ms": took, "gb_per_s": half / took["median"] / 1e6}
    return found


def pin(memory: Any, nbytes: int) -> tuple[torch.Tensor, common.Json]:
    """Reserve pinned memory as the engine does; (memory, rate). Later calls of `memory.host_buffer` share it."""
    begin = time.perf_counter()
    block = memory.host_buffer(nbytes)
    seconds = time.perf_counter() - begin
    rate = block.numel() / seconds / 1e9
    return block, {"asked_bytes": nbytes, "bytes": block.numel(), "seconds": seconds, "gb_per_s": rate}


def middle(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)
