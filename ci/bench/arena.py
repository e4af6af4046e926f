"""The arena of the static allocator on a CPU: what a request costs, whether it can be led astray, and a job with it.

1. `core`: nanoseconds per malloc/free pair in the compiled core, lock included, with 10 to 10,000 live blocks.
2. `fuzz`: random traces, mutated between plan and replay, with plans that overlap or cannot be, frees at other times,
   second streams, resets; every block is stamped and looked at again. Any block that shares a byte with another, any
   leak and any crash ends it. tests/native runs the first of these seeds under AddressSanitizer and UBSan.
3. `jobs`: a GPT of Megatron-Core on one CPU rank, stock and with `allocator.mode: static` in turns: losses, served
   share, planned peak over its lower bound, processor time of a step.

On a CPU the arena stands in for a device's memory: its figures say what is served, not what a GPU gains.

Targets: below 300 ns a pair; 10^6 traces without a fault; losses bitwise equal.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
from rig import single_rank

from megamem.native.build import SOURCES

DRIVER = common.ROOT / "tests" / "native" / "arena_driver.cpp"
CORE = ("align", "arena", "arena_c", "matcher", "region")
STATIC = {"allocator": {"mode": "static"}}
WARM_UP = 4  # one step to warm up, two to record, one to plan


def build_driver(folder: Path) -> Path:
    """The driver and the core, optimised as the product is."""
    compiler = next(found for name in ("c++", "g++", "clang++") if (found := shutil.which(name)))
    target = folder / "driver"
    text = "".join(f'#include "{name}"\n' for name in (*(f"{part}.cpp" for part in CORE), DRIVER))
    command = [compiler, "-std=c++17", "-O3", "-pthread", f"-I{SOURCES}", "-x", "c++", "-", "-o", str(target)]
    subprocess.run(command, input=text, text=True, check=True)
    return target


def drive(driver: Path, *arguments: object) -> Any:
    """The line of JSON that the driver prints; CalledProcessError where it finds a fault."""
    command = [str(driver), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_core(args: argparse.Namespace, driver: Path) -> common.Json:
    """Nanoseconds per pair by the number of live blocks."""
    pairs, rounds = (20_000, 1) if args.quick else (2_000_000, args.rounds)
    contenders = {str(live): lambda live=live: drive(driver, "bench", live, pairs) for live in (10, 100, 1000, 10_000)}
    turns = common.interleaved(contenders, rounds)
    return {
        "pairs": pairs,
        "ns_per_pair": {live: common.summary(turn["ns_per_pair"] for turn in found) for live, found in turns.items()},
    }


def measure_fuzz(args: argparse.Namespace, driver: Path) -> common.Json:
    """A million traces, if nothing goes wrong."""
    found: common.Json = drive(driver, "fuzz", 1, 300 if args.quick else args.traces)
    return found


JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "swapped activations": ({}, {"activations": {"policy": "memo", "keep_last_layers": 0}}),
    "recomputed activations": ({}, {"activations": {"policy": "recompute"}}),
    "experts": ({"experts": 4, "bias": False}, {}),
}


def measure_jobs(args: argparse.Namespace) -> common.Json:
    """Each job stock and with the arena, in turns; what else is switched on is so in both."""
    from megamem.testing.models import GptCase

    size: dict[str, Any] = (
        {"layers": 2, "hidden": 32, "heads": 4, "sequence": 32, "vocab": 64}
        if args.quick
        else {"layers": 4, "hidden": 256, "heads": 8, "sequence": 256, "vocab": 512}
    )
    rounds = 1 if args.quick else args.rounds
    result: common.Json = {"size": size, "num_microbatches": 4, "jobs": {}}
    for name in ("dense", "experts") if args.quick else JOBS:
        fields, sections = JOBS[name]
        case = GptCase(activation="swiglu", norm="RMSNorm", **size, **{"bias": False, **fields})
        turns = common.interleaved(
            {
                "stock": lambda case=case, sections=sections: _train(args, case, sections),
                "arena": lambda case=case, sections=sections: _train(args, case, {**sections, **STATIC}),
            },
            rounds,
        )
        last = turns["arena"][-1]
        result["jobs"][name] = {
            **{key: value for key, value in last.items() if key not in ("seconds", "losses")},
            "losses_equal": all(turn["losses"] == last["losses"] for both in turns.values() for turn in both),
            "step_seconds": {who: common.summary(turn["seconds"] for turn in found) for who, found in turns.items()},
            "step_ratio": common.ratios(*([turn["seconds"] for turn in turns[who]] for who in ("arena", "stock"))),
        }
    return result


def _train(args: argparse.Namespace, case: Any, sections: Mapping[str, Any]) -> common.Json:
    import megamem
    from megamem.testing.models import build_gpt, train_steps
    from megamem.testing.parity import seed_everything

    seed_everything()
    steps = 2 if args.quick else args.steps
    with megamem.enable({**sections}) as handle:
        chunks = build_gpt(case)
        losses, _ = train_steps(chunks, case, num_microbatches=4, steps=WARM_UP, lr=0.01)
        clock = common.Clock()
        with clock.running():
            losses += train_steps(chunks, case, num_microbatches=4, steps=steps, lr=0.01)[0]
        found: common.Json = {"losses": losses, "seconds": clock.cpu / steps}
        report = handle.report().allocator
        if report is not None:
            arena = report.arena
            (kind,) = arena.kinds
            found |= {
                "requests": arena.num_requests,
                "planned_peak_bytes": arena.planned_peak,
                "lower_bound_bytes": kind.plan.lower_bound,
                "served_share": arena.served_share,
                "served_bytes_share": arena.served_bytes_share,
                "fates": arena.counters.requests,
                "fallbacks": arena.num_fallbacks,
                "fallback_bytes": arena.fallback_nbytes,
            }
    return found


def _targets(results: common.Json) -> list[common.Json]:
    slowest = max(found["median"] for found in results["core"]["ns_per_pair"].values())
    traces = results["fuzz"]["traces"]
    return [
        {"what": f"a malloc/free pair takes {slowest:.0f} ns at most, 300 allowed", "met": slowest < 300},
        {"what": f"{traces:,} random traces, 1,000,000 asked for, without a fault", "met": traces >= 10**6},
        {"what": "losses bitwise equal", "met": all(job["losses_equal"] for job in results["jobs"]["jobs"].values())},
    ]


def _print(results: common.Json) -> None:
    rows = [
        (live, *(f"{found[key]:.0f}" for key in ("median", "min", "max")))
        for live, found in results["core"]["ns_per_pair"].items()
    ]
    common.print_table("nanoseconds per malloc/free pair", ("live blocks", "median", "min", "max"), rows)
    rows = [
        (
            name, f"{job['served_share']:.1%}", f"{job['served_bytes_share']:.2%}", str(job["fallbacks"]),
            common.mib(job["planned_peak_bytes"]), f"{job['planned_peak_bytes'] / job['lower_bound_bytes'] - 1:.2%}",
            f"{job['step_ratio']['median']:.3f}", "equal" if job["losses_equal"] else "DIFFERENT",
        )
        for name, job in results["jobs"]["jobs"].items()
    ]  # fmt: skip
    header = ("", "served", "of the bytes", "fallbacks", "MiB", "above bound", "step", "losses")
    common.print_table("jobs", header, rows)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a turn (default: %(default)s)")
    parser.add_argument("--traces", type=int, default=10**6, help="random traces in 2 (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        driver = build_driver(Path(folder))
        results: common.Json = {"core": measure_core(args, driver), "fuzz": measure_fuzz(args, driver)}
    with single_rank("cpu"):
        results["jobs"] = measure_jobs(args)
    results["targets"] = _targets(results)
    _print(results)
    common.write(args.out, "arena", args, results)


if __name__ == "__main__":
    main()
