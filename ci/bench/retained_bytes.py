"""Device memory that one middle layer holds between its forward and its backward pass. Exact; runs on a CPU.

A stack of equal layers runs forward. The bytes alive after each layer are counted, and the difference between two
neighbouring layers is what one of them retains: outputs of layers, gradients and buffers in flight are in both counts
and cancel. Counted twice, independently:

    engine   what the engine says that it keeps (`engine.stats`)
    live     storages really alive, seen below autograd by `megamem.testing.live.LiveStorages`, host arena left out

`staging` is what is in device memory only because a copy is under way: it does not grow with the number of layers.

One unit is s*b*h elements. MEMO's layer saves 16 units and attention's log-sum-exp, 4 bytes a head and token.

Targets: recompute, MEMO layer: at most 2/16 of stock's units and the log-sum-exp. memo 1: nothing but staging.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import common
import torch
from rig import DTYPES, LayerStack, Shape, single_rank

import megamem
from megamem.testing.cpu import CpuRig
from megamem.testing.live import LiveStorages

LAYERS = 6
WARM_LAYERS = 3  # the first layers fill the pipeline of copies

POLICIES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "recompute": {"policy": "recompute"},
    "recompute, residual 2": {"policy": "recompute", "residual_every": 2},
    **{
        f"{policy} {fraction:g}": {"policy": policy, "swap_fraction": fraction, "keep_last_layers": 0}
        for policy in ("memo", "ordered")
        for fraction in (0.0, 0.5, 1.0)
    },
    "memo 0, residual 2": {"policy": "memo", "swap_fraction": 0.0, "keep_last_layers": 0, "residual_every": 2},
}


def shapes(quick: bool) -> dict[str, Shape]:
    """Heads are 128 wide, as in the real models, so that the log-sum-exp has its real share."""
    heads = 1 if quick else 4
    hidden = 128 * heads
    return {
        "memo": Shape(kind="memo", hidden=hidden, heads=heads, kv_groups=heads, head_dim=128, ffn=4 * hidden),
        "llama": Shape(kind="llama", hidden=hidden, heads=heads, kv_groups=1, head_dim=128, ffn=7 * hidden // 2),
    }


def measure(stack: LayerStack, tokens: int, policy: dict[str, Any] | None, host_nbytes: int) -> common.Json:
    """One contender: a first step in which layers are learned, then one that is counted."""
    if policy is None:
        return _counted_step(stack, tokens, None)
    with megamem.enable({"activations": {**policy, "host_memory": host_nbytes}}) as handle:
        _step(stack, tokens, handle)
        return _counted_step(stack, tokens, handle)


def _step(stack: LayerStack, tokens: int, handle: Any) -> None:
    hidden = stack.leaf(tokens).clone()
    for index in range(len(stack.layers)):
        hidden = stack.call(index, hidden, tokens)
    hidden.backward(stack.output_gradient(tokens))
    if handle is not None:
        handle.engine.end_step()
    stack.clear_gradients()


def _counted_step(stack: LayerStack, tokens: int, handle: Any) -> common.Json:
    leaf, gradient = stack.leaf(tokens), stack.output_gradient(tokens)
    engine = handle.engine if handle is not None else None
    live_bytes, kept, host = [], [], []
    for parameter in stack.parameters():  # as in a trainer, where gradients accumulate: else they are the peak
        parameter.grad = torch.zeros_like(parameter)
    with LiveStorages() as live:
        live.ignore([leaf, gradient, *stack.parameters()])
        live.ignore([parameter.grad for parameter in stack.parameters()])
        if engine is not None and engine.courier.arena._memory is not None:
            live.ignore([engine.courier.arena._memory])
        hidden = leaf.clone()
        for index in range(len(stack.layers)):
            hidden = stack.call(index, hidden, tokens)
            live_bytes.append(live.live_bytes())
            kept.append(engine.stats.retained.now if engine is not None else 0)
            host.append(engine.courier.arena.in_use if engine is not None else 0)
        staging = engine.courier.ledger.staging_nbytes if engine is not None else 0
        output = hidden.nbytes
        live.reset_peak()
        hidden.backward(gradient)
        if engine is not None:
            engine.end_step()
        del hidden
        peak = live.peak_bytes
    left = engine.stats.retained.now if engine is not None else 0
    stack.clear_gradients()
    return {
        "live_bytes": _per_layer(live_bytes),
        "engine_bytes": _per_layer(kept) if engine is not None else None,
        "host_bytes": _per_layer(host),
        "staging_bytes": staging,
        "output_bytes": output,
        "live_after_forward_bytes": live_bytes[-1],
        "live_peak_in_backward_bytes": peak,
        "engine_bytes_left_after_backward": left,
        "host_bytes_left_after_backward": engine.courier.arena.in_use if engine is not None else 0,
    }


def _per_layer(counts: list[int]) -> float:
    """Growth per layer once the pipeline of copies is full. The mean: with sparse residuals layers differ in turn."""
    grown = [
        after - before for before, after in zip(counts[WARM_LAYERS - 2 :], counts[WARM_LAYERS - 1 :], strict=False)
    ]
    return statistics.fmean(grown[: len(grown) // 2 * 2])


def run(args: argparse.Namespace, rig: CpuRig) -> common.Json:
    """All shapes, dtypes and contenders."""
    tokens = 64 if args.quick else args.tokens
    results: common.Json = {}
    for dtype_name in ("bf16",) if args.quick else DTYPES:
        dtype = DTYPES[dtype_name]
        for name, shape in shapes(args.quick).items():
            with rig:
                stack = LayerStack(shape, LAYERS, dtype)
                stack.kwargs(tokens)
            unit = tokens * shape.hidden * dtype.itemsize
            lse = 4 * tokens * shape.heads
            found = {
                contender: measure(stack, tokens, policy, host_nbytes=40 * LAYERS * unit)
                for contender, policy in POLICIES.items()
            }
            results[f"{name} {dtype_name}"] = {
                "tokens": tokens, "hidden": shape.hidden, "heads": shape.heads, "kv_groups": shape.kv_groups,
                "ffn": shape.ffn, "unit_bytes": unit, "log_sum_exp_bytes": lse, "layers": LAYERS,
                "contenders": _related(found, unit),
            }  # fmt: skip
            _print(f"{name} {dtype_name}", results[f"{name} {dtype_name}"])
    results["targets"] = _targets(results)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])
    return results


def _related(found: dict[str, common.Json], unit: int) -> dict[str, common.Json]:
    stock = found["stock"]["live_bytes"]
    for counts in found.values():
        counts["live_units"] = counts["live_bytes"] / unit
        counts["live_of_stock"] = counts["live_bytes"] / stock
        counts["host_units"] = counts["host_bytes"] / unit
    return found


def _targets(results: dict[str, common.Json]) -> list[common.Json]:
    targets = []
    for name, case in results.items():
        contenders, lse = case["contenders"], case["log_sum_exp_bytes"]
        if name.startswith("memo"):
            # The log-sum-exp is no part of MEMO's 16 units, so it is taken off stock before and added afterwards.
            limit = (contenders["stock"]["live_bytes"] - lse) * 2 / 16 + lse
            held = contenders["recompute"]["live_bytes"]
            targets.append(
                {"what": f"{name}: recompute holds {held:,.0f} B a layer of {limit:,.0f} B allowed (2/16 + lse)",
                 "met": held <= limit}
            )  # fmt: skip
        held = contenders["memo 1"]["live_bytes"]
        targets.append({"what": f"{name}: memo 1 holds {held:,.0f} B a layer besides staging", "met": held == 0})
        wrong = [
            contender
            for contender, counts in contenders.items()
            if counts["engine_bytes"] is not None and counts["engine_bytes"] != counts["live_bytes"]
        ]
        what = "the engine's count is that of live storages" + (f", but for {', '.join(wrong)}" if wrong else "")
        targets.append({"what": f"{name}: {what}", "met": not wrong})
    return targets


def _print(name: str, case: common.Json) -> None:
    rows = []
    for contender, counts in case["contenders"].items():
        engine = counts["engine_bytes"]
        rows.append(
            (
                contender, f"{counts['live_units']:.3f}", f"{counts['live_of_stock']:.4f}",
                f"{counts['live_bytes']:,.0f}", "-" if engine is None else f"{engine:,.0f}",
                f"{counts['host_units']:.3f}", common.mib(counts["staging_bytes"]),
                common.mib(counts["live_peak_in_backward_bytes"]),
            )
        )  # fmt: skip
    header = ("held per layer", "units", "of stock", "live B", "engine B", "host units", "staging MiB", "peak MiB")
    common.print_table(f"{name}: s={case['tokens']} h={case['hidden']}", header, rows)


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=512, help="sequence length (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # nothing is timed, and threads on a busy machine wait for each other
    with single_rank("cpu") as rig:
        rig.stop()
        results = run(args, rig)
    common.write(args.out, "retained_bytes", args, results)


if __name__ == "__main__":
    main()
