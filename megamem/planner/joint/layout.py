"""One layout: its schedules and settings ranked by an estimate, the best of them settled, and what lost.

Every setting that the runtime has is weighed: the schedule with its chunks, the output layer whole or fused with its
loss, the allocator, and for each of these the exact optimum of the activations. The estimate that ranks them is the
simulator's on a few microbatches with the optimum's recomputation; only the first few are priced in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from megamem.errors import InfeasibleError, MegamemError
from megamem.ir.activation import ActivationPlan
from megamem.ir.job import Job
from megamem.ir.schedule import Barriers, Schedule
from megamem.ir.workload import HasCosts, StageCost, Uniform, Workload
from megamem.planner.activations import plan_activations
from megamem.planner.costs.work import layer_work, output_flops
from megamem.planner.evaluation import Model, Priced
from megamem.planner.hardware import Hardware
from megamem.planner.joint.settle import Frame, Settled, estimate, job_text, settle
from megamem.planner.joint.simple import ONE_FRACTION, with_fraction
from megamem.planner.joint.split import laid_out, possible_chunks
from megamem.planner.layer_options import STOCK_LAYERS, LayerOptions
from megamem.planner.memory.device import output_bytes
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.plan import KeptLogits
from megamem.sections import Activations, Mlp

STOCK = "off"
FAMILIES_TRIED = ("gis", "gis-h", "zb-h1", "zb-h2", "v-half")
"""Schedules that are weighed beside Megatron's own (1f1b, interleaved). Left out are those that another one is never
worse than in memory and time (1f1b-v, dualpipe-v, v-min), and those whose order a search finds (zb-v, auto ...)."""
_SHARE_VOCABULARY = (STOCK, "gis")
"""Schedules with which vocabulary parallelism is weighed unasked: placing its passes takes longer than all the rest."""
_TO_SETTLE = 2
_LARGE_LOGITS = 0.03  # of device memory: below, the fused loss is not weighed
_MOST_PASSES = 4000  # microbatches x stages of a step that are priced one by one
_LARGE_OUTPUT = 0.03  # of a rank's time: below, vocabulary parallelism is not weighed
AS_FAST = 5e-4
"""Of the step: no difference, and the tables by tensor and layer stay."""
WORTH = 0.005
"""Of the step: recomputation and waits that are worth another allocator, or the MLP in tiles."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user settled; `auto` leaves it to the planner.

    schedule:   a name of `schedule.name`, or `off` for Megatron's own
    group:      of the schedule, `schedule.group`
    vocabulary: one of `off`, `fused` and `parallel`, or several to choose from, with `|` between them
    barriers:   of a shared vocabulary
    keep_logits:  of one, `vocabulary.keep_logits`; None: weighed
    options:    the sections `fp8` and `mlp` as they are to be
    weighs_tiles:  whether `mlp.tiles` may be switched on
    allocator:  `off` or `static`
    activations:  `off`, or `auto`; or the section as it is to be
    has_model:  the chunks are those of the layout, 1 included: the model is what it is
    host:       bytes of host memory per rank
    device:     bytes of device memory for training; None: all
    """

    schedule: str = "auto"
    group: int | None = None
    vocabulary: str = "auto"
    barriers: Barriers = 1
    keep_logits: bool | None = None
    options: LayerOptions = STOCK_LAYERS
    weighs_tiles: bool = False
    allocator: str = "auto"
    activations: str | Activations = "auto"
    has_model: bool = False
    host: float = 0.0
    device: int | None = None


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A frame with a schedule of a few microbatches, and what the whole step is estimated to take.

    fault:  why it cannot be had; empty where it can
    """

    frame: Frame
    job: Job
    seconds: float
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """The best way to run one layout. `others` are settled too, `estimated` only estimated, the best first."""

    job: Job
    model: Model
    best: Settled
    others: tuple[Settled, ...] = ()
    estimated: tuple[Estimated, ...] = field(default_factory=tuple)


def plan_layout(
    job: Job, hardware: Hardware, wishes: Wishes, progress: Callable[[str], None] = lambda text: None
) -> LayoutPlan:
    """The fastest settings for a job whose layout is given. Raises InfeasibleError with what is short, and by how much.

    `job.layout.chunks` above 1 settles the chunks.
    """
    if fault := _of_prediction(job, wishes):
        raise InfeasibleError(fault)
    tiled = with_tiles(job, wishes)
    try:
        planned = _fastest_plan(job, hardware, wishes, progress)
    except InfeasibleError:
        if tiled is None:
            raise
        return _fastest_plan(job, hardware, tiled, progress)
    best = planned.best
    if best.frame.barriers is not None and wishes.keep_logits is None:
        # In the order that was made for logits made twice: the best one for these is found once all is settled.
        planned = _or_other(planned, replace(best.frame, keep_logits=True), hardware, wishes, AS_FAST)
    if tiled is not None and _promises(planned, wishes, tiled.options, WORTH):
        planned = _or_other(planned, planned.best.frame, hardware, tiled, WORTH)
    return planned


def with_tiles(job: Job, wishes: Wishes) -> Wishes | None:
    """The wishes with `mlp.tiles`; None where that is not to be weighed, or cannot be had."""
    options = replace(wishes.options, mlp=Mlp(tiles="auto"))
    if not wishes.weighs_tiles or wishes.options.mlp.is_on or options.problems(job):
        return None
    return replace(wishes, options=options, weighs_tiles=False)


def _or_other(planned: LayoutPlan, frame: Frame, hardware: Hardware, wishes: Wishes, worth: float) -> LayoutPlan:
    """The plan with this frame and these wishes instead, where that is faster by `worth` of the step."""
    one = Estimated(frame=replace(frame, static=False), job=planned.job, seconds=0.0)
    try:
        found = _settle(one, hardware, wishes)
    except InfeasibleError:
        return planned
    best = planned.best
    if found.priced.step_seconds > (1 - worth) * best.priced.step_seconds:
        return replace(planned, others=(*planned.others, found))
    return replace(planned, model=_model(planned.job, hardware, wishes), best=found, others=(best, *planned.others))


def _promises(planned: LayoutPlan, wishes: Wishes, options: LayerOptions, worth: float) -> bool:
    """Whether other options of its layers might make the best frame faster by `worth` of the step: by its estimate."""
    best, model = planned.best, planned.model
    if lost(best.priced) < worth * best.priced.step_seconds:
        return False
    if wishes.activations != "auto":
        return True  # pricing them is as quick
    ours, other = (
        _estimated(Model(planned.job, model.hardware, model.limit, one), best.frame, wishes).seconds
        for one in (best.options, options)
    )
    return other < (1 - worth / 2) * ours


def settled_with(planned: LayoutPlan, wishes: Wishes, options: LayerOptions) -> Settled | None:
    """The best frame of a plan with other options of its layers; None where that cannot be had, or is not faster."""
    frame, hardware = planned.best.frame, planned.model.hardware
    if options.problems(planned.job) or not _promises(planned, wishes, options, AS_FAST):
        return None
    wishes = replace(wishes, options=options, allocator="static" if frame.static else "off")
    try:
        found = _settle(Estimated(frame=frame, job=planned.job, seconds=0.0), hardware, wishes)
    except InfeasibleError:
        return None
    is_faster = found.priced.step_seconds < (1 - AS_FAST) * planned.best.priced.step_seconds
    return found if is_faster else None


def _model(job: Job, hardware: Hardware, wishes: Wishes) -> Model:
    return Model(job, hardware, wishes.device, wishes.options)


def _fastest_plan(job: Job, hardware: Hardware, wishes: Wishes, progress: Callable[[str], None]) -> LayoutPlan:
    """The fastest of the schedules and output layers, with what layers save as `wishes` have it."""
    ranked = sorted(estimates(job, hardware, wishes, _names(wishes)), key=lambda one: one.seconds)
    settled: list[tuple[Job, Settled]] = []
    faults: list[str] = [one.fault for one in ranked if one.fault]
    for one in ranked:
        if one.fault or len(settled) == _TO_SETTLE or (settled and one.seconds > _fastest(settled)):
            continue
        progress(one.frame.name)
        try:
            settled.append((one.job, _settle(one, hardware, wishes)))
        except InfeasibleError as fault:
            faults.append(str(fault))
    if not settled:
        raise InfeasibleError(
            f"{job_text(job)}: nothing fits: {faults[0] if faults else 'no schedule can be built for it'}"
        )
    if len(settled) > 1:
        settled.sort(key=lambda pair: _seconds_in_full(pair[0], pair[1], hardware, wishes))
    chosen, best = settled[0]
    return LayoutPlan(
        job=chosen,
        model=_model(chosen, hardware, wishes),
        best=best,
        others=tuple(one for _, one in settled[1:]),
        estimated=tuple(ranked),
    )


def _of_prediction(job: Job, wishes: Wishes) -> str:
    """What was asked for and cannot be had with multi-token prediction; empty where there is nothing."""
    if not job.model.mtp_num_layers or job.layout.pipeline == 1:
        return ""
    if wishes.vocabulary == "parallel":
        return (
            f"vocabulary parallel: multi-token prediction (--mtp-num-layers {job.model.mtp_num_layers}) uses both "
            "embeddings within a stage; give --vocabulary fused"
        )
    return ""


def _fastest(settled: list[tuple[Job, Settled]]) -> float:
    return min(one.priced.step_seconds for _, one in settled)


def _settle(one: Estimated, hardware: Hardware, wishes: Wishes) -> Settled:
    """Settle a frame; with memory from a static plan where that helps."""
    model = _model(one.job, hardware, wishes)
    frame = one.frame
    fault: InfeasibleError | None = None
    found: Settled | None = None
    if wishes.allocator != "static":
        try:
            found = _with_wishes(model, frame, wishes)
        except InfeasibleError as error:
            fault = error
    share = 0.0 if found is None else lost(found.priced) / found.priced.step_seconds
    if wishes.allocator == "off" or (found is not None and share < WORTH):
        if found is None:
            assert fault is not None
            raise fault
        return found
    try:
        static = _with_wishes(model, replace(frame, static=True), wishes)
    except InfeasibleError:
        if found is None:
            raise
        return found
    gained = found is None or static.priced.step_seconds < found.priced.step_seconds * (1 - WORTH)
    return static if gained or found is None else found


def _with_wishes(model: Model, frame: Frame, wishes: Wishes) -> Settled:
    if wishes.activations == "auto":
        return _or_simpler(model, wishes, settle(model, frame))
    given = wishes.activations if isinstance(wishes.activations, Activations) else Activations()
    if given.swap_fraction == "auto":
        given = with_fraction(model, frame, given)
    coded = model.options.low_precision
    plan = plan_activations(given, model.job.model.num_layers, coded) if given.is_on else None
    priced = model.price(frame.setup(plan))
    if not priced.fits(frame.host):
        fullest = max(priced.memory, key=lambda rank: rank.peak)
        how = f"activations.policy: {given.policy}" if given.is_on else "activations left alone"
        host = f", {priced.host / 2**30:.1f} GiB of host memory of {frame.host / 2**30:.1f}" if priced.host else ""
        raise InfeasibleError(
            f"with {how} pipeline rank {fullest.rank} needs {fullest.peak / 2**30:.1f} GiB and has "
            f"{fullest.limit / 2**30:.1f}{host}"
        )
    return Settled(frame=frame, activations=given, priced=priced, options=model.options)


def _or_simpler(model: Model, wishes: Wishes, found: Settled) -> Settled:
    """A policy of one fraction instead, where it is faster when all is priced: the optimum knows averages of a step."""
    if not found.activations.is_on:
        return found
    for options in ONE_FRACTION.values():
        compress = "none" if options.policy == "recompute" else model.options.compress
        options = replace(options, experts=found.activations.experts, compress=compress)
        try:
            simple = _with_wishes(model, found.frame, replace(wishes, activations=options))
        except InfeasibleError:
            continue
        if simple.priced.step_seconds < found.priced.step_seconds * (1 - AS_FAST):
            found = simple
    return found


def lost(priced: Priced) -> float:
    """Seconds of a step in recomputation and waits for copies."""
    return priced.time.get("recompute", 0.0) + priced.time.get("exposed_copies", 0.0)


def _names(wishes: Wishes) -> tuple[str, ...]:
    return (STOCK, *FAMILIES_TRIED) if wishes.schedule == "auto" else (wishes.schedule,)


def estimates(job: Job, hardware: Hardware, wishes: Wishes, names: Sequence[str]) -> Iterator[Estimated]:
    """What each of these schedules is estimated to take, in every number of chunks that layers can be put into."""
    few = _few_microbatches(job)
    for name, group, chunks in _schedules(job, names, wishes):
        shares = name in (*_SHARE_VOCABULARY, wishes.schedule) or wishes.vocabulary == "parallel"
        chunked = laid_out(job, chunks, FAMILIES[name].shape if name in FAMILIES else "round-robin")
        model = _model(chunked, hardware, wishes)
        for fused, barriers in _losses(model, wishes):
            if barriers is not None and not shares:
                continue
            try:
                short = _built(chunked, name, group, few, barriers, keep_logits=bool(wishes.keep_logits))
            except MegamemError as fault:
                frame = Frame(name=name, schedule=_single(1), group=group, barriers=barriers)
                yield Estimated(frame=frame, job=chunked, seconds=float("inf"), fault=str(fault))
                continue
            frame = Frame(
                name=name,
                schedule=short,
                group=group,
                fused_loss=fused,
                barriers=barriers,
                keep_logits=barriers is not None and bool(wishes.keep_logits),
                host=wishes.host,
                more=job.num_microbatches - short.num_microbatches,
            )
            yield _estimated(model, frame, wishes)


def _estimated(model: Model, frame: Frame, wishes: Wishes) -> Estimated:
    """Time of a few microbatches, stretched to all of them, and the optimum's recomputation."""
    shortened = replace(frame, static=wishes.allocator != "off")
    setup = shortened.setup(None)
    seconds = model.step_seconds(setup)
    try:
        again = 0.0
        if not isinstance(wishes.activations, Activations):
            again = estimate(model, shortened, untouched=wishes.activations == "off")
    except InfeasibleError as fault:
        return Estimated(frame=frame, job=model.job, seconds=float("inf"), fault=str(fault))
    return Estimated(frame=frame, job=model.job, seconds=seconds + setup.microbatches * again)


def _few_microbatches(job: Job) -> int:
    """Enough for every schedule to reach its steady state, and a multiple of the ranks, as Megatron's own needs."""
    return min(job.num_microbatches, max(3 * job.layout.pipeline, 4))


def _losses(model: Model, wishes: Wishes) -> tuple[tuple[bool, Barriers | None], ...]:
    """(fused, barriers) of the output layers to weigh."""
    variants: dict[str, tuple[bool, Barriers | None]] = {
        "off": (False, None),
        "fused": (True, None),
        "parallel": (False, wishes.barriers),
    }
    allowed = [*variants] if wishes.vocabulary == "auto" else wishes.vocabulary.split("|")
    if allowed == ["parallel"] and model.job.layout.pipeline == 1:
        allowed = ["fused"]
    chosen = allowed[:1]
    if "fused" in allowed[1:] and output_bytes(model.job, fused=False) > _LARGE_LOGITS * model.limit:
        chosen.append("fused")
    shares = not model.job.model.mtp_num_layers  # multi-token prediction uses both embeddings within a stage
    if shares and "parallel" in allowed[1:] and model.job.layout.pipeline > 1 and _output_share(model) > _LARGE_OUTPUT:
        chosen.append("parallel")
    return tuple(variants[name] for name in chosen)


def _output_share(model: Model) -> float:
    """Time of the output layer over that of a rank's layers."""
    job = model.job
    work = model.layer(job.model.num_layers)
    layers = job.model.num_layers // job.layout.pipeline
    each = work.forward.total + work.backward.total + work.weight.total
    return 3 * output_flops(job) / model.hardware.gemm / (layers * each)


def _schedules(job: Job, names: Sequence[str], wishes: Wishes) -> Iterator[tuple[str, int | None, int]]:
    """(name, group, chunks) of the schedules to weigh."""
    layout = job.layout
    if layout.pipeline == 1:
        yield STOCK, None, 1
        return
    counts = [layout.chunks] if wishes.has_model else possible_chunks(job)
    for name in names:
        for chunks in counts:
            if name == STOCK:
                # Megatron's interleaved schedule divides microbatches evenly over the ranks.
                if chunks == 1 or job.num_microbatches % layout.pipeline == 0:
                    yield name, None, chunks
                continue
            family = FAMILIES[name]
            if chunks >= family.min_chunks and (family.max_chunks is None or chunks <= family.max_chunks):
                yield name, wishes.group if family.uses_group else None, chunks


def in_full(planned: LayoutPlan) -> LayoutPlan:
    """The plan with all microbatches of the step, unless they are too many to go through one by one."""
    best = planned.best
    if (frame := _whole(planned.job, best.frame)) is None:
        return planned
    priced = planned.model.price(frame.setup(_plan_of(planned.job, best)))
    return replace(planned, best=replace(best, frame=frame, priced=priced))


def _whole(job: Job, frame: Frame) -> Frame | None:
    """The frame with all microbatches of the step; None where it has them, or they are too many."""
    count = job.num_microbatches * job.layout.pipeline * frame.schedule.placement.num_chunks
    if not frame.more or count > _MOST_PASSES:
        return None
    schedule = _built(job, frame.name, frame.group, None, frame.barriers, keep_logits=frame.keep_logits)
    return replace(frame, schedule=schedule, more=0)


def _plan_of(job: Job, one: Settled) -> ActivationPlan | None:
    if not one.activations.is_on:
        return None
    return plan_activations(one.activations, job.model.num_layers, one.options.low_precision)


def _seconds_in_full(job: Job, one: Settled, hardware: Hardware, wishes: Wishes) -> float:
    """A step with all its microbatches: what a few of them leave out is the schedule's own delay, which adds up."""
    if (frame := _whole(job, one.frame)) is None:
        return one.priced.step_seconds
    return _model(job, hardware, wishes).step_seconds(frame.setup(_plan_of(job, one)))


def _built(
    job: Job,
    name: str,
    group: int | None,
    microbatches: int | None,
    barriers: Barriers | None = None,
    *,
    keep_logits: bool = False,
) -> Schedule:
    count = job.num_microbatches if microbatches is None else microbatches
    layout = job.layout
    if layout.pipeline == 1:
        return _single(count)
    family = name if name != STOCK else "interleaved" if layout.chunks > 1 else "1f1b"
    # Relative to each other, costs are those of one sequence whatever a microbatch has of them.
    one = replace(job, micro_batch_size=1)
    request = Request(
        num_ranks=layout.pipeline,
        num_microbatches=count,
        num_chunks=layout.chunks,
        group=group,
        vocabulary=barriers,
        workload=_workload(one, keep_logits=keep_logits) if barriers else Uniform(),
    )
    return _scheduled(family, request)


_scheduled = lru_cache(maxsize=256)(build_schedule)


def _workload(job: Job, *, keep_logits: bool) -> HasCosts:
    """Relative costs of layers and output layer, by their FLOPs: what places the vocabulary's passes."""
    works = [layer_work(job, number) for number in range(1, job.model.num_layers + 1)]
    output = output_flops(job)
    found = Workload(
        split=job.layout.split,
        layers=tuple(
            StageCost(
                forward=work.gemm + work.attention,
                backward=work.gemm + 2 * work.attention,
                weight=work.gemm,
                activation=1.0,
                weight_grad=1.0,
            )
            for work in works
        ),
        last=StageCost(forward=output, backward=output, weight=output, activation=0.0, weight_grad=0.0),
    )
    return KeptLogits(found) if keep_logits else found


def _single(microbatches: int) -> Schedule:
    return build_schedule("1f1b", Request(num_ranks=1, num_microbatches=microbatches))
