"""The output layer with its loss, forward and backward: time and memory, against every other way to compute it.

    python ci/bench/linear_cross_entropy.py --out ci/bench/results/linear_cross_entropy.cpu.json
    python ci/bench/linear_cross_entropy.py --device cuda --out ci/bench/results/linear_cross_entropy.h200.json

Contenders, all for the mean loss, for which the fastest of them compute gradients in the forward pass:

    megamem              kernels.linear_cross_entropy: PyTorch's row operations on a CPU, Triton's on a GPU
    megamem, main_grad   the same, adding the weight gradient to an fp32 main_grad: what a training run does
    torch eager          F.linear, F.cross_entropy of fp32 logits
    torch chunked        F.linear_cross_entropy with its default options, where torch has it (2.13)
    Megatron             F.linear and vocab_parallel_cross_entropy of Megatron-Core, with a group of one
    Megatron fused       the same with fused_vocab_parallel_cross_entropy (on a GPU: on a CPU it is not compiled)
    Liger, CCE           LigerFusedLinearCrossEntropyLoss, cut_cross_entropy.linear_cross_entropy; both need a GPU

Memory is what is added at most to hidden states, weight and main_grad: of storages seen by a dispatch mode on a CPU,
which leaves out what an operator holds inside itself; of the allocator on a GPU. It contains the gradients that are
returned, `gradient_bytes` for those who return both. FLOPs are those of four GEMMs (logits twice), 8 T D V, for every
contender, also for those that multiply three times. `gemm` is the same machine's rate for one product of this shape.
On a CPU `cpu_ms`, the processor time of all threads, is what rates are of: other processes do not spoil it.

Random data, fp32 on a CPU and bf16 on a GPU; contenders take turns; on a GPU the L2 cache is flushed before each step.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megamem.kernels.linear_cross_entropy import LossOptions, chunk_columns, linear_cross_entropy
from megamem.testing.live import LiveStorages

# Tokens, hidden size, vocabulary. The GPU's are those of published comparisons (Llama 3, Qwen 3, Gemma 2, Liger).
CPU_SHAPES = ((1024, 512, 32000), (256, 512, 128256))
GPU_SHAPES = (
    (4096, 2048, 128256), (8192, 4096, 131072), (8192, 4096, 32000), (16384, 5120, 151936), (8192, 2304, 256000),
    (2048, 4096, 262144),
)  # fmt: skip
TOY_SHAPES = ((64, 32, 1000), (24, 16, 3001))
CHUNKS = (3072, 4096, 8192, 16384)
SLOWEST_MS = {"cpu": 30e3, "cuda": 3e3}  # of one step, for a contender that is worth repeating

Loss = Callable[[Tensor, Any, Tensor], Tensor]


def megamem(hidden: Tensor, weight: Any, labels: Tensor, **kwargs: Any) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, LossOptions(vocab_size=len(weight)), **kwargs).loss.mean()


def torch_eager(hidden: Tensor, weight: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def megatron(hidden: Tensor, weight: Any, labels: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = F.linear(hidden, weight).unsqueeze(1)
    loss: Tensor = vocab_parallel_cross_entropy(logits, labels.unsqueeze(1)).mean()
    return loss


def megatron_fused(hidden: Tensor, weight: Any, labels: Tensor) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    logits = F.linear(hidden, weight).unsqueeze(1)
    loss: Tensor = fused_vocab_parallel_cross_entropy(logits, labels.unsqueeze(1), dist.group.WORLD).mean()
    return loss


def contenders(device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Those that run here, and why others do not."""
    found: dict[str, Loss] = {
        "megamem": megamem,
        "megamem, main_grad": lambda *operands: megamem(*operands, into_main_grad=True),
        "torch eager": torch_eager,
        "Megatron": megatron,
    }
    absent: dict[str, str] = {}
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        found["torch chunked"] = lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, options=options()
        )
    else:
        absent["torch chunked"] = f"torch {torch.__version__} has no F.linear_cross_entropy"
    if device != "cuda":
        absent |= dict.fromkeys(("Megatron fused", "Liger", "Liger, fp32", "CCE", "CCE, exact"), "needs a GPU")
        return found, absent
    found["Megatron fused"] = megatron_fused
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        for name, dtype in (("Liger", None), ("Liger, fp32", torch.float32)):
            liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=dtype)
            found[name] = lambda hidden, weight, labels, loss=liger: loss(weight, hidden, labels)  # type: ignore[misc]
    else:
        absent |= dict.fromkeys(("Liger", "Liger, fp32"), "pip install liger-kernel")
    if find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["CCE"] = lambda hidden, weight, labels: cut(hidden, weight, labels)
        found["CCE, exact"] = lambda hidden, weight, labels: cut(hidden, weight, labels, filter_eps=None)
    else:
        absent |= dict.fromkeys(("CCE", "CCE, exact"), "pip install cut-cross-entropy")
    return found, absent


class Bench:
    """The operands of one shape, and how a step of a contender is timed and its memory counted."""

    def __init__(self, shape: tuple[int, int, int], device: str) -> None:
        self.tokens, self.size, self.vocabulary = shape
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        self.hidden = torch.randn(self.tokens, self.size, device=device, dtype=self.dtype, requires_grad=True)
        scale = self.size**-0.5
        self.weight: Any = torch.nn.Parameter(
            torch.randn(self.vocabulary, self.size, device=device, dtype=self.dtype) * scale
        )
        self.weight.main_grad = torch.zeros(self.vocabulary, self.size, device=device)
        self.weight.grad_added_to_main_grad = False
        self.labels = torch.randint(self.vocabulary, (self.tokens,), device=device)
        self.flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device == "cuda" else None

    @property
    def gflop(self) -> float:
        """Of the four GEMMs."""
        return 8 * self.tokens * self.size * self.vocabulary / 1e9

    def timed(self, loss: Loss) -> common.Json:
        """Milliseconds of one forward and one backward pass."""
        self.clear()
        if self.device == "cuda":
            assert self.flush is not None
            self.flush.zero_()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
            marks[0].record()  # type: ignore[no-untyped-call]
            value = loss(self.hidden, self.weight, self.labels)
            marks[1].record()  # type: ignore[no-untyped-call]
            value.backward()  # type: ignore[no-untyped-call]
            marks[2].record()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            return {"forward_ms": marks[0].elapsed_time(marks[1]), "backward_ms": marks[1].elapsed_time(marks[2])}
        forward, backward = common.Clock(), common.Clock()
        with forward.running():
            value = loss(self.hidden, self.weight, self.labels)
        with backward.running():
            value.backward()  # type: ignore[no-untyped-call]
        return {
            "forward_ms": forward.wall * 1e3,
            "backward_ms": backward.wall * 1e3,
            "cpu_ms": (forward.cpu + backward.cpu) * 1e3,
        }

    def peak_bytes(self, loss: Loss) -> int:
        """The most memory that a step adds."""
        self.clear()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss(self.hidden, self.weight, self.labels).backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with LiveStorages() as live:
            live.ignore([self.hidden, self.weight, self.weight.main_grad])
            loss(self.hidden, self.weight, self.labels).backward()  # type: ignore[no-untyped-call]
            return live.peak_bytes

    def gradients(self, loss: Loss, *, from_main_grad: bool) -> list[Tensor]:
        """Loss, input gradient and weight gradient, in fp32."""
        self.clear()
        value = loss(self.hidden, self.weight, self.labels)
        value.backward()  # type: ignore[no-untyped-call]
        assert self.hidden.grad is not None
        weight_gradient = self.weight.main_grad if from_main_grad else self.weight.grad
        return [value.detach().float(), self.hidden.grad.float(), weight_gradient.float()]

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None
        self.weight.main_grad.zero_()
        gc.collect()

    def gemm(self, repetitions: int) -> common.Json:
        """The rate of one product of this shape, in chunks as wide as ours."""
        width = min(chunk_columns(self.tokens, self.vocabulary, self.dtype.itemsize), self.vocabulary)
        out = torch.empty(self.tokens, width, device=self.device, dtype=self.dtype)
        part = self.weight.detach()[:width].T
        clock = time.perf_counter if self.device == "cuda" else time.process_time
        took = []
        for _ in range(repetitions + 1):
            begin = clock()
            for _ in range(8):
                torch.mm(self.hidden.detach(), part, out=out)
            if self.device == "cuda":
                torch.cuda.synchronize()
            took.append((clock() - begin) / 8)
        summary = common.summary(took[1:])
        return {"seconds": summary, "gflops": 2 * self.tokens * self.size * width / summary["median"] / 1e9}


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> common.Json:
    """All contenders on one shape."""
    bench = Bench(shape, args.device)
    losses, absent = contenders(args.device)
    expected = bench.gradients(torch_eager, from_main_grad=False)
    status, errors, peaks = dict(absent), {}, {}
    for name, loss in list(losses.items()):
        try:  # warm up, compare, count
            found = bench.gradients(loss, from_main_grad="main_grad" in name)
            errors[name] = [
                ((ours - theirs).abs().max() / theirs.abs().max()).item()
                for ours, theirs in zip(found, expected, strict=True)
            ]
            del found
            peaks[name] = bench.peak_bytes(loss)
            took = sum(value for part, value in bench.timed(loss).items() if part != "cpu_ms")
            if took > SLOWEST_MS[args.device]:
                status[name] = f"{took / 1e3:.1f} s a step: not repeated"
                del losses[name]
        except (RuntimeError, NotImplementedError, ImportError) as error:
            status[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            del losses[name]
    del expected
    rounds = 2 if args.quick else args.rounds
    for _ in range(0 if args.device == "cpu" else 10):
        for loss in losses.values():
            bench.timed(loss)
    series = common.interleaved({name: lambda loss=loss: bench.timed(loss) for name, loss in losses.items()}, rounds)  # type: ignore[misc]
    gemm = bench.gemm(rounds)
    results: common.Json = {name: {"status": reason} for name, reason in status.items()}
    for name, steps in series.items():
        totals = [step["forward_ms"] + step["backward_ms"] for step in steps]
        working = common.summary([step["cpu_ms"] for step in steps] if args.device == "cpu" else totals)
        rate = bench.gflop / max(working["median"], 1e-9) * 1e3
        results[name] = {
            "status": "ok",
            "forward_ms": common.summary(step["forward_ms"] for step in steps),
            "backward_ms": common.summary(step["backward_ms"] for step in steps),
            "step_ms": common.summary(totals),
            "cpu_ms": working if args.device == "cpu" else None,
            "gflops": rate,
            "gemm_share": rate / gemm["gflops"],
            "peak_bytes": peaks[name],
            "relative_errors_to_torch_eager": dict(zip(("loss", "hidden", "weight"), errors[name], strict=True)),
        }
    itemsize = bench.dtype.itemsize
    return {
        "tokens": shape[0], "hidden": shape[1], "vocabulary": shape[2], "dtype": str(bench.dtype), "gemm": gemm,
        "gradient_bytes": (shape[0] + shape[2]) * shape[1] * itemsize,
        "logits_fp32_bytes": shape[0] * shape[2] * 4,
        "contenders": results, "widths": widths(bench, args) if args.device == "cuda" else {},
    }  # fmt: skip


def widths(bench: Bench, args: argparse.Namespace) -> common.Json:
    """Step time by width of chunk, to choose `chunk_columns` by."""
    losses: dict[str, Loss] = {
        str(width): lambda *operands, width=width: megamem(*operands, into_main_grad=True, chunk=width)  # type: ignore[misc]
        for width in CHUNKS
        if width < bench.vocabulary
    }
    series = common.interleaved(
        {name: lambda loss=loss: bench.timed(loss) for name, loss in losses.items()},  # type: ignore[misc]
        2 if args.quick else args.rounds,
    )
    return {
        name: common.summary(step["forward_ms"] + step["backward_ms"] for step in steps)
        for name, steps in series.items()
    }


def targets(cells: list[common.Json], device: str, quick: bool) -> list[common.Json]:
    """What issue 4 asks for, where a cell can tell."""
    found = []
    for cell in cells:
        ran = {name: result for name, result in cell["contenders"].items() if result["status"] == "ok"}
        where = f"{cell['tokens']} x {cell['hidden']} x {cell['vocabulary']}"
        excess = ran["megamem"]["peak_bytes"] - cell["gradient_bytes"]
        stock = ran["Megatron"]["peak_bytes"] - cell["gradient_bytes"]
        found.append(
            {
                "what": f"{where}: {common.mib(excess)} MiB beside the gradients, Megatron {common.mib(stock)} MiB",
                "met": excess < stock,
            }
        )
        if device == "cuda" and not quick:
            share = ran["megamem, main_grad"]["gemm_share"]
            found.append({"what": f"{where}: {share:.1%} of the GEMM rate, 85 % asked", "met": share >= 0.85})
            for other in ("Liger", "CCE"):
                if other in ran:
                    ratio = ran["megamem"]["step_ms"]["median"] / ran[other]["step_ms"]["median"]
                    memory = ran["megamem"]["peak_bytes"] <= ran[other]["peak_bytes"]
                    what = f"{where}: {ratio:.2f} times the step time of {other}, {'not ' * (not memory)}less memory"
                    found.append({"what": what, "met": ratio <= 1.0 and memory})
    return found


def show(cell: common.Json) -> None:
    rows = []
    for name, result in cell["contenders"].items():
        if result["status"] != "ok":
            rows.append((name, result["status"], *[""] * 6))
            continue
        rows.append(
            (
                name, *(f"{result[part]['median']:.1f}" for part in ("forward_ms", "backward_ms", "step_ms")),
                f"{result['cpu_ms']['median']:.1f}" if result["cpu_ms"] else "-",
                f"{result['gemm_share']:.1%}", common.mib(result["peak_bytes"]),
                f"{max(result['relative_errors_to_torch_eager'].values()):.0e}",
            )
        )  # fmt: skip
    title = f"{cell['tokens']} tokens, hidden {cell['hidden']}, vocabulary {cell['vocabulary']}, {cell['dtype']}"
    header = ("", "forward ms", "backward ms", "step ms", "CPU ms", "of GEMM rate", "peak MiB", "error")
    common.print_table(title, header, rows)


def main() -> None:
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="timed steps of each contender (default: 5 on a CPU, 30 on a GPU)")
    args = parser.parse_args()
    args.rounds = args.rounds or (30 if args.device == "cuda" else 5)
    from megatron.core import parallel_state

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    shapes = TOY_SHAPES if args.quick else GPU_SHAPES if args.device == "cuda" else CPU_SHAPES
    cells = []
    for shape in shapes:
        cells.append(measure(shape, args))
        show(cells[-1])
        if args.device == "cuda":
            torch.cuda.empty_cache()
    judged = targets(cells, args.device, args.quick)
    for target in judged:
        print(f"  {'met' if target['met'] else 'MISSED'}: {target['what']}")
    common.write(
        args.out, "linear_cross_entropy", args, {"cells": cells, "targets": judged}, with_gpu=args.device == "cuda"
    )


if __name__ == "__main__":
    main()
