"""How little memory training survives in, on one GPU: PyTorch's allocator in its best settings against the arena.

A stack of real Megatron layers with AdamW is trained, each contender in processes of its own, because PyTorch reads the
settings of its allocator once:

* `native`, `expandable`: PyTorch's defaults, and `expandable_segments:True`
* `split 64` to `split 512`: the default with `max_split_size_mb`; the best of them is the one to compare with
* `arena`: `allocator.mode: static`, its plan made in a run with ample memory and read from a file after that

Per cell: peak live bytes (of the native run); the smallest capacity in which 20 steps survive, over that peak; what
the device was asked for after the warm-up (cudaMalloc, retries); step time with ample memory and at 1.02 times the
peak; the longest sequence that survives in the peak that the cell's own length needs. Cells: `dense`, `recompute`
(each layer checkpointed) and, because they can go against a plan, lengths that vary: `varying`, where the trainer says
the length before the step, and `untold`, where it does not.

A capacity is `torch.cuda.set_per_process_memory_fraction`, which the arena is subject to as everything else is.
With --device cpu --quick the code runs at toy sizes, without capacities; figures then mean nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from rig import LayerStack, Shape, single_rank
from torch.utils.checkpoint import checkpoint

SHAPE = Shape(kind="llama", hidden=4096, heads=32, kv_groups=8, head_dim=128, ffn=14336)
TOY = Shape(kind="llama", hidden=64, heads=4, kv_groups=2, head_dim=16, ffn=224)
SPLITS = (64, 128, 256, 512)
CONTENDERS = {
    "native": "",
    "expandable": "expandable_segments:True",
    **{f"split {mb}": f"max_split_size_mb:{mb}" for mb in SPLITS},
    "arena": "",
}
CELLS: dict[str, dict[str, Any]] = {
    "dense": {"layers": 4, "tokens": 16384},
    "recompute": {"layers": 8, "tokens": 65536, "recompute": True},
    "varying": {"layers": 4, "tokens": 16384, "varies": True},
    "untold": {"layers": 4, "tokens": 16384, "varies": True, "untold": True},
}
STEPS, WARM_UP, MICROBATCHES = 20, 5, 2
TOLERANCE = 0.0025  # of the peak, at which the bisection of capacities ends


# -- one training run, in a process of its own ------------------------------------------------------------------------


def lengths(cell: common.Json) -> list[int]:
    """The sequence lengths of the steps, in tokens."""
    tokens = cell["tokens"]
    return [tokens * (16 - 5 * (step % 4) * bool(cell.get("varies"))) // 16 for step in range(STEPS + WARM_UP)]


def train(cell: common.Json, contender: str, device: str, capacity: int | None, plans: Path) -> common.Json:
    """Steps of a stack of layers: what became of them, milliseconds, and what the device was asked for."""
    on_gpu = device == "cuda"
    if on_gpu and capacity is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, capacity / torch.cuda.mem_get_info()[1]))
    with single_rank(device):
        dtype = torch.bfloat16 if on_gpu else torch.float32
        stack = LayerStack(SHAPE if on_gpu else TOY, cell["layers"], dtype, on_gpu=on_gpu)
        optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-4, foreach=True)
        memory = _Arena(device, plans) if contender == "arena" else None
        found: common.Json = {"step_ms": [], "status": "ok"}
        digest = hashlib.sha256()
        for step, tokens in enumerate(lengths(cell)):
            if step == WARM_UP:
                before = _asked(on_gpu)
            if memory is not None:
                memory.begin("step" if cell.get("untold") else f"{tokens} tokens")
            milliseconds, output = _timed(lambda tokens=tokens: _step(stack, optimizer, tokens, cell), on_gpu)
            digest.update(output)
            if step >= WARM_UP:
                found["step_ms"].append(milliseconds)
        found["digest"] = digest.hexdigest()
        found["asked"] = {name: count - before[name] for name, count in _asked(on_gpu).items()}
        if on_gpu:
            found["peak_allocated"], found["peak_reserved"] = (
                torch.cuda.max_memory_allocated(),
                torch.cuda.max_memory_reserved(),
            )
        if memory is not None:
            found["arena"] = memory.finish()
    return found


def _step(stack: LayerStack, optimizer: Any, tokens: int, cell: common.Json) -> bytes:
    for _ in range(MICROBATCHES):
        hidden = stack.leaf(tokens)
        for index in range(len(stack.layers)):
            call: Callable[[Any], Any] = lambda x, index=index: stack.call(index, x, tokens)  # noqa: E731
            hidden = checkpoint(call, hidden, use_reentrant=False) if cell.get("recompute") else call(hidden)
        torch.autograd.backward(hidden, stack.output_gradient(tokens))
    output = hidden.detach().flatten()[:64].double().cpu().numpy().tobytes()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return bytes(output)


def _timed(step: Callable[[], bytes], on_gpu: bool) -> tuple[float, bytes]:
    if not on_gpu:
        clock = common.Clock()
        with clock.running():
            output = step()
        return 1e3 * clock.wall, output
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    output = step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), output


def _asked(on_gpu: bool) -> dict[str, int]:
    names = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_ooms")
    stats = torch.cuda.memory_stats() if on_gpu else {}
    return {name: int(stats.get(name, 0)) for name in names}


class _Arena:
    """The static allocator around the steps, with its plan in a file from one run to the next."""

    def __init__(self, device: str, plans: Path) -> None:
        from megamem.ir.arena import read_plan
        from megamem.runtime.arena import StaticAllocator
        from megamem.runtime.arena_front_ends import front_end_for

        front_end = front_end_for(torch.device(device))
        front_end.install()
        self._folder = plans
        known = {plan.key: plan for plan in map(read_plan, plans.glob("*.json.gz"))}
        self._allocator = StaticAllocator(
            front_end=front_end, make_plan=self._plan, profile_steps=2, min_size=front_end.min_size, plans=known
        )

    def _plan(self, key: str, steps: Sequence[Any]) -> Any:
        from megamem.ir.arena import write_plan
        from megamem.planner.allocation.periodic import plan_steps
        from megamem.planner.allocation.solvers import make_solver

        min_size = self._allocator.min_size
        plan = plan_steps(key, steps, min_size=min_size, solver=make_solver("auto"), time_limit=60.0)
        write_plan(self._folder / f"{key}.json.gz", plan)
        return plan

    def begin(self, key: str) -> None:
        self._allocator.begin_step(key)

    def finish(self) -> common.Json:
        report = self._allocator.report()
        self._allocator.close()
        return {
            "planned_peak": report.planned_peak,
            "served_share": report.served_share,
            "served_bytes_share": report.served_bytes_share,
            "fallbacks": report.num_fallbacks,
            "plans": {kind.key: kind.num_plans for kind in report.kinds},
        }


def run(cell: common.Json, contender: str, device: str, capacity: int | None, plans: Path) -> common.Json:
    """`train` in a process of its own. Running out of memory is a result."""
    settings = CONTENDERS[contender]
    variables = {"PYTORCH_ALLOC_CONF": settings, "PYTORCH_CUDA_ALLOC_CONF": settings} if settings else {}
    request = json.dumps([cell, contender, device, capacity, str(plans)])
    command = [sys.executable, "-W", "ignore", __file__, "--worker", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    if done.returncode == 0:
        found: common.Json = json.loads(done.stdout.splitlines()[-1])
        return found
    if "out of memory" in done.stderr.lower():
        return {"status": "out of memory"}
    return {"status": f"failed: {done.stderr.strip()[-400:]}"}


# -- what is looked for -----------------------------------------------------------------------------------------------


def smallest_capacity(cell: common.Json, contender: str, ample: common.Json, plans: Path) -> common.Json:
    """Bytes, by bisection between what cannot and what did survive."""
    low, high = int(0.97 * ample["live"]), int(1.1 * ample["peak_reserved"]) + (64 << 20)
    tries = 0
    while high - low > TOLERANCE * ample["live"]:
        middle = (low + high) // 2
        tries += 1
        if run(cell, contender, "cuda", middle, plans)["status"] == "ok":
            high = middle
        else:
            low = middle
    return {"bytes": high, "over_live": high / ample["live"], "runs": tries}


def longest_sequence(cell: common.Json, contender: str, capacity: int, folder: Path) -> int:
    """Tokens, to 1024; a plan per length, made with ample memory."""
    low, high = cell["tokens"] // 2, 2 * cell["tokens"]
    while high - low > 1024:
        middle = (low + high) // 2 // 1024 * 1024
        longer, plans = {**cell, "tokens": middle}, folder / f"{contender} {middle}"
        plans.mkdir(exist_ok=True)
        if contender == "arena":
            run(longer, contender, "cuda", None, plans)
        low, high = (
            (middle, high) if run(longer, contender, "cuda", capacity, plans)["status"] == "ok" else (low, middle)
        )
    return low


def measure(cell: common.Json, args: argparse.Namespace, folder: Path) -> common.Json:
    """All contenders in one cell."""
    folder.mkdir()
    result: common.Json = {"cell": cell, "contenders": {}}
    for contender in args.contenders:
        plans = folder / contender
        plans.mkdir()
        found = result["contenders"][contender] = run(cell, contender, args.device, None, plans)
        live = result["contenders"]["native"].get("peak_allocated")
        if found["status"] != "ok" or args.device != "cuda" or live is None:
            continue
        found["step_ms"] = common.summary(found["step_ms"])
        ample = {**found, "live": live}
        found["smallest_capacity"] = smallest_capacity(cell, contender, ample, plans)
        tight = run(cell, contender, "cuda", int(1.02 * live), plans)
        if tight["status"] == "ok":
            tight["step_ms"] = common.summary(tight["step_ms"])
        found["at_1.02"] = tight
        found["longest_sequence"] = longest_sequence(cell, contender, int(1.001 * live), folder)
        print(f"{cell}: {contender}: {found['smallest_capacity']['over_live']:.4f} of the peak live bytes", flush=True)
    return result


def _targets(cells: common.Json) -> list[common.Json]:
    targets = []
    for name, result in cells.items():
        found = {who: one for who, one in result["contenders"].items() if "smallest_capacity" in one}
        if "arena" not in found:
            continue
        arena, native = found["arena"], found["native"]
        ratio = arena["smallest_capacity"]["over_live"]
        slower = arena["step_ms"]["median"] / native["step_ms"]["median"]
        targets += [
            {"what": f"{name}: the arena survives in {ratio:.4f} of the peak, 1.01 allowed", "met": ratio <= 1.01},
            {
                "what": f"{name}: {arena['asked']['num_device_alloc']} cudaMalloc after the switch, 0 allowed",
                "met": arena["asked"]["num_device_alloc"] == 0,
            },
            {"what": f"{name}: step time {slower:.4f} of native, 1.0 allowed", "met": slower <= 1.0},
            {"what": f"{name}: the same outputs", "met": arena["digest"] == native["digest"]},
        ]
    return targets


def main() -> None:
    """Run and write; or be a worker."""
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        cell, contender, device, capacity, plans = json.loads(sys.argv[2])
        print(json.dumps(train(cell, contender, device, capacity, Path(plans))))
        return
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--cells", type=lambda text: text.split(","), default=list(CELLS), help=", ".join(CELLS))
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(CONTENDERS))
    args = parser.parse_args()
    if unknown := {*args.cells} - {*CELLS} | {*args.contenders} - {*CONTENDERS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if "native" not in args.contenders:
        parser.error("--contenders must have native, whose peak the others are held against")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.quick:
        parser.error("there is no GPU to measure on; --device cpu goes with --quick")
    toy = {"layers": 2, "tokens": 64}
    with tempfile.TemporaryDirectory() as folder:
        cells = {
            name: measure({**CELLS[name], **(toy if args.quick else {})}, args, Path(folder) / name)
            for name in args.cells
        }
    results: common.Json = {"cells": cells, "steps": STEPS, "warm_up": WARM_UP, "targets": _targets(cells)}
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])
    common.write(args.out, "gpu_allocator", args, results, with_gpu=args.device == "cuda")


if __name__ == "__main__":
    main()
