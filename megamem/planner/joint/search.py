"""All layouts of a number of GPUs, best first; and the two inverse questions.

Each layout has a bound that no schedule can undercut: the work of its busiest rank, the shortest warm-up that chunks
allow, and what its optimizer and gradient reduction show. Layouts are estimated in the order of this bound until it
exceeds the best estimate; the best few are then planned in full. So nothing is left out but what cannot win.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megamem.errors import InfeasibleError
from megamem.ir.job import Job, Layout
from megamem.ir.pipeline_split import Split
from megamem.planner.evaluation import Model
from megamem.planner.hardware import Hardware
from megamem.planner.joint import shortage
from megamem.planner.joint.layout import STOCK, LayoutPlan, Wishes, plan_layout, with_tiles
from megamem.planner.joint.quick import Quick
from megamem.planner.joint.split import laid_out, possible_chunks
from megamem.planner.schedules.families import FAMILIES

MICRO_BATCHES = (1, 2, 4, 8)
_TO_PLAN, _MOST_TO_PLAN = 2, 16  # layouts that are planned in full, and tried
_LEAST_STEP = 1024  # tokens: the longest sequence is found to within so many


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Sizes of the layout that the user settled; None leaves them to the search.

    split: of the layers, with the pipeline and chunks that it is for; empty: as `joint.split` has it
    """

    tensor: int | None = None
    context: int | None = None
    pipeline: int | None = None
    chunks: int | None = None
    expert: int | None = None
    micro_batch_size: int | None = None
    split: Split = ()

    @property
    def settles_all(self) -> bool:
        """Whether there is one layout only."""
        return None not in (self.tensor, self.context, self.pipeline, self.expert, self.micro_batch_size)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: the plans in full, the best first, and how many layouts there were."""

    plans: tuple[LayoutPlan, ...]
    layouts: int
    estimated: int


def layouts_of(job: Job, gpus: int, hardware: Hardware, fixed: Fixed) -> Iterator[Job]:
    """Every way to lay the job out that Megatron-Core would run: the job's own layout is not looked at."""
    for tensor in _sizes(fixed.tensor, min(hardware.node, gpus)):
        for pipeline in _sizes(fixed.pipeline, min(gpus // tensor, job.model.num_layers), any_size=True):
            if gpus % (tensor * pipeline):
                continue
            for context in _sizes(fixed.context, gpus // (tensor * pipeline)):
                data, rest = divmod(gpus, tensor * pipeline * context)
                if not rest:
                    yield from _completed(job, tensor, pipeline, context, data, fixed)


def runs_schedule(job: Job, wishes: Wishes) -> bool:
    """Whether the layout has a pipeline, and layers, for the schedule that was asked for."""
    if wishes.schedule in ("auto", STOCK):
        return True
    family = FAMILIES[wishes.schedule]
    return job.layout.pipeline > 1 and any(
        chunks >= family.min_chunks and (family.max_chunks is None or chunks <= family.max_chunks)
        for chunks in possible_chunks(job)
    )


def _completed(job: Job, tensor: int, pipeline: int, context: int, data: int, fixed: Fixed) -> Iterator[Job]:
    """The layouts with these sizes: experts and microbatches."""
    experts = job.model.experts
    most = 1 if experts is None else min(experts.num_experts, data * context * tensor)
    for expert in _sizes(fixed.expert, most):
        for micro in (fixed.micro_batch_size,) if fixed.micro_batch_size else MICRO_BATCHES:
            layout = Layout(
                tensor=tensor,
                sequence_parallel=tensor > 1,
                context=context,
                pipeline=pipeline,
                chunks=fixed.chunks or 1,
                expert=expert,
                expert_tensor=1 if experts is not None and tensor > 1 else 0,
                data=data,
                distributed_optimizer=job.layout.distributed_optimizer,
                split=fixed.split,
            )
            found = laid_out(replace(job, layout=layout, micro_batch_size=micro), layout.chunks)
            if not found.problems():
                yield found


def _sizes(fixed: int | None, most: int, *, any_size: bool = False) -> tuple[int, ...]:
    if fixed is not None:
        return (fixed,)
    if any_size:
        return tuple(range(1, most + 1))
    return tuple(1 << power for power in range(most.bit_length()) if 1 << power <= most)


def search(
    job: Job,
    gpus: int,
    hardware: Hardware,
    wishes: Wishes,
    fixed: Fixed,
    progress: Callable[[str], None] = lambda text: None,
) -> Found:
    """The fastest layouts for the job on `gpus` GPUs. Raises InfeasibleError where none fits, with the nearest."""
    jobs = [one for one in layouts_of(job, gpus, hardware, fixed) if runs_schedule(one, wishes)]
    if not jobs:
        raise InfeasibleError(_no_layout(job, gpus, fixed, wishes))
    ranking = _Ranking(jobs, hardware, wishes, progress)
    plans: list[LayoutPlan] = []
    fault = ""
    for tried, one in enumerate(ranking, start=1):
        try:
            plans.append(plan_layout(one, hardware, wishes, progress))
        except InfeasibleError as error:
            fault = fault or str(error)
        if len(plans) == _TO_PLAN or tried == _MOST_TO_PLAN:
            break
    if not plans:
        plans = _leanest_plans(jobs, gpus, hardware, wishes, fault or ranking.fault)
    plans.sort(key=lambda plan: plan.best.priced.step_seconds)
    return Found(plans=tuple(plans), layouts=len(jobs), estimated=ranking.estimated)


def _leanest_plans(jobs: Sequence[Job], gpus: int, hardware: Hardware, wishes: Wishes, fault: str) -> list[LayoutPlan]:
    """Plans of layouts that fit with sparse residuals alone, which no quick estimate knows. Raises InfeasibleError."""
    short = shortage.shortages(jobs, hardware, wishes)
    plans: list[LayoutPlan] = []
    for one in short[:_MOST_TO_PLAN]:
        if one.missing <= 0 and len(plans) < _TO_PLAN:
            try:
                plans.append(plan_layout(one.job, hardware, wishes))
            except InfeasibleError as error:
                fault = str(error)
    if plans:
        return plans
    why = fault or "no schedule can be built for any of them"
    if short and short[0].missing > 0:
        why = f"the nearest, {short[0].text()}"
    raise InfeasibleError(f"no layout of {gpus} GPUs fits ({len(jobs)} tried): {why}")


class _Ranking:
    """Layouts in the order of their estimates, no more of them estimated than that takes.

    fault:      why the first that has no estimate has none
    estimated:  how many were estimated so far
    """

    def __init__(
        self, jobs: Sequence[Job], hardware: Hardware, wishes: Wishes, progress: Callable[[str], None]
    ) -> None:
        self._jobs, self._hardware, self._wishes, self._progress = jobs, hardware, wishes, progress
        self.fault, self.estimated = "", 0

    def __iter__(self) -> Iterator[Job]:
        bounds = (Quick(_model(one, self._hardware, self._wishes)).bound() for one in self._jobs)
        queue = sorted((bound, number) for number, bound in enumerate(bounds) if bound < float("inf"))
        found: list[tuple[float, int]] = []  # estimated, as a heap
        for least, number in queue:
            while found and found[0][0] <= least:
                yield self._jobs[heapq.heappop(found)[1]]
            self.estimated += 1
            self._progress(
                f"{self._jobs[number].layout.text()} ({self.estimated} of at most {len(self._jobs)} layouts)"
            )
            seconds, why = _estimate(self._jobs[number], self._hardware, self._wishes)
            self.fault = self.fault or why
            if seconds < float("inf"):
                heapq.heappush(found, (seconds, number))
        while found:
            yield self._jobs[heapq.heappop(found)[1]]


def _estimate(job: Job, hardware: Hardware, wishes: Wishes) -> tuple[float, str]:
    """The estimate of a layout, and why it has none."""
    try:
        return Quick(_model(job, hardware, wishes)).seconds(wishes), ""
    except InfeasibleError as fault:
        tiled = with_tiles(job, wishes)
        return (float("inf"), f"{job.layout.text()}: {fault}") if tiled is None else _estimate(job, hardware, tiled)


def _model(job: Job, hardware: Hardware, wishes: Wishes) -> Model:
    return Model(job, hardware, wishes.device, wishes.options)


def _no_layout(job: Job, gpus: int, fixed: Fixed, wishes: Wishes) -> str:
    if wishes.schedule not in ("auto", STOCK):
        family = FAMILIES[wishes.schedule]
        chunks = "" if family.min_chunks == 1 else f" of {family.min_chunks} chunks or more"
        return (
            f"--schedule {wishes.schedule} needs two pipeline ranks or more, with layers for each{chunks}, and no such "
            f"layout of {gpus} GPUs is possible; give --pipeline-model-parallel-size, or leave --schedule out"
        )
    sizes = {name: size for name, size in vars(fixed).items() if size not in (None, ())}
    given = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "any layout"
    layout = Layout(**{name: size for name, size in sizes.items() if name != "micro_batch_size"})
    unit = layout.tensor * layout.pipeline * layout.context
    data, rest = divmod(gpus, unit)
    if rest or not data:
        return f"{gpus} GPUs cannot hold {given}; use a multiple of {unit}"
    tried = replace(
        job,
        layout=replace(layout, data=data, sequence_parallel=layout.tensor > 1),
        micro_batch_size=fixed.micro_batch_size or 1,
    )
    problems = tried.problems() or ["no division of the ranks works"]
    return f"{gpus} GPUs, {given}: " + "; ".join(problems)


def longest_sequence(
    job: Job,
    gpus: int,
    hardware: Hardware,
    wishes: Wishes,
    fixed: Fixed,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[int, LayoutPlan]:
    """The longest sequence that fits, and its plan; the batch keeps its number of sequences."""

    def plan(length: int) -> LayoutPlan | None:
        progress(f"{length} tokens")
        return _leanest(replace(job, seq_length=length), gpus, hardware, wishes, fixed)

    low, high, found = 0, 2 * _LEAST_STEP, None
    while (better := plan(high)) is not None:
        low, high, found = high, 2 * high, better
        if high > 1 << 30:
            break
    while high - low > max(_LEAST_STEP, low // 64):
        middle = (low + high) // 2 // _LEAST_STEP * _LEAST_STEP
        better = plan(middle)
        low, high, found = (middle, high, better) if better is not None else (low, middle, found)
    if found is None:
        raise InfeasibleError(f"not even {2 * _LEAST_STEP} tokens fit on {gpus} GPUs; use more of them")
    return low, found


def fewest_gpus(
    job: Job, hardware: Hardware, wishes: Wishes, fixed: Fixed, progress: Callable[[str], None] = lambda text: None
) -> tuple[int, LayoutPlan]:
    """The fewest GPUs, a power of two or whole nodes, on which the job fits, and its plan."""
    counts = [1 << power for power in range(4)] + [
        8 * count for count in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    ]
    for gpus in counts:
        progress(f"{gpus} GPUs")
        found = _leanest(job, gpus, hardware, wishes, fixed)
        if found is not None:
            return gpus, found
    raise InfeasibleError(f"the job does not fit on {counts[-1]} GPUs")


def _leanest(job: Job, gpus: int, hardware: Hardware, wishes: Wishes, fixed: Fixed) -> LayoutPlan | None:
    """A plan of the layouts that need least memory, if there is one: most model parallelism first."""
    jobs = sorted(
        (
            one
            for one in layouts_of(job, gpus, hardware, replace(fixed, micro_batch_size=fixed.micro_batch_size or 1))
            if runs_schedule(one, wishes)
        ),
        key=lambda one: (one.layout.data, -one.layout.sequence_shards, one.layout.pipeline),
    )
    for one in jobs[:24]:
        if _estimate(one, hardware, wishes)[0] == float("inf"):
            continue
        try:
            return plan_layout(one, hardware, wishes)
        except InfeasibleError:
            continue
    return None
