"""What the engine itself costs on the processor, apart from copying and recomputing. Runs on a CPU.

1. `steps`: a stack of layers (h=512, s=2048, local spec with flash attention), stock Megatron against `memo` at
   fraction 1, in turns. The ratio of step times contains the copies, which on a CPU are the processor's own work and
   on a GPU are the copy engines'; they are timed apart, and the ratio is also given without them.
2. `layers`: layers so small (s=8, h=32) that Python is all there is, on a device whose copies do nothing. Engine minus
   stock, divided by layers, is bookkeeping; forward and backward apart; in processor time, the
   least of a turn's steps. `empty hooks` is what PyTorch itself charges for any swapping: the same layers
   under saved-tensor hooks that do nothing.

The CPU rig is off while anything is timed: it charges every torch call several microseconds that no GPU run pays.

Targets: bookkeeping below 5 % of step time (1, without copies), and below 100 us a layer (2).
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import common
import torch
from rig import LayerStack, Shape, single_rank
from torch import Tensor

import megamem
from megamem.runtime.activations.streams import AbstractDevice, AbstractEvent, AbstractStream, HostDevice
from megamem.testing.cpu import CpuRig

MEMO_1 = {"policy": "memo", "swap_fraction": 1.0, "keep_last_layers": 0}
POLICIES = {
    "memo 1": MEMO_1,
    "keep": {**MEMO_1, "table": [{"layers": "1-", "layer_input": "keep", "attention_output": "keep", "saved": "keep"}]},
}


class WatchedStream(AbstractStream):
    """A queue whose copies are timed, or left out."""

    def __init__(self, real: AbstractStream, copies: bool) -> None:
        self.real, self.copies, self.seconds = real, copies, 0.0

    def record(self) -> AbstractEvent:
        return self.real.record()

    def wait(self, event: AbstractEvent) -> None:
        self.real.wait(event)

    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        if not self.copies:
            return
        begin = time.perf_counter()
        self.real.copy_all(pairs)
        self.seconds += time.perf_counter() - begin


class WatchedDevice(AbstractDevice):
    """The processor as device, with `WatchedStream`s; without copies what comes back is garbage, at the same cost."""

    def __init__(self, *, copies: bool) -> None:
        self._real = HostDevice()
        self._streams = [
            WatchedStream(real, copies) for real in (self._real.compute, self._real.to_host, self._real.to_device)
        ]

    @property
    def compute(self) -> WatchedStream:
        return self._streams[0]

    @property
    def to_host(self) -> WatchedStream:
        return self._streams[1]

    @property
    def to_device(self) -> WatchedStream:
        return self._streams[2]

    def copy_seconds(self) -> float:
        """Time spent in copies so far."""
        return sum(stream.seconds for stream in self._streams)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._real.empty(shape, dtype)

    def discard(self, tensors: Sequence[Tensor]) -> None:
        self._real.discard(tensors)

    def host_buffer(self, nbytes: int) -> Tensor:
        return self._real.host_buffer(nbytes)

    def claim_host(self, block: Tensor, start: int, nbytes: int) -> None:
        self._real.claim_host(block, start, nbytes)

    def release_host(self, block: Tensor, start: int, nbytes: int, after: AbstractEvent | None) -> None:
        self._real.release_host(block, start, nbytes, after)

    def stall_ms(self) -> float:
        return 0.0

    def synchronize(self) -> None:
        self._real.synchronize()


def one_step(
    stack: LayerStack, tokens: int, end_step: Callable[[], None] | None, now: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds of one forward and one backward pass, by the clock `now`."""
    leaf, gradient = stack.leaf(tokens), stack.output_gradient(tokens)
    stack.clear_gradients()
    begin = now()
    hidden = leaf.clone()
    for index in range(len(stack.layers)):
        hidden = stack.call(index, hidden, tokens)
    middle = now()
    hidden.backward(gradient)
    if end_step is not None:
        end_step()
    return middle - begin, now() - middle


# -- 1 ----------------------------------------------------------------------------------------------------------------


def measure_steps(args: argparse.Namespace, rig: CpuRig) -> common.Json:
    """Stock and memo 1 in turns, `rounds` times; each turn warms up with one step and times `steps`."""
    hidden, tokens, layers = (64, 64, 2) if args.quick else (512, 2048, args.layers)
    heads = max(hidden // 128, 1)
    shape = Shape(kind="memo", hidden=hidden, heads=heads, kv_groups=heads, head_dim=hidden // heads, ffn=4 * hidden)
    with rig:
        stack = LayerStack(shape, layers, torch.float32)
    steps = 1 if args.quick else 2
    host = 40 * layers * tokens * hidden * 4

    def stock() -> common.Json:
        return _timed(stack, tokens, steps, None)

    def memo() -> common.Json:
        device = WatchedDevice(copies=True)
        with megamem.enable({"activations": {**MEMO_1, "host_memory": host}}, device=device) as handle:
            return _timed(stack, tokens, steps, (handle, device))

    found = common.interleaved({"stock": stock, "memo 1": memo}, 1 if args.quick else args.rounds)
    wall = {name: [turn["wall"] for turn in turns] for name, turns in found.items()}
    cpu = {name: [turn["cpu"] for turn in turns] for name, turns in found.items()}
    copying = [turn["copies"] for turn in found["memo 1"]]
    without = [all_of_it - copies for all_of_it, copies in zip(wall["memo 1"], copying, strict=True)]
    return {
        "tokens": tokens, "hidden": hidden, "layers": layers,
        "step_seconds": {name: common.summary(values) for name, values in wall.items()},
        "step_cpu_seconds": {name: common.summary(values) for name, values in cpu.items()},
        "copy_seconds": common.summary(copying),
        "ratio": common.ratios(wall["memo 1"], wall["stock"]),
        "ratio_cpu_time": common.ratios(cpu["memo 1"], cpu["stock"]),
        "ratio_without_copies": common.ratios(without, wall["stock"]),
    }  # fmt: skip


def _timed(stack: LayerStack, tokens: int, steps: int, engine: Any) -> common.Json:
    end_step = None
    one_step(stack, tokens, None)
    copied = 0.0
    if engine is not None:
        handle, device = engine
        handle.engine.end_step()
        end_step, copied = handle.engine.end_step, device.copy_seconds()
    clock = common.Clock()
    for _ in range(steps):
        with clock.running():
            one_step(stack, tokens, end_step)
    copies = (engine[1].copy_seconds() - copied) / steps if engine is not None else 0.0
    return {"wall": clock.wall / steps, "cpu": clock.cpu / steps, "copies": copies}


# -- 2 ----------------------------------------------------------------------------------------------------------------


def measure_layers(args: argparse.Namespace, rig: CpuRig) -> common.Json:
    """Microseconds that each contender adds to the forward and the backward pass of a tiny layer."""
    shape = Shape(kind="memo", hidden=32, heads=4, kv_groups=4, head_dim=8, ffn=128)
    layers, steps, rounds = (4, 3, 2) if args.quick else (16, 20, args.rounds * 2)
    with rig:
        stack = LayerStack(shape, layers, torch.float32)
    contenders: dict[str, Callable[[], common.Json]] = {
        "stock": lambda: _tiny(stack, steps, None),
        "empty hooks": lambda: _hooked(stack, steps),
    }
    for name, policy in POLICIES.items():
        contenders[name] = lambda policy=policy: _engined(stack, steps, policy)  # type: ignore[misc]
    found = common.interleaved(contenders, rounds)
    result: common.Json = {"layers": layers, "steps": steps, "microseconds": {}, "added_microseconds": {}}
    for name, turns in found.items():
        result["microseconds"][name] = {
            part: common.summary(turn[part] for turn in turns) for part in ("forward", "backward")
        }
        if name != "stock":
            added = {
                part: [turn[part] - base[part] for turn, base in zip(turns, found["stock"], strict=True)]
                for part in ("forward", "backward")
            }
            added["total"] = [f + b for f, b in zip(added["forward"], added["backward"], strict=True)]
            result["added_microseconds"][name] = {part: common.summary(values) for part, values in added.items()}
    return result


def _tiny(stack: LayerStack, steps: int, end_step: Callable[[], None] | None) -> common.Json:
    """Processor time, and the least of the steps: other processes on the machine only ever add to it."""
    each = [one_step(stack, 8, end_step, time.process_time) for _ in range(steps)]
    scale = 1e6 / len(stack.layers)
    return {
        "forward": min(forward for forward, _ in each) * scale,
        "backward": min(backward for _, backward in each) * scale,
    }


def _hooked(stack: LayerStack, steps: int) -> common.Json:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return _tiny(stack, steps, None)


@contextlib.contextmanager
def _tiny_engine(stack: LayerStack, policy: dict[str, Any]) -> Iterator[Any]:
    device = WatchedDevice(copies=False)
    table = [{**row, "layers": f"1-{len(stack.layers)}"} for row in policy.get("table", [])]
    options = {**policy, "table": table, "host_memory": 64 << 20}
    with megamem.enable({"activations": options}, device=device) as handle:
        one_step(stack, 8, None)
        handle.engine.end_step()
        one_step(stack, 8, handle.engine.end_step)
        yield handle.engine


def _engined(stack: LayerStack, steps: int, policy: dict[str, Any]) -> common.Json:
    with _tiny_engine(stack, policy) as engine:
        return _tiny(stack, steps, engine.end_step)


def profile(args: argparse.Namespace, rig: CpuRig) -> None:
    """Where the time goes, by function; the profiler itself multiplies it, so only the order says something."""
    shape = Shape(kind="memo", hidden=32, heads=4, kv_groups=4, head_dim=8, ffn=128)
    with rig:
        stack = LayerStack(shape, 16, torch.float32)
    profiler = cProfile.Profile()
    with _tiny_engine(stack, MEMO_1) as engine:
        profiler.enable()
        for _ in range(20):
            one_step(stack, 8, engine.end_step)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(
        "activations|session|transformer_layer.py|bench", args.profile
    )
    pstats.Stats(profiler).sort_stats("tottime").print_stats(args.profile)


def _print(results: common.Json) -> None:
    steps = results["steps"]
    rows = [
        (name, *(f"{steps['step_seconds'][name][key]:.3f}" for key in ("median", "min", "max")))
        for name in ("stock", "memo 1")
    ]
    rows.append(("of which copies", *(f"{steps['copy_seconds'][key]:.3f}" for key in ("median", "min", "max"))))
    for name in ("ratio", "ratio_cpu_time", "ratio_without_copies"):
        rows.append((name, *(f"{steps[name][key]:.4f}" for key in ("median", "min", "max"))))
    title = f"step, h={steps['hidden']} s={steps['tokens']}, {steps['layers']} layers (seconds)"
    common.print_table(title, ("", "median", "min", "max"), rows)
    layers = results["layers"]
    rows = []
    for name, added in layers["added_microseconds"].items():
        rows.append((name, *(f"{added[part]['median']:.1f}" for part in added), f"{added['total']['min']:.1f}"))
    common.print_table("added to a layer (us)", ("", "forward", "backward", "total", "least total"), rows)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the stack in 1 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N costliest functions")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with single_rank("cpu") as rig:
        rig.stop()
        if args.profile:
            profile(args, rig)
        results: common.Json = {"steps": measure_steps(args, rig), "layers": measure_layers(args, rig)}
    share = results["steps"]["ratio_without_copies"]["median"] - 1
    cost = results["layers"]["added_microseconds"]["memo 1"]["total"]["median"]
    results["targets"] = [
        {"what": f"bookkeeping is {share:.1%} of step time at h=512, s=2048, 5 % allowed", "met": share < 0.05},
        {"what": f"bookkeeping is {cost:.0f} us a layer, forward and backward, 100 allowed", "met": cost < 100},
    ]
    _print(results)
    common.write(args.out, "bookkeeping", args, results)


if __name__ == "__main__":
    main()
