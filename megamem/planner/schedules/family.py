"""What a family of schedules is: a pure function from a request to a schedule, and the limits of its validity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Barriers, Placement, Schedule, Shape
from megamem.ir.workload import HasCosts, PipelineCosts, Uniform


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a schedule is wanted for.

    num_ranks, num_microbatches:  of the pipeline and of the step
    num_chunks:     chunks per rank; families with a fixed number refuse any other
    group:          microbatches that go through a chunk before the next chunk's turn; None lets the family choose
    workload:       costs of the stages; families that look at them say so
    memory_limit:   activation memory that no rank may exceed, in the unit of the workload's `activation`; None for no
                    limit. Families that cannot keep a limit by construction are checked against it afterwards.
    vocabulary:     barriers of vocabulary parallelism (`ir.schedule`); None where the end stages have the embeddings
    delay:          microbatches more than usual between F and B of the last stage, for families that say `delays`
    """

    num_ranks: int
    num_microbatches: int
    num_chunks: int = 1
    group: int | None = None
    workload: HasCosts = field(default_factory=Uniform)
    memory_limit: float | None = None
    vocabulary: Barriers | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_microbatches", "num_chunks"):
            if getattr(self, name) < 1:
                raise InfeasibleError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.vocabulary not in (None, 1, 2):
            raise InfeasibleError(f"vocabulary parallelism has 1 or 2 barriers, not {self.vocabulary}; nearest: 1")

    def placement(self, shape: Shape) -> Placement:
        """The placement of this many ranks and chunks."""
        return Placement(shape=shape, num_ranks=self.num_ranks, num_chunks=self.num_chunks)

    def costs(self, placement: Placement) -> PipelineCosts:
        """The costs of the stages of this placement."""
        return self.workload.costs(placement, sharded=self.vocabulary is not None)

    def with_chunks(self, num_chunks: int) -> Request:
        """The same request for another number of chunks."""
        return replace(self, num_chunks=num_chunks)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One name of a schedule and the function behind it.

    name:           what users write
    shape:          the placement
    build:          from a valid request to a schedule; pure, deterministic. Raises InfeasibleError.
    summary:        one line for `--help` and the docs, with the source
    min_chunks, max_chunks:  how many chunks a rank may hold (max None: any number)
    min_microbatches:  the fewest microbatches as a function of the request
    uses_group:     whether `Request.group` means anything
    uses_costs:     whether the order depends on the costs
    uses_limit:     whether the order is made to fit `Request.memory_limit`
    offloads:       whether it contains OFFLOAD and RELOAD actions
    delays:         whether it makes schedules for `Request.delay`; others are delayed in the order of their passes
    """

    name: str
    shape: Shape
    build: Callable[[Request], Schedule]
    summary: str
    min_chunks: int = 1
    max_chunks: int | None = 1
    min_microbatches: Callable[[Request], int] = lambda request: 1
    uses_group: bool = False
    uses_costs: bool = False
    uses_limit: bool = False
    offloads: bool = False
    delays: bool = False

    @property
    def default_chunks(self) -> int:
        """The fewest chunks the family works with."""
        return self.min_chunks

    def check(self, request: Request) -> None:
        """Raise InfeasibleError, with the nearest setting, where the family cannot serve the request."""
        chunks, most = request.num_chunks, self.max_chunks
        if chunks < self.min_chunks or (most is not None and chunks > most):
            allowed = str(self.min_chunks) if most == self.min_chunks else f"{self.min_chunks} or more"
            nearest = max(self.min_chunks, chunks if most is None else min(chunks, most))
            raise InfeasibleError(
                f"{self.name} works with {allowed} chunks per rank, not {chunks}; nearest: {nearest} chunks"
            )
        if request.group is not None and not self.uses_group:
            raise InfeasibleError(f"{self.name} has no groups; leave group {request.group} out")
        least = self.min_microbatches(request)
        if request.num_microbatches < least:
            raise InfeasibleError(
                f"{self.name} needs at least {least} microbatches on {request.num_ranks} ranks with {chunks} chunks "
                f"each, not {request.num_microbatches}; nearest: {least} microbatches"
            )


def at_least(amount: float) -> str:
    """A lower bound as a message says it: six digits, rounded up, so that the number shown is enough."""
    text = f"{amount:.6g}"
    if float(text) < amount:
        text = f"{amount + 10.0 ** (math.floor(math.log10(amount)) - 5):.6g}"
    return text


Objective = Literal["makespan", "stage_span"]
