"""Step time and memory of stacks of real Megatron layers, trained in every way there is, on one GPU, in one run.

Shapes: `llama-3-8b`, one of its layers whole (TP 1), 16K to 128K tokens; `memo-7b-tp8`, what one of 8 tensor-parallel
ranks with sequence parallelism holds of MEMO's 7B, 256K to 1M tokens, without the other seven (`shard.py` says what
that leaves out: the time of NVLink, and other GPUs on the same PCIe switch). No embedding, loss or optimizer.

First what the machine does by itself (GEMMs, attention, link, pinning), then per cell gradient parity, then time.
Contenders (`contenders.py`) use one attention kernel and take turns; running out of memory is a result.

MFU = 3 * layers * (s * (2h(q + 2kv) + 2qh + 2gfh) + 2 s^2 q) / (seconds * 989e12): causal attention counts half,
recomputation does not count, g is 3 for SwiGLU and 2 without gate.

Stall is the time that the compute stream stood still in the engine's waits, from a separate run with timing events.
With --device cpu --quick every contender's code runs at toy sizes; times then mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import rates
import torch
from cells import KERNELS, Deadline, parity, run_cell, saved_sizes
from contenders import CONTENDERS, MEANING, Bench, Contender
from rig import LayerStack, Shape, release, single_rank
from torch.nn.attention import SDPBackend, sdpa_kernel

LLAMA = Shape(kind="llama", hidden=4096, heads=32, kv_groups=8, head_dim=128, ffn=14336)
MEMO_TP8 = Shape(kind="memo", hidden=4096, heads=4, kv_groups=4, head_dim=128, ffn=2048, shards=8)
SHAPES = {"llama-3-8b": LLAMA, "memo-7b-tp8": MEMO_TP8}
TOYS = {
    "llama-3-8b": Shape(kind="llama", hidden=64, heads=4, kv_groups=2, head_dim=16, ffn=224),
    "memo-7b-tp8": Shape(kind="memo", hidden=64, heads=2, kv_groups=2, head_dim=16, ffn=64, shards=4),
}
K = 1024
# What decides most first. Below 16K swap has little to hide behind; above 128K one GPU has no room at TP 1.
CELLS = (
    ("llama-3-8b", 64 * K), ("llama-3-8b", 128 * K), ("llama-3-8b", 32 * K), ("memo-7b-tp8", 256 * K),
    ("llama-3-8b", 16 * K), ("memo-7b-tp8", 512 * K), ("memo-7b-tp8", 1024 * K),
)  # fmt: skip
TOY_CELLS = (("llama-3-8b", 128), ("memo-7b-tp8", 256))
GIB = 1 << 30


class Memory:
    """Pinned host memory, reserved once and shared by all engines of the run, which follow one another."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.plain: Any = None
        self.profiled: Any = None
        self.nbytes = args.host_memory
        if args.device != "cuda":
            self.block = torch.zeros(1 << 20, dtype=torch.uint8)
            self.rate: common.Json = {"skipped": "no GPU"}
            return
        from megamem.runtime.activations.streams_cuda import CudaDevice

        self.plain, self.profiled = CudaDevice(), CudaDevice(profile=True)
        self.block, self.rate = rates.pin(self.plain, self.nbytes)
        self.nbytes = self.block.numel()
        self.profiled.blocks.extend(self.plain.blocks)
        for device in (self.plain, self.profiled):
            device.host_buffer = lambda nbytes: self.block[:nbytes]


def choose_kernel(args: argparse.Namespace) -> str:
    """The attention kernel for everyone: the first that takes the shapes, forward and backward."""
    if args.device != "cuda":
        return "flash"
    for name in ("cudnn", "flash") if args.attention == "auto" else (args.attention,):
        try:
            with sdpa_kernel([KERNELS[name]]):
                for shape in SHAPES.values():
                    rates.attention(shape, 2048, torch.bfloat16, "cuda", 1)
            return name
        except RuntimeError as error:
            print(f"  attention kernel {name} does not take the shapes: {str(error).splitlines()[0]}")
    raise SystemExit("no attention kernel takes the shapes")


def can_fuse(args: argparse.Namespace) -> bool:
    """Whether Megatron's compiled activation functions work here."""
    if args.device != "cuda" or args.no_fusion or find_spec("triton") is None:
        return False
    try:
        stack = LayerStack(LLAMA, 1, torch.bfloat16, fused=True, on_gpu=True)
        stack.call(0, stack.leaf(256), 256).sum().backward()
        return True
    except Exception as error:  # a compiler that is missing shows in many ways
        print(f"  no fused activation functions: {type(error).__name__}: {str(error)[:200]}")
        return False


def measure_machine(args: argparse.Namespace, memory: Memory, cells: list[tuple[str, int]]) -> common.Json:
    """GEMM, attention and link rates."""
    dtype, shapes = torch.bfloat16, TOYS if args.quick else SHAPES
    repetitions = 2 if args.quick else 10
    longest = 64 if args.quick else 64 * K
    found: common.Json = {"pin": memory.rate, "gemm": {}, "attention": []}
    found["link"] = rates.link(memory.block, args.device, GIB, repetitions)
    for name in dict.fromkeys(name for name, _ in cells):
        found["gemm"][name] = rates.gemms(shapes[name], min(16 * K, longest), dtype, args.device, repetitions)
        for tokens in sorted({min(tokens, longest) for cell, tokens in cells if cell == name}):
            found["attention"].append(
                {"shape": name, **rates.attention(shapes[name], tokens, dtype, args.device, max(repetitions // 2, 1))}
            )
        release(args.device)
    rows = [(f"link {way}", f"{found['link'][way]['gb_per_s']:.1f} GB/s") for way in ("to_host", "to_device", "duplex")]
    rows += [
        (f"GEMM {name} {kind}", f"{rate['tflops']:.0f} TFLOP/s")
        for name, gemm in found["gemm"].items()
        for kind, rate in gemm.items()
        if kind != "tokens"
    ]
    rows += [
        (f"attention {way} {one['shape']} {one['tokens']}", f"{one[way]['tflops']:.0f} TFLOP/s")
        for one in found["attention"]
        for way in ("forward", "backward")
    ]
    common.print_table("machine", ("", "rate"), rows)
    return found


def num_layers(shape: Shape, tokens: int, args: argparse.Namespace) -> int:
    """As many as keep everything resident beside the transients of one layer (30 units), 8 at most, 3 at least."""
    if args.layers:
        return int(args.layers)
    if args.device != "cuda" or args.quick:
        return 3
    unit = tokens * shape.hidden * 2 / shape.shards
    room = 0.9 * torch.cuda.mem_get_info()[1] - 8 * GIB - 30 * unit
    most = 8 if tokens < 128 * K else 4 if tokens < 512 * K else 3
    return max(3, min(most, int(room / (18 * unit))))


def open_cell(name: str, tokens: int, args: argparse.Namespace, memory: Memory, link: float, fused: bool) -> Bench:
    """The stack and what is known of it before anything is timed."""
    shape = (TOYS if args.quick else SHAPES)[name]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    stack = LayerStack(shape, num_layers(shape, tokens, args), dtype, fused=fused, on_gpu=args.device == "cuda")
    stack.kwargs(tokens)
    saved, pinned = saved_sizes(stack, tokens)
    return Bench(
        stack=stack, tokens=tokens, device=args.device, host_nbytes=memory.nbytes, memory=memory.plain, link=link,
        unit_nbytes=tokens * shape.hidden * dtype.itemsize // shape.shards, saved_nbytes=saved, pinned_nbytes=pinned,
    )  # fmt: skip


def print_cell(title: str, results: common.Json) -> None:
    """One row per contender."""
    rows = []
    full = results.get("full recompute", {}).get("step_ms", {}).get("median")
    for name, result in results.items():
        if "step_ms" not in result:
            rows.append((name, result["status"].partition(":")[0], *[""] * 8))
            continue
        step = result["step_ms"]
        stall = result["stall_share"]
        rows.append(
            (
                name, f"{step['median']:.1f}", f"{step['min']:.1f}..{step['max']:.1f}",
                f"{result['forward_ms']['median']:.1f}", f"{result['backward_ms']['median']:.1f}",
                f"{1 - step['median'] / full:+.1%}" if full else "-",
                f"{result['mfu']:.1%}", f"{result['peak_allocated_bytes'] / 1e9:.1f}",
                f"{result['moved_gb_per_s']:.1f}", "-" if stall is None else f"{stall:.2%}",
            )
        )  # fmt: skip
    header = ("", "step ms", "spread", "forward", "backward", "saved", "MFU", "peak GB", "GB/s", "stall")
    common.print_table(title, header, rows)
    for name, result in results.items():
        if result["status"] != "ok":
            print(f"  {name}: {result['status']}")


def targets(cells: list[common.Json], is_timed: bool) -> list[common.Json]:
    """The speed that issue 2 asks for, where a cell can tell; `is_timed` False: times mean nothing."""
    found = []
    for cell in cells:
        timed = {name: result for name, result in cell["contenders"].items() if "step_ms" in result and is_timed}
        step = {name: result["step_ms"]["median"] for name, result in timed.items()}
        where = f"{cell['shape']} at {cell['tokens']}"
        best = min((step[name] for name in ("ordered", "memo 0", "recompute") if name in step), default=None)
        if best is not None and "full recompute" in step and cell["tokens"] >= 128 * K:
            gain = 1 - best / step["full recompute"]
            found.append(
                {"what": f"{where}: {gain:.1%} less step time than full recompute, 19 % asked", "met": gain >= 0.19}
            )
        if "keep" in step and "resident" in step:
            excess = step["keep"] / step["resident"] - 1
            found.append(
                {"what": f"{where}: keeping everything costs {excess:+.2%}, 2 % allowed", "met": excess < 0.02}
            )
        stall = timed.get("ordered", {}).get("stall_share")
        if stall is not None:
            found.append({"what": f"{where}: ordered stalls {stall:.2%} of the step, 2 % allowed", "met": stall < 0.02})
        for name, result in cell["parity"].items():
            if isinstance(result, dict) and result.get("must_be_bitwise"):
                found.append(
                    {"what": f"{where}: {name} has resident's gradients bit for bit", "met": result["bitwise"]}
                )
    return found


def run(args: argparse.Namespace) -> common.Json:
    """Everything, the most important cells first, until the time is up."""
    deadline = Deadline(args.minutes)
    chosen = [one for one in CONTENDERS if not args.contenders or one.name in args.contenders]
    cells = args.cells or list(TOY_CELLS if args.quick else CELLS)
    results: common.Json = {"cells": [], "not_run": [], "contenders": MEANING}
    memory = Memory(args)
    kernel, fused = choose_kernel(args), can_fuse(args)
    release(args.device)
    results |= {"attention_kernel": kernel, "fused_activation": fused}
    with sdpa_kernel([KERNELS[kernel]]) if args.device == "cuda" else sdpa_kernel(list(_CPU_KERNELS)):
        results["machine"] = measure_machine(args, memory, cells)
        link = results["machine"]["link"]["to_host"]["gb_per_s"] * 1e9
        for name, tokens in cells:
            if deadline.left < 20:
                results["not_run"].append({"shape": name, "tokens": tokens, "why": "time"})
                continue
            results["cells"].append(_cell(name, tokens, args, memory, link, fused, deadline, chosen))
            common.write(args.out, "gpu_layer", args, results, with_gpu=args.device == "cuda")
    results["targets"] = targets(results["cells"], not args.quick)
    results["max_rss_bytes"] = common.max_rss_bytes()
    return results


_CPU_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


def _cell(
    name: str, tokens: int, args: argparse.Namespace, memory: Memory, link: float, fused: bool, deadline: Deadline,
    chosen: list[Contender],
) -> common.Json:  # fmt: skip
    print(f"\n  {name}, {tokens} tokens", flush=True)
    bench = open_cell(name, tokens, args, memory, link, fused)
    cell: common.Json = {
        "shape": name, "tokens": tokens, "layers": len(bench.stack.layers), "sizes": vars(bench.stack.shape),
        "saved_bytes_per_layer": bench.saved_nbytes, "base_bytes_per_layer": bench.base_nbytes,
        "stand_in": bench.stack.shape.shards > 1,
    }  # fmt: skip
    cell["parity"] = parity(bench, chosen)
    cell["contenders"] = run_cell(bench, chosen, args, deadline, memory.profiled)
    cell["layer_forward_seconds"] = bench.layer_seconds
    print_cell(f"{name}, {tokens} tokens, {len(bench.stack.layers)} layers", cell["contenders"])
    del bench
    release(args.device)
    return cell


def _cells(text: str) -> list[tuple[str, int]]:
    """`llama-3-8b:65536,memo-7b-tp8:262144`"""
    found = []
    for part in text.split(","):
        name, _, tokens = part.partition(":")
        if name not in SHAPES or not tokens.isdigit():
            raise argparse.ArgumentTypeError(f"{part!r} is not SHAPE:TOKENS with SHAPE one of {', '.join(SHAPES)}")
        found.append((name, int(tokens)))
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = common.argument_parser(__doc__ or "")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each contender (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="layers of the stack (default: as many as fit)")
    parser.add_argument("--cells", type=_cells, default=None, metavar="SHAPE:TOKENS,...", help="instead of all")
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=None, help=", ".join(names))
    parser.add_argument("--attention", choices=("auto", *KERNELS), default="auto", help="kernel for everyone")
    parser.add_argument("--no-fusion", action="store_true", help="no compiled activation functions")
    parser.add_argument("--host-memory", type=float, default=0.0, metavar="GIB", help="pinned (default: half)")
    parser.add_argument("--device-memory", type=float, default=0.0, metavar="GIB", help="act as a smaller GPU")
    args = parser.parse_args()
    unknown = set(args.contenders or ()) - set(names)
    if unknown:
        parser.error(f"unknown contenders: {', '.join(sorted(unknown))}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.quick:
        parser.error("no GPU: only --quick runs on a CPU")
    from megamem.host import host_memory

    half = host_memory().available_nbytes // 2
    args.host_memory = int(args.host_memory * GIB) or (256 << 20 if args.quick else half)
    return args


def main() -> int:
    """Run and write; exit status 1 if a contender failed for another reason than memory or time."""
    args = parse()
    if args.device == "cpu":
        torch.set_num_threads(1)  # nothing is measured, and threads on a busy machine wait for each other
    with contextlib.ExitStack() as stack:
        stack.enter_context(single_rank(args.device))
        if args.device == "cuda" and args.device_memory:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(args.device_memory * GIB / total, 1.0))
        results = run(args)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])
    common.write(Path(args.out), "gpu_layer", args, results, with_gpu=args.device == "cuda")
    failed = [
        f"{cell['shape']} {cell['tokens']} {name}: {result['status']}"
        for cell in results["cells"]
        for name, result in cell["contenders"].items()
        if result["status"].startswith("failed")
    ]
    print("\n".join(f"  {line}" for line in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
