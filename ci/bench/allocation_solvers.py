"""How good and how fast the allocation solvers are. Runs on a CPU, on one core.

1. `published`: MiniMalloc's challenging instances at their capacity, `megamem solve` against `minimalloc` (--minimalloc
   names the binary; without it megamem runs alone). Both are whole processes, reading the file included, in turns;
   wall and processor time.
2. `traces`: one iteration of Megatron models, those of --data and those that `megamem profile --allocations` makes here
   (MODELS): gap to the most bytes live at once, for the first greedy order alone, the whole portfolio, MEMO's two
   levels before and after they are refined, and `auto` within --time-limit; beside what PyTorch's caching allocator
   would reserve (simulated, two iterations, native and with expandable segments).
3. `scale`: iterations of the largest trace one after the other, 10^5 requests and more, by the first greedy order and
   by `auto` within 10 s.

Targets: every instance solved within 10 s, in less time than MiniMalloc needs in all; gaps at most 0.5 %; two levels
within 0.5 % of flat; 10^5 requests within 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import common

from megamem.ir.allocation import Problem, read_problem, read_solution
from megamem.native import load
from megamem.planner.allocation import greedy
from megamem.planner.allocation.bilevel import BilevelSolver, decompose
from megamem.planner.allocation.budget import Budget
from megamem.planner.allocation.caching_allocator import simulate
from megamem.planner.allocation.greedy import GreedySolver
from megamem.planner.allocation.solver import Outcome, Task
from megamem.planner.allocation.solvers import make_solver
from megamem.planner.allocation.sweep import Sweep
from megamem.planner.allocation.validator import check

CAPACITY = 1 << 20
_LLAMA = "--swiglu --normalization RMSNorm --disable-bias-linear --bf16 --micro-batch-size 1 --vocab-size 32000"
_7B = f"{_LLAMA} --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008 --seq-length 4096"
_70B = (
    f"{_LLAMA} --num-layers 80 --hidden-size 8192 --num-attention-heads 64 --num-query-groups 8 --seq-length 8192 "
    "--ffn-hidden-size 28672 --tensor-model-parallel-size 8 --sequence-parallel"
)
_PIPELINE = f"{_7B} --num-query-groups 8 --pipeline-model-parallel-size 4 --num-microbatches 4"
_EXPERTS = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --num-layers 8 --hidden-size 256 --num-attention-heads 4 "
    "--seq-length 512 --micro-batch-size 1 --vocab-size 8192 --num-experts 8 --num-microbatches 4"
)
_ENGINE = "activations: {policy: memo, swap_fraction: 0.5, host_memory: 500GiB}"
# Name: flags of `megamem profile`, and what is on of megamem, whose engine keeps layers that do not stand for others.
MODELS = {
    "7B, 1 microbatch": (f"{_7B} --trace-layers 6", ""),
    "7B, 8 layers, engine": (f"{_7B} --num-layers 8", _ENGINE),
    "70B GQA, TP 8, 2 microbatches": (f"{_70B} --trace-layers 6 --num-microbatches 2", ""),
    "experts, a real step": (f"{_EXPERTS} --allocations-from step", ""),
    "7B GQA, 1F1B, rank 0 of 4": (f"{_PIPELINE} --trace-layers 6", ""),
    "7B GQA, GIS, rank 0 of 4": (_PIPELINE, "schedule: {name: gis}"),
    "7B GQA, GIS, engine, rank 0 of 4": (_PIPELINE, f"schedule: {{name: gis}}\n  {_ENGINE}"),
}
DATA = common.ROOT.parent / "shared" / "data"


def measure_published(args: argparse.Namespace) -> common.Json:
    """Each instance by each contender, `rounds` times in turns."""
    files = sorted((args.data / "minimalloc").glob("*.csv"))[: 1 if args.quick else None]
    result: common.Json = {"capacity": CAPACITY, "instances": {}}
    for file in files:
        contenders = {"megamem": lambda file=file: _run_megamem(file)}
        if args.minimalloc:
            contenders["minimalloc"] = lambda file=file: _run_minimalloc(args.minimalloc, file)
        turns = common.interleaved(contenders, 1 if args.quick else args.rounds)
        result["instances"][file.name.partition(".")[0]] = {
            name: {
                "solved": all(turn["solved"] for turn in found),
                "seconds": common.summary(turn["wall"] for turn in found),
                "cpu_seconds": common.summary(turn["cpu"] for turn in found),
            }
            for name, found in turns.items()
        }
    names = ["megamem", *(["minimalloc"] if args.minimalloc else [])]
    result["total_seconds"] = {
        name: {
            clock: sum(found[name][clock]["median"] for found in result["instances"].values())
            for clock in ("seconds", "cpu_seconds")
        }
        for name in names
    }
    return result


def _run_megamem(file: Path) -> common.Json:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "solution.csv"
        command = [sys.executable, "-m", "megamem", "solve", str(file), "--capacity", str(CAPACITY), "--json"]
        turn = _timed([*command, "--time-limit", "60s", "--output", str(output)])
        check(read_solution(output))
        return {**turn, "solved": json.loads(turn.pop("stdout"))["fits"]}


def _run_minimalloc(binary: str, file: Path) -> common.Json:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "solution.csv"
        turn = _timed([binary, f"--capacity={CAPACITY}", f"--input={file}", f"--output={output}"])
        turn.pop("stdout")
        solved = output.exists() and read_solution(output).peak <= CAPACITY
        if solved:
            check(read_solution(output))
        return {**turn, "solved": solved}


def _timed(command: list[str]) -> common.Json:
    before, begin = os.times(), time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    wall, after = time.perf_counter() - begin, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu, "stdout": run.stdout}


def measure_traces(made: dict[str, Problem], args: argparse.Namespace) -> common.Json:
    """Gaps and seconds by trace and solver."""
    files = sorted((args.data / "traces").glob("*.csv.gz"))[: 1 if args.quick else None]
    problems = {file.name.removesuffix(".csv.gz"): read_problem(file) for file in files} | made
    return {name: _measure_trace(problem, args) for name, problem in problems.items()}


def _traced(name: str) -> Problem:
    """By the command, in a process of its own."""
    flags, sections = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder) / "megamem.yaml", Path(folder) / "trace.csv"
        command = [sys.executable, "-m", "megamem", "profile", *flags.split(), "--allocations", str(output)]
        if sections:
            config.write_text(f"megamem:\n  {sections}\n", encoding="utf-8")
            command += ["--megamem", str(config)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
        if run.returncode:
            raise SystemExit(f"{name}: {run.stderr[-2000:]}")
        print(f"{name}: {run.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
        return read_problem(output)


def _reserved(problem: Problem) -> common.Json:
    """What PyTorch's caching allocator reserves at most, over the most bytes live."""
    live = Task(problem).bound.nbytes
    return {
        name: simulate(problem, expandable_segments=is_expandable).reserved / live
        for name, is_expandable in (("native", False), ("expandable segments", True))
    }


def _measure_trace(problem: Problem, args: argparse.Namespace) -> common.Json:
    limit = 2.0 if args.quick else args.time_limit
    found = {"first order": _first_order(problem)}
    task = Task(problem, budget=Budget(limit))
    greedy.try_portfolio(task)
    found["portfolio"] = _gap(task.outcome())
    found["auto"] = _gap(make_solver("auto").solve(problem, budget=Budget(limit)))
    found["two levels"] = _gap(BilevelSolver().solve(problem, budget=Budget(limit)))
    parts = decompose(Task(problem))
    price = Sweep.of(parts.blocks)
    upper = GreedySolver().solve(parts.blocks, budget=Budget(min(limit, 5.0)))
    return {
        "requests": len(problem),
        "lower_bound": task.bound.nbytes,
        "solvers": found,
        "caching_allocator": _reserved(problem),
        "levels": {
            "passes": len(parts.passes),
            "distinct": parts.num_programs,
            "blocks": len(parts.blocks),
            "lower_bound_ratio": price.max_live * price.unit / task.bound.nbytes,
            "unrefined_gap": upper.peak / task.bound.nbytes - 1,
        },
    }


def _first_order(problem: Problem) -> common.Json:
    task = Task(problem)
    name, order = next(iter(greedy.orders(task.sweep)))
    task.offer(task.core.first_fit(task.sweep, order), name)
    return _gap(task.outcome())


def _gap(outcome: Outcome) -> common.Json:
    return {
        "peak": outcome.peak, "gap": outcome.gap, "optimal": outcome.is_optimal, "seconds": outcome.seconds,
        "found_by": outcome.solver,
    }  # fmt: skip


def measure_scale(args: argparse.Namespace) -> common.Json:
    """Iterations of the largest trace in a row, until there are 10^5 requests (10^4 with --quick)."""
    files = sorted((args.data / "traces").glob("*.csv.gz"), key=lambda file: file.stat().st_size)
    problem = read_problem(files[0 if args.quick else -1])
    times = -(-(10**4 if args.quick else 10**5) // len(problem))
    horizon = max(buffer.upper for buffer in problem.buffers)
    buffers = [
        replace(
            buffer, id=f"{turn}.{buffer.id}", lower=buffer.lower + turn * horizon, upper=buffer.upper + turn * horizon
        )
        for turn in range(times)
        for buffer in problem.buffers
    ]
    problem = Problem(buffers=tuple(buffers))
    auto = make_solver("auto").solve(problem, budget=Budget(10.0))
    return {"requests": len(problem), "solvers": {"first order": _first_order(problem), "auto, 10 s": _gap(auto)}}


def _targets(results: common.Json) -> list[common.Json]:
    published, scale = results["published"], results["scale"]
    targets = [
        {
            "what": "published instances all solved, each within 10 s",
            "met": all(
                found["megamem"]["solved"] and found["megamem"]["seconds"]["max"] < 10
                for found in published["instances"].values()
            ),
        },
        {"what": f"{scale['requests']} requests within 10 s", "met": scale["solvers"]["first order"]["seconds"] < 10},
    ]
    totals = published["total_seconds"]
    if "minimalloc" in totals:
        for clock in ("seconds", "cpu_seconds"):
            ours, theirs = totals["megamem"][clock], totals["minimalloc"][clock]
            what = f"all of them in {ours:.1f} {clock.replace('_', ' ')}, MiniMalloc in {theirs:.1f}"
            targets.append({"what": what, "met": ours < theirs})
    for name, trace in results["traces"].items():
        auto, two = trace["solvers"]["auto"], trace["solvers"]["two levels"]
        targets.append({"what": f"{name}: gap {auto['gap']:.4%}, 0.5 % allowed", "met": auto["gap"] <= 0.005})
        apart = two["peak"] / auto["peak"] - 1
        targets.append({"what": f"{name}: two levels {apart:.4%} above flat, 0.5 % allowed", "met": apart <= 0.005})
    return targets


def _print(results: common.Json) -> None:
    rows = [
        (name, *(f"{found[who]['seconds']['median']:.2f} ({found[who]['cpu_seconds']['median']:.2f})" for who in found))
        for name, found in results["published"]["instances"].items()
    ]
    who = list(results["published"]["total_seconds"])
    rows.append(("total", *(f"{results['published']['total_seconds'][name]['seconds']:.2f}" for name in who)))
    common.print_table(f"fitted into {CAPACITY} bytes: seconds (of processor)", ("", *who), rows)
    traces = {**results["traces"], f"{results['scale']['requests']} requests": results["scale"]}
    rows = [
        (f"{name}: {solver}", f"{found['gap']:.5%}", "yes" if found["optimal"] else "", f"{found['seconds']:.2f}")
        for name, trace in traces.items()
        for solver, found in trace["solvers"].items()
    ]
    common.print_table("traces", ("", "gap", "proven", "seconds"), rows)
    rows = [
        (name, str(trace["requests"]), *(f"{ratio:.3f}" for ratio in trace["caching_allocator"].values()))
        for name, trace in results["traces"].items()
    ]
    header = ("", "requests", "native", "expandable segments")
    common.print_table("PyTorch's caching allocator, simulated: reserved / peak live", header, rows)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="with minimalloc/ and traces/")
    parser.add_argument("--minimalloc", metavar="FILE", help="its binary (default: that of PATH, if there is one)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds for auto (default: %(default)s)")
    args = parser.parse_args()
    args.minimalloc = args.minimalloc or shutil.which("minimalloc")
    load()  # building the core is no part of solving
    names = list(MODELS)[: 1 if args.quick else None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(names, pool.map(_traced, names), strict=True))
    results: common.Json = {
        "published": measure_published(args), "traces": measure_traces(made, args), "scale": measure_scale(args),
    }  # fmt: skip
    results["targets"] = _targets(results)
    _print(results)
    args.data, args.minimalloc = args.data.name, bool(args.minimalloc)  # where they lie says nothing
    common.write(args.out, "allocation_solvers", args, results)


if __name__ == "__main__":
    main()
