"""Pipeline schedules against the published tables. Runs on a CPU; everything but the generators' times is exact.

1. `table5`: the 72 bubble rates of Table 5 of arXiv 2401.10241 from the times of its Table 9, as stage span, to four
   decimals. 60 are simulated. The 12 of interleaved 1F1B are the closed form
   m(F+B+W) + (p-1)(F+B+W)/v + ((2v-1)p-2) c, which is what the paper's column holds; the simulated rate is beside it.
2. `peaks`: the fullest rank's activation memory of every family for p = 2..16, in microbatch-activations of one rank,
   beside the formula of its paper. F = B = W = 1, a copy to the host 0.5.
3. `records`: makespan, stage span and peak against the simulated records of other people's generators, where the file
   with the records is there (`../shared/data/schedules.json`, outside the repository). A record of a zero-bubble
   interleaved schedule is met by `gis` with the record's peak as its memory limit.
4. `generators`: processor seconds to build a schedule, p=16 m=64 and p=64 m=256, with unequal F, B and W.

Every family of `FAMILIES` takes part by itself.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import common

from megamem.ir.workload import Uniform
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.simulator import price

TABLE5 = Path(__file__).parent / "data" / "zero_bubble_table5.json"
RECORDS = common.ROOT.parent / "shared" / "data" / "schedules.json"
CLOSE = 1e-3
"""Records are rounded to three decimals."""

BUILDING_BLOCKS = ("1f1b", "interleaved", "gis", "gis-h", "v-min", "v-half", "1f1b-v")
"""Families that must be built within ten seconds at p=64, m=256."""

PEAKS: Mapping[str, tuple[str, Callable[[int, int], float]]] = {
    "1f1b": ("p", lambda p, v: p),
    "interleaved": ("(vp + p - 1)/v", lambda p, v: (v * p + p - 1) / v),
    "zb-h1": ("p", lambda p, v: p),
    "zb-h2": ("2p - 1", lambda p, v: 2 * p - 1),
    "gis": ("p", lambda p, v: p),
    "gis-h": ("(ceil(p/2)(v-1) + p)/v", lambda p, v: ((p + 1) // 2 * (v - 1) + p) / v),
    "zb-v": ("p", lambda p, v: p),
    "v-half": ("(p+2)//2", lambda p, v: (p + 2) // 2),
    "v-min": ("(p+4)//3", lambda p, v: (p + 4) // 3),
    "1f1b-v": ("2p//3 + 1", lambda p, v: 2 * p // 3 + 1),
    "dualpipe-v": ("p + 1/2", lambda p, v: p + 0.5),
}
"""Peak as published, in microbatch-activations of a rank, by ranks and chunks."""

LIMITS: Mapping[str, Callable[[int], float]] = {"zb-1p": lambda p: p, "zb-2p": lambda p: 2 * p}
"""Families that promise a limit rather than a peak."""

RECORDED: Mapping[str, str] = {
    "1F1B": "1f1b", "Interleaved1F1B": "interleaved", "torch_Interleaved1F1B": "interleaved",
    "ZB-H1": "zb-h1", "ZB-H2": "zb-h2", "ZB-1p": "zb-1p", "ZB-2p": "zb-2p",
    "GIS": "gis", "sailGIS_g=p": "gis", "sailGIS-H_g=p/2": "gis-h", "sailPO_g=1": "po-f",
    "ZB-V": "zb-v", "torch_ZBVZeroBubble": "zb-v", "V-Half": "v-half", "V-Min": "v-min", "1F1B-V": "1f1b-v",
    "torch_DualPipeV_seqFB": "dualpipe-v", "torch_InterleavedZeroBubble": "gis",
}  # fmt: skip
"""The family that answers to a record's name, without its `_v4` and `[flash]`."""

LATE_WEIGHTS = ("torch_InterleavedZeroBubble",)
"""Records whose W runs late within a peak: the family is asked for the same with that peak as its memory limit."""


class Figures(NamedTuple):
    """What a schedule takes, in the units of the costs."""

    makespan: float
    stage_span: float
    peak: float


def measure(name: str, request: Request, *, copies: bool = True, released_at: Uniform | None = None) -> Figures:
    """Build and price; without copies to the host; with the memory of other costs than those it was built for."""
    schedule = build_schedule(name, request)
    if not copies:
        schedule = schedule.with_ranks([a for a in actions if a.is_compute] for actions in schedule.ranks)
    makespan, stage_span, peaks = price(schedule, released_at or request.workload)
    return Figures(makespan, stage_span, max(peaks))


def table5() -> Iterator[common.Json]:
    """One row per configuration: published and own rate of each of the six schedules."""
    for row in json.loads(TABLE5.read_text(encoding="utf-8"))["rows"]:
        ranks, microbatches, chunks = row["ranks"], row["microbatches"], row["interleaved_chunks"]
        hidden = row["hidden"]
        workload = Uniform(
            forward=row["forward"], backward=row["backward"], weight=row["weight"], comm=row["comm"],
            weight_grad=32 * hidden / (34 * hidden + 5 * row["heads"] * row["sequence"]),
        )  # fmt: skip
        once = workload.forward + workload.backward + workload.weight
        spans = {}
        for name in row["bubble_rates"]:
            request = Request(
                num_ranks=ranks, num_microbatches=microbatches, workload=workload,
                num_chunks=chunks if name == "interleaved" else 1,
            )  # fmt: skip
            spans[name] = measure(name, request).stage_span
        closed = (microbatches + (ranks - 1) / chunks) * once + ((2 * chunks - 1) * ranks - 2) * workload.comm
        rates = {name: round(1 - microbatches * once / span, 4) for name, span in spans.items()}
        yield {
            "model": row["model"], "ranks": ranks, "microbatches": microbatches, "published": row["bubble_rates"],
            "ours": {**rates, "interleaved": round(1 - microbatches * once / closed, 4)},
            "interleaved_simulated": rates["interleaved"],
        }  # fmt: skip


def chunk_choices(family: Family) -> tuple[int, ...]:
    """Two and four where a family works with any number."""
    return (family.min_chunks,) if family.max_chunks == family.min_chunks else (max(2, family.min_chunks), 4)


def peaks(most_ranks: int) -> Iterator[common.Json]:
    """One row per family and number of chunks: the peak for each number of ranks, and the published one."""
    for name, family in FAMILIES.items():
        for chunks in chunk_choices(family):
            ours, published = [], []
            for ranks in range(2, most_ranks + 1):
                request = Request(
                    num_ranks=ranks, num_microbatches=3 * ranks, num_chunks=chunks, workload=Uniform(offload=0.5)
                )  # fmt: skip
                ours.append(round(measure(name, request).peak, 6))
                if name in PEAKS:
                    published.append(round(PEAKS[name][1](ranks, chunks), 6))
            yield {
                "family": name, "chunks": chunks, "ranks": [2, most_ranks], "ours": ours,
                "published": published or None, "formula": PEAKS[name][0] if name in PEAKS else None,
                "limit": [LIMITS[name](ranks) for ranks in range(2, most_ranks + 1)] if name in LIMITS else None,
            }  # fmt: skip


def records() -> Iterator[common.Json]:
    """One row per record that a family answers to: the record's figures and ours."""
    content = json.loads(RECORDS.read_text(encoding="utf-8"))
    for record in content["records"]:
        name, _, accounting = record["schedule"].removesuffix("]").partition("[")
        family = RECORDED.get(name.removesuffix(f"_v{record['v']}"))
        if family is None or family not in FAMILIES:
            continue
        forward, backward, weight, comm = record["cost_values"]
        times = {"forward": forward, "backward": backward, "weight": weight, "comm": comm}
        request = Request(
            num_ranks=record["p"], num_microbatches=record["m"], num_chunks=record["v"],
            workload=Uniform(**times, weight_grad=content["meta"]["rho"][accounting or "full"]),
            memory_limit=record["peak_mem_MB"] if name.startswith(LATE_WEIGHTS) else None,
        )  # fmt: skip
        ours = measure(family, request, copies=False, released_at=Uniform(**times))
        theirs = Figures(record["makespan"], record["stage_span"], record["peak_mem_MB"])
        differences = [own - other for own, other in zip(ours, theirs, strict=True)]
        less, more = any(each < -CLOSE for each in differences), any(each > CLOSE for each in differences)
        yield {
            "record": record["schedule"], "family": family, "ranks": record["p"], "microbatches": record["m"],
            "costs": record["cost"], "recorded": theirs._asdict(), "ours": ours._asdict(),
            "verdict": "mixed" if less and more else "better" if less else "worse" if more else "equal",
            "slower": differences[0] > CLOSE or differences[2] > CLOSE,
        }  # fmt: skip


def summarise(rows: list[common.Json]) -> common.Json:
    """How many records are equal, better, mixed and worse, by name; and those rows that are not equal."""
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    for row in rows:
        count = counts.setdefault((row["record"], row["family"]), collections.Counter())
        count.update([row["verdict"], *(["slower"] if row["slower"] else [])])
    kinds = ("equal", "better", "mixed", "worse", "slower")
    return {
        "counts": [
            {"record": record, "family": family, **{kind: count[kind] for kind in kinds}}
            for (record, family), count in counts.items()
        ],
        "not_equal": [row for row in rows if row["verdict"] != "equal"],
    }


def generators(sizes: tuple[tuple[int, int], ...], patience: float) -> Iterator[common.Json]:
    """Processor seconds to build each family; a size is left out where the smaller one says it would take too long."""
    workload = Uniform(forward=11.347, backward=11.248, weight=8.132, comm=0.377, weight_grad=0.6, offload=4.0)
    for name, family in FAMILIES.items():
        for chunks in chunk_choices(family):
            seconds: dict[str, float | None] = {}
            last = (0.0, 1)
            for ranks, microbatches in sizes:
                size = ranks * microbatches * chunks
                key = f"{ranks}x{microbatches}"
                if last[0] * (size / last[1]) ** 1.5 > patience:
                    seconds[key] = None
                    continue
                request = Request(
                    num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks, workload=workload
                )  # fmt: skip
                begin = time.process_time()
                build_schedule(name, request)
                last = (time.process_time() - begin, size)
                seconds[key] = round(last[0], 3)
            yield {"family": name, "chunks": chunks, "seconds": seconds}


def targets(results: common.Json, sizes: tuple[tuple[int, int], ...]) -> list[common.Json]:
    """What was asked for, and whether it was met."""
    cells = [(row["published"][name], row["ours"][name]) for row in results["table5"] for name in row["published"]]
    right = sum(own == published for published, own in cells)
    off = [
        f"{row['family']} v={row['chunks']} p={ranks}: {own:g} for {published:g}"
        for row in results["peaks"]
        for ranks, (own, published) in enumerate(zip(row["ours"], row["published"] or (), strict=False), 2)
        if own > published + 1e-6
    ]
    over = [
        f"{row['family']} p={ranks}: {own:g}"
        for row in results["peaks"]
        for ranks, (own, limit) in enumerate(zip(row["ours"], row["limit"] or (), strict=False), 2)
        if own > limit + 1e-6
    ]
    found = [
        {"what": f"{len(cells)} bubble rates of Table 5 to 4 decimals", "reached": right, "met": right == len(cells)},
        {"what": "peaks not above the published ones, p = 2..16", "exceptions": off, "met": not off},
        {"what": "peaks within the promised limits", "exceptions": over, "met": not over},
    ]
    if results["records"] is not None:
        counts = results["records"]["counts"]
        worse = {row["record"]: row["mixed"] + row["worse"] for row in counts if row["mixed"] + row["worse"]}
        found.append({"what": "no record better in any figure", "exceptions": worse, "met": not worse})
        slower = {row["record"]: row["slower"] for row in counts if row["slower"]}
        found.append({"what": "no record better in makespan or peak", "exceptions": slower, "met": not slower})
    for (ranks, microbatches), most in zip(sizes, (2.0, 10.0), strict=False):
        times = {
            f"{row['family']} v={row['chunks']}": row["seconds"][f"{ranks}x{microbatches}"]
            for row in results["generators"]
            if most < 10 or row["family"] in BUILDING_BLOCKS
        }
        slow = {name: taken for name, taken in times.items() if taken is None or taken > most}
        found.append(
            {"what": f"p={ranks}, m={microbatches} within {most:g} s each", "exceptions": slow, "met": not slow}
        )
    return found


def show(results: common.Json) -> None:
    """The tables for people."""
    names = list(results["table5"][0]["published"])
    common.print_table(
        "Table 5 of 2401.10241, published / ours",
        ["model", "p", "m", *names],
        (
            [row["model"], row["ranks"], row["microbatches"]]
            + [f"{row['published'][name]:.4f}/{row['ours'][name]:.4f}" for name in names]
            for row in results["table5"]
        ),
    )
    low, high = results["peaks"][0]["ranks"]
    shown = [ranks for ranks in (2, 3, 4, 6, 8, 12, 16) if ranks <= high]
    common.print_table(
        "peak activation memory, in microbatches of a rank",
        ["family", "v", *(f"p={ranks}" for ranks in shown), "published"],
        (
            [row["family"], row["chunks"], *(f"{row['ours'][ranks - low]:g}" for ranks in shown), row["formula"] or "-"]
            for row in results["peaks"]
        ),
    )
    if results["records"] is not None:
        kinds = ("equal", "better", "mixed", "worse", "slower")
        common.print_table(
            "records of other generators",
            ["record", "family", *kinds],
            ([row["record"], row["family"], *(row[kind] for kind in kinds)] for row in results["records"]["counts"]),
        )
    sizes = list(results["generators"][0]["seconds"])
    common.print_table(
        "seconds to build",
        ["family", "v", *sizes],
        (
            [
                row["family"],
                row["chunks"],
                *("-" if row["seconds"][size] is None else row["seconds"][size] for size in sizes),
            ]
            for row in results["generators"]
        ),
    )
    print()
    for target in results["targets"]:
        print(f"  {'met   ' if target['met'] else 'NOT MET'}  {target['what']}")


def run(args: argparse.Namespace) -> common.Json:
    """All four parts."""
    sizes = ((4, 8), (4, 16)) if args.quick else ((16, 64), (64, 256))
    results: common.Json = {
        "table5": list(table5()),
        "peaks": list(peaks(4 if args.quick else 16)),
        "records": summarise(list(records())) if RECORDS.exists() and not args.quick else None,
        "generators": list(generators(sizes, args.patience)),
    }
    results["targets"] = targets(results, sizes)
    return results


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="SECONDS",
        help="leave out a size that would take longer to build (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    results = run(args)
    show(results)
    common.write(args.out, "schedules", args, results)


if __name__ == "__main__":
    main()
