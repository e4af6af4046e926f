"""A plan of a real model, priced by the planner's own cost model, for tests of what is drawn of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from megamem import __version__
from megamem.config import Config, load_config
from megamem.ir.job import Job, Layout
from megamem.ir.plan import Alternative, Decision, MadeFor, Plan, Prediction, Span, Utilization, digest
from megamem.ir.schedule import Schedule
from megamem.ir.what_if import Cell, WhatIf
from megamem.planner.activations import plan_activations
from megamem.planner.evaluation import Model, Priced, Setup, with_timelines
from megamem.planner.hardware import load_hardware
from megamem.planner.models.presets import load_model
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request

RANKS, MICROBATCHES, SEQUENCE = 4, 8, 32768
SETTINGS = {
    "activations": {"policy": "memo"},
    "schedule": {"name": "gis-h", "chunks": 2},
    "vocabulary": {"fused_loss": True},
}


def schedule(name: str, chunks: int) -> Schedule:
    return build_schedule(name, Request(num_ranks=RANKS, num_microbatches=MICROBATCHES, num_chunks=chunks))


def price(name: str, chunks: int, policy: str, sequence: int = SEQUENCE) -> tuple[Job, Priced]:
    """Llama-3-8B on 16 H100s, with a schedule and an activation policy."""
    layout = Layout(tensor=4, sequence_parallel=True, pipeline=RANKS, chunks=chunks)
    job = Job(model=load_model("llama3-8b"), layout=layout, seq_length=sequence, global_batch_size=MICROBATCHES)
    options = load_config({"activations": {"policy": policy}}).activations
    plan = plan_activations(options, job.model.num_layers) if policy != "off" else None
    setup = Setup(schedule=schedule(name, chunks), plan=plan, fused_loss=True)
    return job, Model(job, load_hardware("h100")).price(setup)


def alternative(name: str, chunks: int, policy: str) -> Alternative:
    _, priced = price(name, chunks, policy)
    return Alternative(
        name=f"{name}, {policy}",
        step_seconds=priced.step_seconds,
        peak_memory=priced.peak,
        host_memory=priced.host,
        fits=all(rank.peak <= rank.limit for rank in priced.memory),
        verdict="slower <by> a little & not smaller",
    )


@cache
def sample(name: str = "sample") -> Config:
    """The plan, in its configuration."""
    job, priced = price("gis-h", 2, "memo")
    job = replace(job, model=replace(job.model, name=name))
    front = (alternative("gis-h", 2, "recompute"), alternative("interleaved", 2, "recompute"))
    predicted = Prediction(
        step_seconds=priced.step_seconds,
        utilization=Utilization(
            mfu=0.4125, formula="6 N tokens + 6 L h s", model_flops=1e18, peak_flops_per_gpu=9.89e14
        ),
        tokens_per_second_per_gpu=MICROBATCHES * SEQUENCE / priced.step_seconds / 16,
        time=priced.time,
        traffic=priced.traffic,
        memory=with_timelines(priced),
        decisions=(
            Decision(
                subject="attention_output", layers="1-30", fate="swap", nbytes=1 << 27, seconds=0.012, reason="dear"
            ),
            Decision(
                subject="fc1", layers="1-30", fate="swap", fraction=0.62, nbytes=1 << 26, hidden=False, reason="half"
            ),
            Decision(subject="schedule.name", fate="gis-h", reason="least memory & fast enough"),
        ),
        alternatives=(alternative("1f1b", 1, "off"), alternative("zb-h1", 1, "ordered")),
        front=tuple(sorted(front, key=lambda one: one.peak_memory)),
        hardware="h100",
        pipeline=tuple(_spans(priced, rank) for rank in range(RANKS)),
        notes=("Contention is not counted.",),
    )
    settings = load_config(SETTINGS)
    made_for = MadeFor(job=job, megamem=__version__, hardware="h100", settings=digest(settings.settings()))
    return replace(settings, plan=Plan(made_for=made_for, predicted=predicted))


def _spans(priced: Priced, rank: int) -> str:
    timeline = [timed for timed in priced.simulation.timeline() if timed.rank == rank and timed.end > timed.start]
    return " ".join(
        str(Span(kind=t.action.kind, microbatch=t.action.microbatch, chunk=t.action.chunk, start=t.start, end=t.end))
        for t in timeline
    )


@cache
def grid() -> WhatIf:
    """Other sequence lengths and amounts of host memory: what the schedule and the policy take there."""
    lengths, memories = (16384, SEQUENCE, 65536, 262144), (1 << 34, 1 << 36, 1 << 38)
    cells = []
    for sequence in lengths:
        _, priced = price("gis-h", 2, "memo", sequence)
        cells.append([_cell(priced, host, sequence) for host in memories])
    return WhatIf(seq_lengths=lengths, host_memories=memories, cells=cells, at=(1, 2))


def _cell(priced: Priced, host: int, sequence: int) -> Cell:
    return Cell(
        fits=priced.fits(host),
        step_seconds=priced.step_seconds,
        peak_memory=priced.peak,
        host_memory=priced.host,
        tokens_per_second_per_gpu=MICROBATCHES * sequence / priced.step_seconds / 16,
        mfu=0.4,
        choice="gis-h, memo",
    )
