"""A layout's step time by closed forms: what the search compares hundreds of layouts by, in milliseconds each.

Bubble and memory of the schedules in their steady state, in units of a rank's pass over one microbatch (F, B, W) and of
the activations that it holds (arXiv 2104.04473, 2401.10241, 2503.01328; `megamem simulate` agrees):

                 bubble                                          in flight on rank 0
    1f1b         (p - 1) (F + B + W)                             p
    interleaved  (p - 1) (F + B + W) / v                         p + (p - 1) / v
    gis          (p - 1) (F + B) / v                             p
    gis-h        (p - 1) (F + B) / v + (v - 1) p / 2 v (F+B-W)   (v + 1) p / 2 v

Activations are the optimum of the first rank, with all its layers as one group for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megamem.errors import InfeasibleError
from megamem.ir.activation import SAVED
from megamem.ir.schedule import Placement, Schedule
from megamem.planner.evaluation import OPTIMIZER_BYTES, Model
from megamem.planner.fractions.linear import explain, least_seconds
from megamem.planner.fractions.problem import Limits, Problem, experts_again, whole_bytes
from megamem.planner.fractions.rank import ExpertFate, groups_of, least_over_experts
from megamem.planner.joint.layout import Wishes
from megamem.planner.joint.split import MOST_CHUNKS, laid_out, possible_chunks
from megamem.planner.memory.device import output_bytes, static_bytes
from megamem.planner.memory.inventory import weight_gradient_bytes
from megamem.planner.memory.parameters import stage_layers, stage_parameters, stage_passes, states_of
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A schedule in its steady state: its bubble in seconds, and microbatches in flight on the first rank."""

    name: str
    chunks: int
    bubble: float
    in_flight: float
    splits: bool


class Quick:
    """Closed forms for one layout."""

    def __init__(self, model: Model) -> None:
        self.chunks = possible_chunks(model.job)
        self.job = laid_out(model.job, 1)  # all layers of a rank as one stage
        self.model = model if self.job is model.job else Model(self.job, model.hardware, model.limit, model.options)
        self.ranks = self.job.layout.pipeline
        self.layers = [stage_layers(self.job, rank) for rank in range(self.ranks)]
        self.placement = Placement(shape="round-robin", num_ranks=self.ranks, num_chunks=1)

    def passes(self, rank: int) -> tuple[float, float, float]:
        """F, B and W of one microbatch on a rank."""
        forward = backward = weight = 0.0
        for number in stage_passes(self.job, rank):
            times = self.model.layer(number)
            forward += times.forward.total
            backward += times.backward.total + times.again
            weight += times.weight.total
        if rank == self.ranks - 1:
            logits, loss = self.model.output
            forward, backward, weight = forward + logits + loss / 2, backward + logits + loss / 2, weight + logits
        return forward, backward, weight

    @cached_property
    def busiest(self) -> float:
        """Computing of one microbatch on the rank that has most of it."""
        fullest = max(range(self.ranks), key=lambda rank: len(self.layers[rank]))
        return max(sum(self.passes(rank)) for rank in {0, fullest, self.ranks - 1})

    def bound(self) -> float:
        """Seconds that no schedule can undercut; infinite where the states alone do not fit."""
        if self.room(0, 0.0) < 0:
            return float("inf")
        forward, backward, _ = self.passes(0)
        warm_up = (self.ranks - 1) * (forward + backward) / min(MOST_CHUNKS, max(1, len(self.layers[0])))
        return self.job.num_microbatches * self.busiest + warm_up + self.optimizer()

    def optimizer(self) -> float:
        """The optimizer's step on the last rank."""
        states = states_of(self.job, stage_parameters(self.job, self.ranks - 1))
        return states.optimizer / (12 if self.job.bf16 else 8) * OPTIMIZER_BYTES / self.model.hardware.hbm

    def room(self, rank: int, besides: float) -> float:
        """Device memory of a rank for activations, with `besides` bytes for other things."""
        hardware = self.model.hardware
        statics = sum(static_bytes(self.job, self.placement, rank, hardware).values())
        numbers = self.layers[rank]
        working = self.model.transients(numbers[-1])[1] if numbers else 0  # the embedding or the loss alone
        return (self.model.limit - statics) / (1.0 + hardware.fragmentation_arena) - working - besides

    def seconds(self, wishes: Wishes) -> float:
        """The least of the closed forms. Raises InfeasibleError where none fits."""
        fault: InfeasibleError | None = None
        best = float("inf")
        count = self.job.num_microbatches
        for shape in self.shapes(wishes):
            floor = count * self.busiest + shape.bubble
            if floor >= best:
                continue
            try:
                again = max(self.again(shape, rank, wishes.host) for rank in self._full_ranks)
            except InfeasibleError as error:
                fault = fault or error
                continue
            best = min(best, floor + (count + self.ranks - 1) * again)
        if best == float("inf"):
            raise fault or InfeasibleError(f"no schedule can be built for {self.job.layout.text()}")
        return best + self.optimizer()

    def shapes(self, wishes: Wishes) -> Iterator[Shape]:
        """The schedules, least bubble first."""
        p = self.ranks
        forward, backward, weight = self.passes(0)
        total = forward + backward + weight
        if p == 1:
            yield Shape(name="off", chunks=1, bubble=0.0, in_flight=1.0, splits=False)
            return
        found = []
        for v in self.chunks:
            bubble = (p - 1) * total / v
            if v == 1 or self.job.num_microbatches % p == 0:
                flight = p + (p - 1) / v if v > 1 else p
                found.append(Shape(name="off", chunks=v, bubble=bubble, in_flight=flight, splits=False))
            if v > 1:
                bubble = (p - 1) * (forward + backward) / v
                found.append(Shape(name="gis", chunks=v, bubble=bubble, in_flight=p, splits=True))
                bubble += (v - 1) * p / (2 * v) * max(0.0, forward + backward - weight)
                flight = (v + 1) * p / (2 * v)
                found.append(Shape(name="gis-h", chunks=v, bubble=bubble, in_flight=flight, splits=True))
        if wishes.schedule != "auto":
            known = [shape for shape in found if shape.name == wishes.schedule]
            found = known or found
        yield from sorted(found, key=lambda shape: shape.bubble)

    def again(self, shape: Shape, rank: int, host: float) -> float:
        """Recomputation and waits per microbatch of a rank at the optimum. Raises InfeasibleError."""
        flight = max(1.0, shape.in_flight - rank)
        flight = min(flight, float(self.job.num_microbatches))
        besides = 0.0
        if shape.splits:
            numbers, options = self.layers[rank], self.model.options
            besides += sum(
                weight_gradient_bytes(self.job, number, tiles=options.tiles(self.job, number))
                for number in numbers[: -(-len(numbers) // shape.chunks)]
            )
        if rank == self.ranks - 1:
            besides += output_bytes(self.job, fused=True, chunk=self.model.options.loss_chunk)
        device = self.room(rank, besides)
        to_host, from_host = self.model.rates
        limits = Limits(device=device, host=host, to_host=to_host, from_host=from_host)

        def problem_with(experts: ExpertFate) -> Problem:
            groups = tuple(item.group for item in groups_of(self.model, self._schedule(), rank, 1, experts))
            return Problem(groups=groups, limits=limits, moments=((flight,) * len(groups),))

        def cost(experts: ExpertFate) -> float:
            problem = problem_with(experts)
            return least_seconds(problem) + experts_again(problem)

        kept = problem_with("keep")
        if device <= 0:
            raise InfeasibleError(explain(kept))
        untouched = sum(flight * one.layers * (whole_bytes(one) + one.beside.get(SAVED, 0.0)) for one in kept.groups)
        return 0.0 if untouched <= 0.8 * device else least_over_experts(self.model, cost)

    @cached_property
    def _full_ranks(self) -> set[int]:
        """The ranks that may be short of memory: the ends, and the first of those with the most layers."""
        most = max(len(numbers) for numbers in self.layers)
        return {0, next(rank for rank in range(self.ranks) if len(self.layers[rank]) == most), self.ranks - 1}

    def _schedule(self) -> Schedule:
        """Any schedule with one chunk: it only says which layers a rank has."""
        return build_schedule("1f1b", Request(num_ranks=self.ranks, num_microbatches=1))
