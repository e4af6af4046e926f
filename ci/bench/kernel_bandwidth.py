"""Kernels that move memory and little else, against the rate at which this machine copies: codec, SwiGLU, norms.

    python ci/bench/kernel_bandwidth.py --out ci/bench/results/kernel_bandwidth.h200.json --device cuda

`gb_per_s` counts what a kernel has to read and write once, whatever it really moves, and `of_copy` is that over the
rate of `Tensor.copy_` between two buffers of 1 GiB in the same run. Rivals, where they are installed and compute the
same: Liger's Triton kernels (pip install liger-kernel) and PyTorch's own operators. On a GPU, times are those of a CUDA
graph of one call, so that no launch of Python's is in them, and the L2 cache is flushed before each; medians of 30. On
a CPU the definitions run, in PyTorch's operations: toy sizes, to show that everything runs.

Targets, on a GPU: 85 % of the copy rate for the codec and SwiGLU, 80 % for norms; not slower than Liger.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import common
import torch
from torch.nn import functional

from megamem.kernels.activation import Activation
from megamem.kernels.backends import implementation
from megamem.kernels.block_codec import BlockFormat, Quantised, dequantise, quantise

Call = Callable[[], Any]
SWIGLU, FORMAT = Activation(function="silu"), BlockFormat()
EPS = 1e-5
ASKED = {"codec": 0.85, "swiglu": 0.85, "norm": 0.80}


@dataclass(frozen=True)
class Case:
    """One operation: what it has to move, ours, and rivals of the same work by name."""

    kind: str
    name: str
    nbytes: int
    ours: Call
    rivals: dict[str, Call]


class Clock:
    """Milliseconds of a call: of a CUDA graph of it on a GPU, of the processor on a CPU."""

    def __init__(self, device: str, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions
        self.flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device == "cuda" else None

    def time(self, call: Call) -> common.Json:
        """Over all repetitions."""
        if self.flush is None:
            return common.summary(self._on_cpu(call) for _ in range(self.repetitions))
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        taken = []
        for _ in range(self.repetitions + 10):
            self.flush.zero_()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            marks[0].record()  # type: ignore[no-untyped-call]
            graph.replay()  # type: ignore[no-untyped-call]
            marks[1].record()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            taken.append(marks[0].elapsed_time(marks[1]))
        return common.summary(taken[10:])

    @staticmethod
    def _on_cpu(call: Call) -> float:
        clock = common.Clock()
        with clock.running():
            call()
        return 1e3 * clock.wall


def codec_cases(tokens: int, width: int, device: str) -> list[Case]:
    values = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    cases = []
    for element in ("e4m3", "int8"):
        format = BlockFormat(element=element)
        coded = quantise(values, format)
        nbytes = values.nbytes + format.nbytes(values.shape)
        cases += [
            Case("codec", f"quantise, {element}", nbytes, lambda f=format: quantise(values, f), {}),  # type: ignore[misc]
            Case("codec", f"dequantise, {element}", nbytes,
                 lambda f=format, c=coded: dequantise(c, f, torch.bfloat16), {}),  # type: ignore[misc]
        ]  # fmt: skip
    return cases


def swiglu_cases(tokens: int, width: int, device: str) -> list[Case]:
    source = torch.randn(tokens, 2, width, device=device, dtype=torch.bfloat16)
    gradient = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    operations = implementation("megamem.kernels.activation", None, source.device)
    _, coded = operations.forward(source, None, None, SWIGLU, FORMAT)
    small, output = FORMAT.nbytes(source.shape), torch.empty_like(gradient)
    liger: dict[str, Call] = {}
    back: dict[str, Call] = {}
    if device == "cuda" and find_spec("liger_kernel") is not None:
        from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward

        flat = source.view(tokens, 2 * width)
        liger = {"Liger": lambda: swiglu_fused_gate_up_forward(flat)}
        back = {"Liger": lambda: swiglu_fused_gate_up_backward(flat, gradient)}

    def forward(format: BlockFormat | None) -> Any:
        return operations.forward(source, None, None, SWIGLU, format)

    def backward(saved: Any, format: BlockFormat | None) -> Any:
        return operations.backward(gradient, saved, None, None, SWIGLU, format)

    eager = {"PyTorch, not fused": lambda: functional.silu(source[:, 0]) * source[:, 1]}
    whole = source.nbytes + output.nbytes
    return [
        Case("swiglu", "forward", whole, lambda: forward(None), liger | eager),
        Case("swiglu", "forward, coding its input", whole + small, lambda: forward(FORMAT), {}),
        Case("swiglu", "backward", 2 * source.nbytes + output.nbytes, lambda: backward(source, None), back),
        Case("swiglu", "backward from codes", small + source.nbytes + output.nbytes,
             lambda: backward(Quantised(*coded), FORMAT), back),
        Case("swiglu", "output again from codes", small + output.nbytes,
             lambda: operations.rebuild_(output, Quantised(*coded), None, None, SWIGLU, FORMAT), {}),
    ]  # fmt: skip


def norm_cases(tokens: int, width: int, device: str, centred: bool) -> list[Case]:
    source = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    gradient, output = torch.randn_like(source), torch.empty_like(source)
    weight = torch.ones(width, device=device, dtype=torch.bfloat16)
    bias = torch.zeros_like(weight) if centred else None
    operations = implementation("megamem.kernels.norm", None, source.device)
    _, mean, rstd, coded = operations.forward(source, weight, bias, EPS, centred, FORMAT)
    small = FORMAT.nbytes(source.shape)
    kind = f"{'LayerNorm' if centred else 'RMSNorm'} of {width}"

    def forward(format: BlockFormat | None) -> Any:
        return operations.forward(source, weight, bias, EPS, centred, format)

    def backward(saved: Any, format: BlockFormat | None) -> Any:
        return operations.backward(gradient, saved, mean, rstd, weight, bias, format)

    rivals, back = liger_norms(source, weight, bias, gradient, device)
    theirs = functional.layer_norm if centred else functional.rms_norm
    arguments = (weight, bias, EPS) if centred else (weight, EPS)
    rivals["PyTorch"] = lambda: theirs(source, (width,), *arguments)  # type: ignore[operator]
    return [
        Case("norm", f"{kind}, forward", 2 * source.nbytes, lambda: forward(None), rivals),
        Case("norm", f"{kind}, forward, coding its input", 2 * source.nbytes + small, lambda: forward(FORMAT), {}),
        Case("norm", f"{kind}, backward", 3 * source.nbytes, lambda: backward(source, None), back),
        Case("norm", f"{kind}, backward from codes", 2 * source.nbytes + small,
             lambda: backward(Quantised(*coded), FORMAT), back),
        Case("norm", f"{kind}, output again from codes", source.nbytes + small,
             lambda: operations.rebuild_(output, Quantised(*coded), mean, rstd, weight, bias, FORMAT), {}),
    ]  # fmt: skip


def liger_norms(
    source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gradient: torch.Tensor, device: str
) -> tuple[dict[str, Call], dict[str, Call]]:
    """Liger's forward and backward passes, where they run."""
    if device != "cuda" or find_spec("liger_kernel") is None:
        return {}, {}
    if bias is None:
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

        _, saved, rstd, block, warps, casting = rms_norm_forward(source, weight, EPS, 0.0, "llama", None)
        return (
            {"Liger": lambda: rms_norm_forward(source, weight, EPS, 0.0, "llama", None)},
            {"Liger": lambda: rms_norm_backward(
                gradient, saved, weight, rstd, 0.0, casting, block, warps, False, None)},
        )  # fmt: skip
    from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward

    _, saved, mean, rstd, *_ = layer_norm_forward(source, weight, bias, EPS)
    return (
        {"Liger": lambda: layer_norm_forward(source, weight, bias, EPS)},
        {"Liger": lambda: layer_norm_backward(gradient, saved, weight, bias, mean, rstd)},
    )


def copy_rate(clock: Clock, nbytes: int, device: str) -> common.Json:
    """GB/s of a copy, reads and writes counted."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = clock.time(lambda: target.copy_(source))
    return {"milliseconds": milliseconds, "gb_per_s": 2e-6 * nbytes / milliseconds["median"]}


def measure(case: Case, clock: Clock, copied: float) -> common.Json:
    """Ours and its rivals."""
    times = {name: clock.time(call) for name, call in {"megamem": case.ours, **case.rivals}.items()}
    rate = 1e-6 * case.nbytes / times["megamem"]["median"]
    return {
        "kind": case.kind, "name": case.name, "nbytes": case.nbytes, "milliseconds": times, "gb_per_s": rate,
        "of_copy": rate / copied,
    }  # fmt: skip


def targets(rows: list[common.Json]) -> list[common.Json]:
    """Shares of the copy rate by kind of kernel, the median over its cases; and Liger, case by case."""
    found = []
    for kind, asked in ASKED.items():
        shares = [row["of_copy"] for row in rows if row["kind"] == kind]
        middle = statistics.median(shares)
        what = f"{kind}: {middle:.1%} of the copy rate, {min(shares):.1%} to {max(shares):.1%}; {asked:.0%} asked"
        found.append({"what": what, "met": min(shares) >= asked})
    for row in rows:
        if "Liger" in row["milliseconds"]:
            ratio = row["milliseconds"]["megamem"]["median"] / row["milliseconds"]["Liger"]["median"]
            found.append({"what": f"{row['name']}: {ratio:.2f} times Liger's time", "met": ratio <= 1.0})
    return found


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    small = args.quick or args.device == "cpu"
    clock = Clock(args.device, 3 if small else 30)
    copied = copy_rate(clock, 1 << (20 if small else 30), args.device)
    tokens, widths = (64, (256,)) if small else (8192, (4096, 8192, 16384))
    cases = codec_cases(tokens, 512 if small else 28672, args.device)
    cases += swiglu_cases(tokens, 256 if small else 14336, args.device)
    for width in widths:
        cases += [case for centred in (False, True) for case in norm_cases(tokens, width, args.device, centred)]
    rows = [measure(case, clock, copied["gb_per_s"]) for case in cases]
    on_gpu = args.device == "cuda"
    results: common.Json = {
        "device": args.device, "tokens": tokens, "copy": copied, "cases": rows,
        "targets": targets(rows) if on_gpu and not small else [],
        "absent": [] if find_spec("liger_kernel") is not None and on_gpu else ["Liger"],
    }  # fmt: skip
    table = [
        (row["name"], f"{row['milliseconds']['megamem']['median']:.3f}", f"{row['gb_per_s']:,.0f}",
         f"{row['of_copy']:.1%}",
         ", ".join(f"{name} {one['median']:.3f}" for name, one in row["milliseconds"].items() if name != "megamem"))
        for row in rows
    ]  # fmt: skip
    common.print_table(
        f"{args.device}: a copy runs at {copied['gb_per_s']:,.0f} GB/s",
        ("", "ms", "GB/s", "of a copy", "others, ms"), table,
    )  # fmt: skip
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])
    common.write(args.out, "kernel_bandwidth", args, results, with_gpu=on_gpu)


if __name__ == "__main__":
    main()
