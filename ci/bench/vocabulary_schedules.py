"""What vocabulary parallelism is worth: iteration time against the size of the vocabulary, with and without it.

    python ci/bench/vocabulary_schedules.py --out ci/bench/results/vocabulary_schedules.cpu.json

The models of arXiv 2411.05288, tables 5 and 6, with vocabularies of 32k to 256k; figures of the simulator, exact and
the same on every machine, but for `seconds`. Every schedule is checked. A row has, for the same work:

* `published`: the speed of the paper's measurements, as a share of that with the smallest vocabulary (MFU / MFU at 32k)
* `baseline`: the schedule with the output layer on the last stage; `vocab-1`, `vocab-2`: shared, 2 and 1 barriers
* `speed`: model FLOPs per time, as a share of what p ranks without any idle time or recomputation would reach
* `flatness`: time per model FLOP over that with the smallest vocabulary: 1 is flat, 2 is half the speed
* `overhead`: iteration time over the work of a rank, recomputation included: what the schedule itself loses
* `peak`: the most activation memory of a rank, in microbatches of a rank; `extra` over that of the baseline

`recomputed: true` counts four GEMMs per microbatch, as megamem by default, which makes the logits again; `false` counts
three, as with vocabulary.keep_logits, and as the paper's code, which keeps the softmax. Peaks count what is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from common import Json, argument_parser, print_table, write

from megamem.ir.schedule import Barriers, Schedule
from megamem.ir.workload import PipelineCosts, StageCost, VocabularyCost, Workload
from megamem.planner.schedules.checker import check_schedule
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.simulator import simulate

FLOPS = 140e12  # per second: what large GEMMs reach on an A100, of the 312e12 on paper
BANDWIDTH = 20e9  # bytes per second of a hop, and of a pipelined broadcast or reduce
ELEMENT = 2  # bytes of bf16

MICROBATCHES = 128  # per step, as in the paper
VOCABULARIES = tuple(size * 1024 for size in (32, 64, 128, 256))


class Model(NamedTuple):
    """A model of the paper. `published` is the MFU of its baseline for the four vocabularies; None: out of memory."""

    name: str
    family: str
    ranks: int
    chunks: int
    hidden: int
    layers: int
    sequence: int
    published: tuple[float | None, ...]


PAPER = (
    Model("4B", "1f1b", 8, 1, 3072, 32, 2048, (46.16, 40.48, 33.11, 25.23)),
    Model("10B", "1f1b", 16, 1, 4096, 48, 4096, (47.56, 41.21, 33.88, 25.33)),
    Model("21B", "1f1b", 32, 1, 5120, 64, 4096, (43.68, 38.11, 30.05, 21.63)),
    Model("7B", "v-half", 16, 2, 4096, 32, 4096, (50.01, 41.17, 31.36, 21.90)),
    Model("30B", "v-half", 32, 2, 6144, 64, 4096, (56.06, 48.17, 37.85, None)),
)
OTHERS = (
    Model("4B", "interleaved", 8, 2, 3072, 32, 2048, ()),
    Model("4B", "gis", 8, 4, 3072, 32, 2048, ()),
    Model("4B", "gis-h", 8, 4, 3072, 32, 2048, ()),
    Model("4B", "v-half", 8, 2, 3072, 32, 2048, ()),
)


def workload(model: Model, vocabulary: int) -> Workload:
    """Times in milliseconds, memory in bytes, of one microbatch of one sequence (2411.05288, table 2; 2401.10241)."""
    tokens, hidden = model.sequence, model.hidden
    linear, attention = 24 * tokens * hidden**2 / FLOPS * 1e3, 4 * tokens**2 * hidden / FLOPS * 1e3
    gemm = 2 * tokens * hidden * vocabulary / FLOPS * 1e3
    activation, kept_by_b = 34 * tokens * hidden, 32 * tokens * hidden
    hop = ELEMENT * tokens * hidden / BANDWIDTH * 1e3
    lookup = 3 * tokens * hidden / FLOPS * 1e3
    return Workload(
        layers=(
            StageCost(
                forward=linear + attention, backward=linear + 2 * attention, weight=linear,
                activation=activation, weight_grad=kept_by_b,
            ),
        ) * model.layers,
        first=StageCost(forward=lookup, backward=0.0, weight=lookup, activation=0.0, weight_grad=0.0),
        last=StageCost(forward=gemm, backward=gemm, weight=gemm, activation=0.0, weight_grad=0.0),
        comm=hop, kept=tokens * (ELEMENT * hidden + 12.0),
    )  # fmt: skip


def share_of(
    costs: PipelineCosts, model: Model, vocabulary: int, barriers: Barriers, recomputed: bool
) -> VocabularyCost:
    """What a rank does of the embeddings, and what S leaves for T.

    The numerator in fp32 where S makes the gradient, and the logits in bf16 where they are not made again.
    """
    assert costs.vocabulary is not None  # they are sharded
    kept = costs.vocabulary.kept
    if barriers == 1:
        kept += 4.0 * model.sequence * model.hidden
    if not recomputed:
        kept += ELEMENT * model.sequence * vocabulary / model.ranks
    return replace(costs.vocabulary, kept=kept, recompute=None if recomputed else 0.0)


def price(schedule: Schedule, costs: PipelineCosts, model_seconds: float, rank_seconds: float) -> Json:
    """The figures of a checked schedule. Both amounts of work are per rank and step."""
    check_schedule(schedule)
    simulation = simulate(schedule, costs)
    placement, stages = schedule.placement, costs.stages
    microbatch = sum(stages[placement.stage(0, chunk)].activation for chunk in range(placement.num_chunks))
    return {
        "makespan_ms": simulation.makespan,
        "speed": model_seconds / simulation.makespan,
        "overhead": simulation.makespan / rank_seconds,
        "peak": max(simulation.peak_activation) / microbatch,
    }


def measure(model: Model, microbatches: int, vocabulary: int, recomputed: bool) -> Json:
    """Baseline and both algorithms for one vocabulary."""
    given = workload(model, vocabulary)
    request = Request(
        num_ranks=model.ranks, num_microbatches=microbatches, num_chunks=model.chunks, workload=given
    )  # fmt: skip
    base = build_schedule(model.family, request)
    whole = given.costs(base.placement)
    work = microbatches / model.ranks * sum(stage.total for stage in whole.stages)
    row: Json = {"baseline": price(base, whole, work, work)}
    sharded = given.costs(base.placement, sharded=True)
    for name, barriers in (("vocab-1", 2), ("vocab-2", 1)):
        share = share_of(sharded, model, vocabulary, barriers, recomputed)  # type: ignore[arg-type]
        costs = replace(sharded, vocabulary=share)
        begin = time.process_time()
        schedule = build_schedule(model.family, replace(request, workload=costs, vocabulary=barriers))
        seconds = time.process_time() - begin
        passes = sum(share.seconds(kind, barriers) for kind in ("S", "T", "IF", "IB"))  # type: ignore[arg-type]
        executed = microbatches * (sum(stage.total for stage in costs.stages) / model.ranks + passes)
        row[name] = price(schedule, costs, work, executed) | {"seconds": round(seconds, 2)}
        row[name]["extra"] = row[name]["peak"] - row["baseline"]["peak"]
        microbatch = sum(stage.activation for stage in sharded.stages) / model.ranks
        row[name]["allowed"] = barriers + (barriers + 1) * share.kept / microbatch
    return row


def cells(models: tuple[Model, ...], microbatches: int, vocabularies: tuple[int, ...]) -> Iterator[Json]:
    """One row per model, way of counting and vocabulary."""
    for model in models:
        for recomputed in (False, True):
            first: Json | None = None
            for vocabulary in vocabularies:
                row = measure(model, microbatches, vocabulary, recomputed)
                first = first or row
                for name, figures in row.items():
                    figures["flatness"] = first[name]["speed"] / figures["speed"]
                mfu = model.published[VOCABULARIES.index(vocabulary)] if model.published else None
                reference = model.published[VOCABULARIES.index(vocabularies[0])] if model.published else None
                yield {
                    "model": model.name, "family": model.family, "ranks": model.ranks, "chunks": model.chunks,
                    "microbatches": microbatches, "vocabulary": vocabulary, "recomputed": recomputed,
                    "published": mfu / reference if mfu is not None and reference is not None else None, **row,
                }  # fmt: skip


def targets(rows: list[Json]) -> list[Json]:
    """What was asked for, and whether it was met."""
    names = ("vocab-1", "vocab-2")

    def said(row: Json, name: str) -> str:
        gemms = "4 GEMMs" if row["recomputed"] else "3 GEMMs"
        return f"{row['model']} {row['family']} {row['vocabulary'] // 1024}k {name} {gemms}"

    def grown(recomputed: bool) -> tuple[float, list[str]]:
        found = {
            said(row, name): row[name]["flatness"] for row in rows if row["recomputed"] == recomputed for name in names
        }
        over = [f"{where}: {value - 1:.1%}" for where, value in found.items() if value > 1.02]
        return max(found.values(), default=1.0), over

    judged = []
    for recomputed, how in ((False, "logits kept from S to T"), (True, "logits made again, a fourth GEMM")):
        most, exceptions = grown(recomputed)
        judged.append(
            {
                "what": f"time per model FLOP grows by at most 2 % from 32k to 256k words, {how}: {most - 1:.1%}",
                "exceptions": exceptions, "met": not exceptions,
            }
        )  # fmt: skip
    full = {
        said(row, name): [row[name]["extra"], row[name]["allowed"]]
        for row in rows for name in names if row[name]["extra"] > row[name]["allowed"] * 1.001
    }  # fmt: skip
    lost = {
        said(row, "baseline"): [1 / row["baseline"]["flatness"], row["published"]]
        for row in rows if row["published"] is not None
    }  # fmt: skip
    off = {where: pair for where, pair in lost.items() if abs(pair[0] / pair[1] - 1) > 0.05}
    return [
        *judged,
        {
            "what": "peak at most 2 (vocab-1) or 1 (vocab-2) microbatches above the baseline, and what S keeps",
            "exceptions": full, "met": not full,
        },
        {"what": "the baseline loses as published, within 5 %", "exceptions": off, "met": not off},
    ]  # fmt: skip


def show(results: Json) -> None:
    """The table for people."""
    names = ("baseline", "vocab-1", "vocab-2")
    print_table(
        "speed (share of ideal) and peak (microbatches of a rank)",
        ["model", "family", "p", "vocabulary", "GEMMs", "published", *names, "flatness 1/2", "peaks"],
        (
            [
                row["model"], row["family"], row["ranks"], f"{row['vocabulary'] // 1024}k",
                4 if row["recomputed"] else 3, "-" if row["published"] is None else f"{row['published']:.3f}",
                *(f"{row[name]['speed']:.3f}" for name in names),
                "/".join(f"{row[name]['flatness']:.3f}" for name in names[1:]),
                "/".join(f"{row[name]['peak']:.2f}" for name in names),
            ]
            for row in results["rows"]
        ),
    )  # fmt: skip
    print()
    for target in results["targets"]:
        print(f"  {'met   ' if target['met'] else 'NOT MET'}  {target['what']}")


def run(args: argparse.Namespace) -> Json:
    """All rows."""
    models = (*PAPER, *OTHERS) if not args.quick else (PAPER[0], OTHERS[1])
    vocabularies = VOCABULARIES if not args.quick else VOCABULARIES[::3]
    rows = list(cells(models, MICROBATCHES, vocabularies))
    return {"rows": rows, "targets": targets(rows)}


def main() -> None:
    """Run and write."""
    args = argument_parser(__doc__ or "").parse_args()
    results = run(args)
    show(results)
    write(args.out, "vocabulary_schedules", args, results)


if __name__ == "__main__":
    main()
