"""From the `schedule` section of a configuration to a schedule that is known to run.

    plan_schedule(options, num_ranks=4, num_microbatches=16, num_chunks=2)

resolves what is `auto`, reads the files that are named, builds the schedule, and checks it from the definitions. What
cannot be had is refused here, before any rank has begun to communicate, with the nearest setting that can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from megamem.config import Scheduling
from megamem.errors import ConfigError, InfeasibleError, ScheduleError
from megamem.ir.schedule import SHAPES, Barriers, Placement, Schedule, Shape, parse_schedule
from megamem.ir.workload import HasCosts, PipelineCosts, Uniform, parse_costs
from megamem.planner.schedules.checker import check_schedule
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.passes import strip_communication
from megamem.planner.schedules.simulator import Simulation, simulate
from megamem.planner.schedules.vocabulary_passes import delayed, delays, insert_vocabulary
from megamem.yamlfile import read_mapping


@dataclass(frozen=True, kw_only=True)
class PlannedSchedule:
    """A checked schedule and what it is expected to cost, in the units of the costs that were given."""

    schedule: Schedule
    costs: PipelineCosts
    simulation: Simulation


class KeptLogits(NamedTuple):
    """A workload in which T does not make the logits again."""

    workload: HasCosts

    def costs(self, placement: Placement, *, sharded: bool = False) -> PipelineCosts:
        found = self.workload.costs(placement, sharded=sharded)
        share = found.vocabulary
        return found if share is None else replace(found, vocabulary=replace(share, recompute=0.0))


def default_schedule(num_chunks: int | None) -> Scheduling:
    """Megatron-Core's own order for this many chunks per rank, as a schedule that megamem runs."""
    return Scheduling(name="1f1b" if num_chunks in (None, 1) else "interleaved")


def plan_schedule(
    options: Scheduling,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int | None = None,
    num_layers: int | None = None,
    shapes: tuple[Shape, ...] = SHAPES,
    vocabulary: Barriers | None = None,
    keeps_logits: bool = False,
) -> PlannedSchedule:
    """The schedule that `options` ask for, on `num_ranks` pipeline ranks.

    num_chunks: chunks per rank of the model, where it is built already; None leaves it to the options
    num_layers: of the model, which chunks divide evenly; None where that is no matter
    shapes:     the placements that the model can still have
    vocabulary: barriers of vocabulary parallelism; None where the end stages have the embeddings
    keeps_logits: with vocabulary parallelism, whether T finds the logits that S has made

    Raises InfeasibleError where there is no such schedule, ScheduleError where a schedule of the user's own is wrong,
    ConfigError where a file is not what it should be.
    """
    limit = memory_limit(options)
    request = Request(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        group=None if options.group == "auto" else options.group,
        workload=KeptLogits(load_workload(options.costs)) if keeps_logits else load_workload(options.costs),
        memory_limit=limit,
        vocabulary=vocabulary,
    )
    if options.name == "file":
        schedule = _with_passes(_read(options.file, num_ranks, num_microbatches), request)
    elif options.name == "auto" and vocabulary is not None:
        raise InfeasibleError("schedule auto places no vocabulary passes; nearest: schedule gis (or 1f1b, v-half, ...)")
    elif options.name == "auto":
        schedule = _search(request, _possible_chunks(options, num_ranks, num_chunks, num_layers), shapes)
    else:
        chunks = _chosen_chunks(options, num_chunks) or FAMILIES[options.name].default_chunks
        _check_division(num_layers, num_ranks, chunks)
        schedule = build_schedule(options.name, request.with_chunks(chunks))
    if num_chunks is not None and schedule.placement.num_chunks != num_chunks:
        raise InfeasibleError(
            f"schedule {schedule.name} has {schedule.placement.num_chunks} chunks per rank, the model {num_chunks}; "
            f"build the model with virtual_pipeline_model_parallel_size {schedule.placement.num_chunks}"
        )
    if schedule.placement.shape not in shapes:
        raise InfeasibleError(
            f"schedule {schedule.name} has the placement {schedule.placement.shape}, the model has not"
        )
    costs = request.costs(schedule.placement)
    check_schedule(schedule, costs=costs, memory_limit=limit)
    return PlannedSchedule(schedule=schedule, costs=costs, simulation=simulate(schedule, costs))


def _chosen_chunks(options: Scheduling, built: int | None) -> int | None:
    """Chunks per rank, where the model or the options settle it."""
    wanted = None if options.chunks == "auto" else options.chunks
    if built is not None and wanted not in (None, built):
        raise InfeasibleError(f"schedule.chunks is {wanted}, and the model has {built} chunks per rank")
    return wanted if built is None else built


def _check_division(num_layers: int | None, num_ranks: int, chunks: int) -> None:
    stages = num_ranks * chunks
    if num_layers is not None and num_layers % stages:
        nearest = max(1, round(num_layers / stages)) * stages
        raise InfeasibleError(
            f"{num_layers} layers cannot be divided by {num_ranks} pipeline ranks x {chunks} chunks = {stages} stages; "
            f"nearest: {nearest} layers"
        )


def _possible_chunks(
    options: Scheduling, num_ranks: int, built: int | None, num_layers: int | None
) -> tuple[int, ...] | None:
    """The numbers of chunks per rank that `auto` may choose from; None where there is no restriction."""
    chosen = _chosen_chunks(options, built)
    if chosen is not None:
        _check_division(num_layers, num_ranks, chosen)
        return (chosen,)
    if num_layers is None:
        return None
    _check_division(num_layers, num_ranks, 1)
    return tuple(count for count in range(1, num_layers // num_ranks + 1) if num_layers % (num_ranks * count) == 0)


def memory_limit(options: Scheduling) -> float | None:
    """The limit in the unit of the costs' activations; None for none. Raises ConfigError for bytes without costs."""
    if options.memory_limit == "auto":
        return None
    if isinstance(options.memory_limit, int) and options.costs == "none":
        raise ConfigError(
            f"schedule.memory_limit: {options.memory_limit} bytes cannot be compared with activations that are not "
            "given in bytes; give schedule.costs (megamem profile writes them), or the limit as a number of "
            "microbatch activations, such as 4"
        )
    return float(options.memory_limit)


def load_workload(path: str) -> HasCosts:
    """The costs in a file, or equal stages for `none`. Raises ConfigError that names the file and the entry."""
    if path == "none":
        return Uniform()
    try:
        return parse_costs(read_mapping(Path(path)))
    except ScheduleError as fault:
        raise ConfigError(f"{path}: {fault}") from None


def load_schedule(path: str) -> Schedule:
    """A schedule from its text form. Raises ConfigError that names the file and the line."""
    try:
        return parse_schedule(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from None
    except ScheduleError as fault:
        raise ConfigError(f"{path}: {fault}") from None


def _read(path: str, num_ranks: int, num_microbatches: int) -> Schedule:
    schedule = strip_communication(load_schedule(path))
    there, here = (schedule.placement.num_ranks, schedule.num_microbatches), (num_ranks, num_microbatches)
    if there != here:
        raise InfeasibleError(
            f"{path}: written for {there[0]} ranks and {there[1]} microbatches, this run has {here[0]} and {here[1]}"
        )
    return schedule


def _with_passes(schedule: Schedule, request: Request) -> Schedule:
    """A schedule of the user's with vocabulary passes, its own or inserted ones, if they are wanted."""
    if schedule.shards_vocabulary:
        if (schedule.barriers or 1) != request.vocabulary:
            wanted = "no vocabulary parallelism" if request.vocabulary is None else f"{request.vocabulary} barrier(s)"
            raise InfeasibleError(f"schedule {schedule.name} has {schedule.barriers or 1} barrier(s), the run {wanted}")
        return schedule
    if request.vocabulary is None:
        return schedule
    fitting = request.with_chunks(schedule.placement.num_chunks)
    return insert_vocabulary((delayed(schedule, forwards) for forwards in delays(fitting)), fitting)


def _search(request: Request, chunk_counts: tuple[int, ...] | None, shapes: tuple[Shape, ...]) -> Schedule:
    from megamem.planner.schedules.search import CHUNK_COUNTS, search

    # Whether activations go to host memory is the user's to say: it takes memory and links that no cost speaks of.
    families = [name for name, family in FAMILIES.items() if not family.offloads]
    counts = chunk_counts or CHUNK_COUNTS
    return search(request, families=families, chunk_counts=counts, placements=shapes).schedule
