"""One schedule on one layout: what each rank can spend on activations, and the fates that make the most of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from megamem.errors import InfeasibleError
from megamem.ir.activation import ANCHORS, BASE, SAVED, ActivationPlan, Codec, Fate
from megamem.ir.job import Job
from megamem.ir.schedule import Barriers, Schedule
from megamem.planner.activations import CODED, plan_activations
from megamem.planner.evaluation import Model, Priced, Setup
from megamem.planner.fractions.linear import least_seconds
from megamem.planner.fractions.problem import all_kept, device_bytes, experts_again
from megamem.planner.fractions.rank import ExpertFate, Fates, expert_fates, fates_of, least_over_experts, problem_of
from megamem.planner.fractions.table import text_of
from megamem.planner.layer_options import STOCK_LAYERS, LayerOptions
from megamem.planner.memory.device import output_bytes, shared_bytes, static_bytes
from megamem.planner.memory.inventory import output_weight_gradient_bytes, weight_gradient_bytes
from megamem.planner.memory.parameters import stage_layers
from megamem.sections import Activations
from megamem.table import TableRow

RESIDUALS = (1, 2, 4)
"""Values of `residual_every` that are tried in turn where layer inputs alone do not fit."""
_ROUNDS = 5  # of taking memory from a rank that has too little, or giving it what a priced plan has left
_LEAST_RESPONSE = 0.2
_WORTH = 0.01  # of the device's memory: less is not worth another round
_WORTH_SECONDS = 2e-3  # of a rank's computing: less recomputation is not worth another round
_MARGIN = 1.02  # of host memory over what was counted: slots are aligned


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Everything about a setup but its activations.

    name, group:  of the schedule, as `schedule.name` and `schedule.group` have them; `stock` for Megatron's own
    host:         bytes of host memory per rank
    more:         microbatches of the step beyond those of the schedule
    """

    name: str
    schedule: Schedule
    group: int | None = None
    fused_loss: bool = False
    barriers: Barriers | None = None
    keep_logits: bool = False
    static: bool = False
    host: float = 0.0
    more: int = 0

    def setup(self, plan: ActivationPlan | None) -> Setup:
        """The setup with these activations."""
        return Setup(
            schedule=self.schedule,
            plan=plan,
            fused_loss=self.fused_loss,
            barriers=self.barriers,
            keep_logits=self.keep_logits,
            static=self.static,
            more=self.more,
        )


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A frame with its activations settled.

    activations:  the section of the configuration
    priced:       what it takes
    seconds:      recomputation and waits per microbatch of each rank, as the tables have them
    optimum:      the same for the linear programme's own optimum
    computing:    seconds of computing per microbatch of each rank, to compare them with
    options:      with which the layers are run
    """

    frame: Frame
    activations: Activations
    priced: Priced
    seconds: tuple[float, ...] = ()
    optimum: tuple[float, ...] = ()
    computing: tuple[float, ...] = ()
    fates: dict[int, Fates] = field(default_factory=dict)
    options: LayerOptions = STOCK_LAYERS


class Budget:
    """Device memory that the ranks of a frame have for what layers hold for their backward passes."""

    def __init__(self, model: Model, frame: Frame) -> None:
        self.model, self.frame = model, frame

    @cached_property
    def bytes(self) -> list[float]:
        """Per rank; below 0 where not even the weights fit."""
        return [self._of(rank) for rank in range(self.frame.schedule.placement.num_ranks)]

    def _of(self, rank: int) -> float:
        model, frame = self.model, self.frame
        statics = static_bytes(
            model.job, frame.schedule.placement, rank, model.hardware, shards_vocabulary=frame.barriers is not None
        )
        share = model.hardware.fragmentation_arena if frame.static else model.hardware.fragmentation_caching
        return (model.limit - sum(statics.values())) / (1.0 + share) - self._space(rank)

    def _space(self, rank: int) -> float:
        """Working space, logits and waiting weight gradients, at their largest."""
        model, schedule = self.model, self.frame.schedule
        placement, job = schedule.placement, model.job
        between = shared_bytes(
            job, self.frame.barriers or 1, shards=placement.num_ranks, keep_logits=self.frame.keep_logits
        )
        waiting = [self._waiting(placement.stage(rank, chunk)) for chunk in range(placement.num_chunks)]
        now = most = shared = 0.0
        most_shared = 0.0
        for action in schedule.ranks[rank]:
            if action.kind == "B":
                now += waiting[action.chunk]
            elif action.kind == "W":
                now -= waiting[action.chunk] / action.parts
            elif action.kind == "S":
                shared += between
            elif action.kind == "T":
                shared -= between
            most, most_shared = max(most, now), max(most_shared, shared)
        numbers = [n for chunk in range(placement.num_chunks) for n in stage_layers(job, placement.stage(rank, chunk))]
        working = max((model.transients(number)[1] for number in (*numbers[:1], *numbers[-1:])), default=0)
        held = job.tokens * job.model.hidden_size * job.itemsize * placement.num_chunks  # receive buffers
        return most + most_shared + working + self._output(rank) + held

    def _output(self, rank: int) -> float:
        placement, job = self.frame.schedule.placement, self.model.job
        chunk = self.model.options.loss_chunk
        if self.frame.barriers is not None:
            sums = self.frame.barriers == 2
            return output_bytes(job, fused=True, shards=placement.num_ranks, chunk=chunk, sums_gradient=sums)
        last = placement.num_stages - 1
        owns = any(placement.stage(rank, chunk) == last for chunk in range(placement.num_chunks))
        return output_bytes(job, fused=self.frame.fused_loss, chunk=chunk) if owns else 0.0

    def _waiting(self, stage: int) -> float:
        job, options = self.model.job, self.model.options
        numbers = stage_layers(job, stage)
        layers = sum(weight_gradient_bytes(job, number, tiles=options.tiles(job, number)) for number in numbers)
        is_last = stage == self.frame.schedule.placement.num_stages - 1
        return layers + (output_weight_gradient_bytes(job) if is_last and self.frame.barriers is None else 0)


def estimate(model: Model, frame: Frame, *, untouched: bool = False) -> float:
    """Seconds of recomputation and waits per microbatch: the optimum of the first, the middle and the last rank.

    untouched: activations have to stay as they are

    Raises InfeasibleError where a rank's memory cannot hold what has to be stored.
    """
    budget = Budget(model, frame).bytes
    if min(budget) <= 0:
        raise InfeasibleError(_no_room(model, budget))
    tight = _tight(model, frame, budget)
    if tight and untouched:
        raise InfeasibleError(f"what layers save does not fit on pipeline rank {tight[0]}")
    if not tight:
        return 0.0
    fault: InfeasibleError | None = None
    for every in RESIDUALS:
        worst = partial(_worst, model, frame, budget, tight, every)
        try:
            return least_over_experts(model, worst)
        except InfeasibleError as error:
            fault = fault or error
    assert fault is not None
    raise fault


def _tight(model: Model, frame: Frame, budget: Sequence[float]) -> list[int]:
    """Of the first, the middle and the last rank those that cannot keep all that their layers save."""
    found = []
    for rank in dict.fromkeys((0, len(budget) // 2, len(budget) - 1)):
        problem, _ = problem_of(model, frame.schedule, rank, budget[rank], frame.host)
        if device_bytes(problem, all_kept(problem)) > budget[rank]:
            found.append(rank)
    return found


def _worst(
    model: Model, frame: Frame, budget: Sequence[float], ranks: Sequence[int], every: int, experts: ExpertFate
) -> float:
    """Seconds per microbatch of the worst of the ranks at its optimum. Raises InfeasibleError."""
    worst = 0.0
    for rank in ranks:
        problem, _ = problem_of(model, frame.schedule, rank, budget[rank], frame.host, every, experts)
        worst = max(worst, least_seconds(problem) + experts_again(problem))
    return worst


def _no_room(model: Model, budget: Sequence[float]) -> str:
    rank = min(range(len(budget)), key=budget.__getitem__)
    return (
        f"pipeline rank {rank} has {model.limit / 2**30:.1f} GiB of device memory, {-budget[rank] / 2**30:.1f} GiB "
        "less than weights, optimizer states, logits and working space need"
    )


def settle(model: Model, frame: Frame, *, is_short: bool = False) -> Settled:
    """The best activations for a frame. Raises InfeasibleError with the sums where nothing fits.

    is_short: it is known that what layers save does not fit
    """
    if not is_short:
        untouched = model.price(frame.setup(None))
        if untouched.fits(frame.host):
            return Settled(frame=frame, activations=Activations(), priced=untouched, options=model.options)
    fault: InfeasibleError | None = None
    for every in RESIDUALS:
        for experts in _expert_fates(model, frame, every):
            try:
                return _refined(model, frame, every, experts)
            except InfeasibleError as error:
                fault = fault or error
    assert fault is not None
    raise fault


def _expert_fates(model: Model, frame: Frame, every: int) -> Sequence[ExpertFate]:
    """What may become of experts' tensors, the cheapest first by the optimum of the fullest ranks."""
    fates = expert_fates(model)
    if len(fates) == 1:
        return fates
    budget = Budget(model, frame).bytes
    ranks = _tight(model, frame, budget) or [0]
    costs = {}
    for experts in fates:
        try:
            costs[experts] = _worst(model, frame, budget, ranks, every, experts)
        except InfeasibleError:
            costs[experts] = float("inf")
    return sorted(fates, key=costs.__getitem__)


def _refined(model: Model, frame: Frame, every: int, experts: ExpertFate) -> Settled:
    """Settle, then give the ranks what memory the priced plan has left, as long as that helps."""
    budget = Budget(model, frame).bytes
    if min(budget) <= 0:
        raise InfeasibleError(_no_room(model, budget))
    best: Settled | None = None
    host, before = frame.host, (0.0, 0.0)
    known: _Known = {}
    for _ in range(_ROUNDS):
        try:
            found = _once(model, replace(frame, host=host), budget, every, experts, known)
        except InfeasibleError:
            if best is None:
                raise
            break
        if not found.priced.fits(frame.host):
            over = [max(0.0, rank.peak - rank.limit) for rank in found.priced.memory]
            budget = [device - extra * 1.05 for device, extra in zip(budget, over, strict=True)]
            given, host = host, host - max(0.0, found.priced.host - frame.host) * 1.05 / _response(before, host, found)
            before = given, found.priced.host
            continue
        found = replace(found, frame=frame)
        if best is not None and best.priced.step_seconds <= found.priced.step_seconds:
            break
        best = found
        left = [rank.limit - rank.peak for rank in found.priced.memory]
        needs = [
            seconds > _WORTH_SECONDS * computing and room > _WORTH * model.limit
            for seconds, computing, room in zip(found.seconds, found.computing, left, strict=True)
        ]
        if not any(needs):
            break
        budget = [
            device + (0.95 * room if need else 0.0) for device, room, need in zip(budget, left, needs, strict=True)
        ]
    if best is None:
        raise InfeasibleError(f"what has to be stored does not fit: {_shortage(found.priced)}")
    return best


def _response(before: tuple[float, float], given: float, found: Settled) -> float:
    """How much of a reduction of the host memory given was a reduction of that used, since the round before."""
    if not before[0] > given:
        return 1.0
    return min(1.0, max(_LEAST_RESPONSE, (before[1] - found.priced.host) / (before[0] - given)))


def _shortage(priced: Priced) -> str:
    rank = max(priced.memory, key=lambda one: one.peak - one.limit)
    host = f", {priced.host / 2**30:.1f} GiB of host memory" if priced.host else ""
    return (
        f"pipeline rank {rank.rank} needs {rank.peak / 2**30:.1f} GiB of device memory and has "
        f"{rank.limit / 2**30:.1f}{host}"
    )


_Known = dict[tuple[int, float, float], tuple[dict[int, Fates], float, float]]
"""By rank, its device memory and host memory: what `fates_of` has said."""


def _once(
    model: Model, frame: Frame, budget: Sequence[float], every: int, experts: ExpertFate, known: _Known
) -> Settled:
    fates: dict[int, Fates] = {}
    seconds, best = [], []
    for rank, device in enumerate(budget):
        key = rank, device, frame.host
        if key not in known:
            problem, assigned = problem_of(model, frame.schedule, rank, device, frame.host, every, experts)
            known[key] = fates_of(model, problem, assigned)
        found, spent, least = known[key]
        fates |= found
        seconds.append(spent)
        best.append(least)
    compress = model.options.compress
    activations = section_of(fates, every, 0.0, experts, compress)
    plan = plan_activations(activations, model.job.model.num_layers, model.options.low_precision)
    priced = model.price(frame.setup(plan))
    activations = section_of(fates, every, priced.host, experts, compress)
    return Settled(
        frame=frame,
        activations=activations,
        priced=priced,
        seconds=tuple(seconds),
        optimum=tuple(best),
        computing=_computing(priced),
        fates=fates,
        options=model.options,
    )


def _computing(priced: Priced) -> tuple[float, ...]:
    costs, placement = priced.simulation.costs, priced.setup.schedule.placement
    return tuple(
        sum(costs.stages[placement.stage(rank, chunk)].total for chunk in range(placement.num_chunks))
        for rank in range(placement.num_ranks)
    )


def section_of(
    fates: dict[int, Fates], every: int, host: float, experts: ExpertFate = "keep", compress: Codec = "none"
) -> Activations:
    """The `activations` section that gives each layer its fates; `host` bytes of host memory are needed."""
    rows: dict[tuple[tuple[str, Fate], ...], list[int]] = {}
    order = (*BASE, *ANCHORS, CODED, SAVED)
    for number in sorted(fates):
        row = tuple((name, fates[number][name]) for name in order if name in fates[number])
        rows.setdefault(row, []).append(number)
    swaps = any(fate.tier == "host" and fate.fraction > 0 for row in rows for _, fate in row)
    table = tuple(TableRow(layers=text_of(numbers), fates=dict(row)) for row, numbers in rows.items())
    swaps = swaps or experts == "swap"
    settings: dict[str, object] = {"table": table, "residual_every": every, "experts": experts}
    if swaps:
        settings |= {"keep_last_layers": 0, "compress": compress}
    if host:
        settings["host_memory"] = -(-int(host * _MARGIN) // (1 << 26)) << 26
    return Activations(policy="ordered" if swaps else "recompute", **settings)  # type: ignore[arg-type]


def with_static(frame: Frame) -> Frame:
    """The frame with memory from a static plan."""
    return replace(frame, static=True)


def job_text(job: Job) -> str:
    """A job in a few words, for messages."""
    return f"{job.model.name or 'the model'}, {job.layout.text()}, {job.seq_length} tokens"
