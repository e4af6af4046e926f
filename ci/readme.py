"""Writes the parts of the documentation that are made from something else, so that no figure is ever typed by hand.

    python ci/readme.py            rewrite README.md and the pages beside it
    python ci/readme.py --check    exit 1 if one of them is stale

plan      from `megamem plan`
options   from the declarations in megamem/config.py
schedules and their picture, from the simulator
all others   from the benchmarks' files in ci/bench/results, by ci/figures.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import figures
import figures_allocator

from megamem.cli import main as main_of_megamem
from megamem.config import SCHEDULES, options_table
from megamem.ir.workload import Uniform
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.simulator import simulate
from megamem.report.schedule_svg import Picture, render_svg

ROOT = Path(__file__).resolve().parent.parent
PLAN = ("--model", "llama3-8b", "--gpus", "8", "--gpu", "h100", "--seq-length", "256k")
PICTURE = ROOT / "examples" / "schedules" / "gis-h.svg"


def main() -> int:
    """Rewrite or check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is stale")
    is_check = parser.parse_args().check
    made = {ROOT / name: filled(name, parts) for name, parts in PAGES.items()} | {PICTURE: picture()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if is_check:
            print(f"{path.relative_to(ROOT)} is stale: run python ci/readme.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made[path], encoding="utf-8")
    return int(is_check and bool(stale))


def filled(name: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page with its made parts made anew: what stands between `<!-- PART: ... -->` and `<!-- /PART -->`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for part, make in parts.items():
        pattern = re.compile(rf"(<!-- {part}:[^>]*-->\n).*?(<!-- /{part} -->)", re.DOTALL)
        content = make()
        text, count = pattern.subn(lambda match, made=content: f"{match[1]}{made}{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{name}: {count} places for {part}, instead of one")
    return text


def plan() -> str:
    """What `megamem plan` prints for the README's example: the first lines, and what lost."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main_of_megamem(["plan", *PLAN])
    if status:
        raise SystemExit("megamem plan has failed")
    head, *tables = printed.getvalue().rstrip().split("\n\n")
    shown = [head, *(table for table in tables if table.startswith("what else"))]
    return "```text\n" + "\n\n".join(shown) + "\n```\n"


def schedules() -> str:
    """What every schedule costs on one example, from the simulator: exact, and the same on every machine."""
    ranks, microbatches, chunks = 8, 32, {"interleaved": 4, "gis": 4, "gis-h": 4, "po-h": 4, "po-f": 4}
    real = Uniform(forward=11.347, backward=11.248, weight=8.132, comm=0.377)
    lines = [
        f"On {ranks} ranks with {microbatches} microbatches: share of the step in which ranks idle, with F = B = W and "
        "no communication, and with the times measured for a 14.6B model (arXiv 2401.10241, table 9); most activations "
        f"on any rank, where {ranks} is what 1F1B needs. Waiting for the slowest rank at the optimizer counts as idle; "
        "copies of po-h and po-f to and from host memory are taken to be as fast as they need to be.",
        "",
        "| schedule | layers | chunks | idle | idle, 14.6B | memory | what it is |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SCHEDULES:
        family = FAMILIES[name]
        request = Request(
            num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks.get(name, family.default_chunks)
        )
        simple = simulate(build_schedule(name, request), request.workload)
        measured = Request(num_ranks=ranks, num_microbatches=microbatches, num_chunks=request.num_chunks, workload=real)
        costly = simulate(build_schedule(name, measured), real)
        lines.append(
            f"| `{name}` | {'a V' if family.shape == 'v' else 'as Megatron'} | {request.num_chunks} "
            f"| {100 * simple.bubble_rate:.1f} % | {100 * costly.bubble_rate:.1f} % "
            f"| {max(simple.peak_activation):.4g} | {family.summary} |"
        )
    return "\n".join(lines) + "\n"


def picture() -> str:
    """GIS-H as the README shows it."""
    workload = Uniform(forward=10, backward=12, weight=8, comm=0.3)
    schedule = build_schedule("gis-h", Request(num_ranks=4, num_microbatches=8, num_chunks=2, workload=workload))
    simulation = simulate(schedule, workload)
    return render_svg(
        Picture(
            timeline=simulation.timeline(),
            title="gis-h: 4 ranks x 2 chunks on Megatron's own layer placement, 8 microbatches",
            caption=f"bubble {100 * simulation.bubble_rate:.1f} %, peak activation "
            f"{max(simulation.peak_activation):.4g} microbatches (1F1B: 4)",
            memory=[simulation.memory_curve(rank) for rank in range(4)],
        )
    )


PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {
        "plan": plan,
        "quickstart": figures.quickstart,
        "light": figures.light,
        "vocabulary": figures.vocabulary,
        "allocator": figures_allocator.allocator,
        "solvers": figures_allocator.solvers,
    },
    "examples/OPTIONS.md": {"options": options_table},
    "examples/schedules/README.md": {"schedules": schedules},
    "ci/bench/RESULTS.md": {"figures": figures.figures},
}
"""What is made on each page, by the name of its place."""


if __name__ == "__main__":
    sys.exit(main())
