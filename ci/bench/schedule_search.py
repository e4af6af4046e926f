"""How good the schedule `auto` is: against every record of simulated published schedules, V-Half, and lower bounds.

    python ci/bench/schedule_search.py --out ci/bench/results/schedule_search.cpu.json
    python ci/bench/schedule_search.py --effort 8000000 --all-lengths --out FILE.json      # the usual effort; hours

Everything but the processor time of the large case is exact: times are the simulator's, in the unit of the costs.

* `records`: for every (p, m, costs) the records that no other beats in both peak and makespan; `auto` at each record's
  peak, any number of chunks, any placement; `ratio` is auto / record. `all` counts every record of the file against
  the best that auto found at no more memory.
* `v_half`: V-Half, GIS-H at its own peak, and auto at V-Half's peak, for p = 4, 8, 16, m = 2p, 3p, 4p (at p = 16 only
  3p unless `--all-lengths`), and seven cost sets.
* `between`: long sequences between 0.625 p and p, where published families leave a gap.
* `large`: p = 16, m = 64, processor and wall seconds of one search with the usual effort.

`bound` is what no schedule on that placement can undercut (`megamem.planner.schedules.search.bounds`).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, Clock, Json, argument_parser, print_table, write

from megamem.ir.workload import Uniform
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.search import SearchResult, search
from megamem.planner.schedules.simulator import Price, price

COSTS = {
    "unit": (1.0, 1.0, 1.0, 0.0),
    "brief": (10.0, 9.5, 9.4, 0.0),
    "brief, c=.3": (10.0, 9.5, 9.4, 0.3),
    "3:4:2": (3.0, 4.0, 2.0, 0.0),
    "1.5B": (18.522, 18.086, 9.337, 0.601),
    "14.6B": (11.347, 11.248, 8.132, 0.377),
    "long": (2.333, 3.667, 1.0, 0.02),
}
"""F, B, W of a rank and microbatch, and the latency of a hop (arXiv 2401.10241, tables 5 and 9; h = 4k, s = 32k)."""

EQUAL = 1e-6  # ratios this close to 1 are equal


def make_request(ranks: int, microbatches: int, costs: tuple[float, ...], limit: float) -> Request:
    forward, backward, weight, comm = costs
    workload = Uniform(forward=forward, backward=backward, weight=weight, comm=comm)
    return Request(num_ranks=ranks, num_microbatches=microbatches, workload=workload, memory_limit=limit)


def describe(found: SearchResult) -> Json:
    placement = found.schedule.placement
    return {
        "auto": found.simulation.makespan,
        "origin": found.origin,
        "placement": placement.shape,
        "chunks": placement.num_chunks,
        "peak": max(found.simulation.peak_activation),
        "bubble": found.simulation.bubble_rate,
        "bound": found.bounds.makespan,
        "above_bound": found.simulation.makespan / found.bounds.makespan - 1,
    }


def pareto(records: list[Any]) -> Iterator[Any]:
    """The records that no other beats in both peak and makespan, by rising peak."""
    best = float("inf")
    for record in sorted(records, key=lambda each: (each["peak_mem_MB"], each["makespan"])):
        if record["makespan"] < best * (1 - EQUAL):
            best = record["makespan"]
            yield record


def measure_records(path: Path, effort: int, quick: bool) -> Json:
    """Auto at the peak of every record of the front; every record against what was found at no more memory."""
    groups = defaultdict(list)
    for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
        groups[record["p"], record["m"], record["cost"]].append(record)
    rows: list[Json] = []
    everyone = {"better": 0, "equal": 0, "worse": 0}
    for (ranks, microbatches, name), records in sorted(groups.items())[: 1 if quick else None]:
        found: list[Json] = []
        for record in pareto(records):
            limit = record["peak_mem_MB"]
            costs = tuple(record["cost_values"])
            result = search(make_request(ranks, microbatches, costs, limit), effort=effort)
            row = {"p": ranks, "m": microbatches, "costs": name, "limit": limit, "record": record["schedule"]}
            row |= {"makespan": record["makespan"], **describe(result)}
            found.append(row | {"ratio": row["auto"] / row["makespan"]})
        rows += found
        for record in records:
            best = min(row["auto"] for row in found if row["limit"] <= record["peak_mem_MB"])
            everyone[verdict(best / record["makespan"])] += 1
    return {"rows": rows, "front": count(rows, "ratio"), "all": everyone}


def verdict(ratio: float) -> str:
    return "equal" if abs(ratio - 1) <= EQUAL else "better" if ratio < 1 else "worse"


def count(rows: list[Json], key: str) -> Json:
    verdicts = [verdict(row[key]) for row in rows]
    return {name: verdicts.count(name) for name in ("better", "equal", "worse")}


def gis_h(ranks: int, microbatches: int, costs: tuple[float, ...], chunks: int) -> Price:
    """GIS-H within the memory that its order has by itself (arXiv 2503.01328, section 4)."""
    limit = (ranks / 2 * (chunks - 1) + ranks) / chunks
    request = make_request(ranks, microbatches, costs, limit).with_chunks(chunks)
    return price(build_schedule("gis-h", request), request.workload)


def measure_v_half(effort: int, quick: bool, all_lengths: bool) -> Json:
    """V-Half, GIS-H and auto at V-Half's peak."""
    rows = []
    for ranks in (4,) if quick else (4, 8, 16):
        factors = (2,) if quick else (3,) if ranks == 16 and not all_lengths else (2, 3, 4)
        for microbatches in (factor * ranks for factor in factors):
            for name, costs in list(COSTS.items())[: 1 if quick else None]:
                request = make_request(ranks, microbatches, costs, float("inf"))
                theirs = price(build_schedule("v-half", request.with_chunks(2)), request.workload)
                limit = max(theirs.peak_activation)
                result = search(make_request(ranks, microbatches, costs, limit), effort=effort)
                group = gis_h(ranks, microbatches, costs, 8 if ranks == 16 else 4)
                row = {"p": ranks, "m": microbatches, "costs": name, "limit": limit, "v_half": theirs.makespan}
                row |= {"gis_h": group.makespan, "gis_h_peak": max(group.peak_activation), **describe(result)}
                rows.append(row | {"ratio": row["auto"] / theirs.makespan})
    return {"rows": rows, "counts": count(rows, "ratio")}


def measure_between(effort: int, quick: bool) -> Json:
    """Long sequences between GIS-H's peak and p: the gap that published families leave."""
    rows = []
    for ranks, microbatches in ((4, 8),) if quick else ((8, 24), (16, 48)):
        costs = COSTS["long"]
        half = gis_h(ranks, microbatches, costs, 4)
        for share in (0.625, 1.0) if quick else (0.5, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0):
            result = search(make_request(ranks, microbatches, costs, share * ranks), effort=effort)
            row = {"p": ranks, "m": microbatches, "limit": share * ranks, "gis_h_v4": half.makespan}
            rows.append(row | {"gis_h_v4_peak": max(half.peak_activation), **describe(result)})
    return {"rows": rows}


def measure_large(quick: bool) -> Json:
    """One search of the size that the target names, with the usual effort."""
    ranks, microbatches = (4, 8) if quick else (16, 64)
    clock = Clock()
    with clock.running():
        result = search(make_request(ranks, microbatches, COSTS["14.6B"], 0.625 * ranks))
    return {
        "p": ranks, "m": microbatches, "limit": 0.625 * ranks, **describe(result),
        "cpu_seconds": clock.cpu, "wall_seconds": clock.wall, "evaluated_steps": result.evaluated,
    }  # fmt: skip


def show(title: str, rows: list[Json], columns: list[str]) -> None:
    cells = [[f"{row[key]:.4g}" if isinstance(row[key], float) else row[key] for key in columns] for row in rows]
    print_table(title, columns, cells)


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--records", type=Path, default=ROOT.parent / "shared" / "data" / "schedules.json")
    parser.add_argument("--effort", type=int, default=1_000_000, help="steps per search; `large` has the usual effort")
    parser.add_argument("--all-lengths", action="store_true", help="m = 2p and 4p for p = 16, too")
    arguments: argparse.Namespace = parser.parse_args()
    quick = arguments.quick
    effort = 20_000 if quick else arguments.effort
    results: Json = {"large": measure_large(quick)}
    print({key: results["large"][key] for key in ("auto", "bound", "cpu_seconds", "wall_seconds")}, flush=True)
    results["between"] = measure_between(effort, quick)
    columns = ["limit", "auto", "bound", "above_bound", "origin", "placement", "chunks"]
    show("Long sequences between", results["between"]["rows"], ["p", "m", *columns, "gis_h_v4", "gis_h_v4_peak"])
    results["v_half"] = measure_v_half(effort, quick, arguments.all_lengths)
    show("V-Half at its peak", results["v_half"]["rows"], ["p", "m", "costs", *columns, "v_half", "gis_h", "ratio"])
    if arguments.records.exists():
        results["records"] = measure_records(arguments.records, effort, quick)
        columns = ["p", "m", "costs", *columns, "record", "makespan", "ratio"]
        show("Records at their peaks", results["records"]["rows"], columns)
        print(results["records"]["front"], results["records"]["all"], results["v_half"]["counts"])
    large = results["large"]
    results["targets"] = [
        {"what": "auto at p = 16, m = 64 within 30 s of processor time", "met": large["cpu_seconds"] < 30},
        {"what": "never worse than V-Half at its peak", "met": results["v_half"]["counts"]["worse"] == 0},
    ]
    if "records" in results:
        counts = [results["records"][key] for key in ("front", "all")]
        met = not any(each["worse"] for each in counts) and all(each["better"] for each in counts)
        results["targets"].append({"what": "never worse than a record, better somewhere", "met": met})
    arguments.records = arguments.records.name  # not a path of this machine
    write(arguments.out, "schedule_search", arguments, results)


if __name__ == "__main__":
    main()
