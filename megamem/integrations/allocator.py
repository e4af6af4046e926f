"""The static allocator around the steps of Megatron-Core: `allocator.mode: static`.

A step of the allocator lasts from one call of a forward-backward function to the next, so that the optimizer's update,
the zeroing of gradients and the logging are in it. Its kind is what the trainer says of it beforehand: training or
evaluation, the number and size of microbatches, the sequence length, the model chunks. What it does not say, such as
packed sequences of varying length, shows as a departure from the plan.

Each rank plans for itself; no rank's plan is another's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch.distributed as dist
from torch.nn import Module

from megamem.config import Allocator
from megamem.errors import AllocationError, NativeError
from megamem.integrations.capability import Capability
from megamem.integrations.report import mib
from megamem.ir.arena import ArenaPlan, StepRequests, read_plan, write_plan
from megamem.native.arena import Fate
from megamem.patches.registry import Patch
from megamem.planner.allocation.periodic import plan_steps
from megamem.planner.allocation.solvers import make_solver
from megamem.runtime.arena import ArenaReport, StaticAllocator
from megamem.runtime.arena_front_ends import FrontEnd, front_end_for

_LOG = logging.getLogger("megamem")
_LEFT_OUT: dict[Fate, str] = {
    "small": "small",
    "elsewhere": "on other streams",
    "unplanned": "not alike in every step",
}
_FALLBACKS: dict[Fate, str] = {"missed": "out of order", "conflict": "whose place was still taken"}


@final
class PlannedMemory(Capability):
    """The section `allocator` on one rank. `allocator` is None before the first step."""

    SECTION: ClassVar[str] = "allocator"
    OPTION: ClassVar[str] = "allocator.mode"
    NOT_LIVE: ClassVar[str] = (
        "allocator.mode is static, a step has run, and no request for memory came by the arena. Has something else "
        "replaced PyTorch's allocator since megamem.enable? Set allocator.mode: off to go on without"
    )

    def __init__(self, options: Allocator) -> None:
        self._options = options
        self._front_end: FrontEnd | None = None
        self.allocator: StaticAllocator | None = None

    def patches(self) -> Sequence[Patch]:
        return []

    def problems(self, chunks: Sequence[Module]) -> list[str]:
        device = next(parameter.device for chunk in chunks for parameter in chunk.parameters())
        try:
            self._front_end = front_end_for(device)
        except NativeError as fault:
            return [str(fault)]
        return []

    def adopt(self, chunks: Sequence[Module]) -> None:
        assert self._front_end is not None
        options = self._options
        self._front_end.install()
        self.allocator = StaticAllocator(
            front_end=self._front_end,
            make_plan=self._plan,
            profile_steps=options.profile_steps,
            min_size=self._min_size,
            plans={} if options.plans == "none" else _read_plans(Path(options.plans)),
            poison=options.poison,
        )

    @property
    def _min_size(self) -> int:
        assert self._front_end is not None
        return self._front_end.min_size if self._options.min_size == "auto" else self._options.min_size

    def begin_step(self, arguments: Mapping[str, Any], *, trains: bool) -> None:
        assert self.allocator is not None
        self.allocator.begin_step(_kind_of_step(arguments, trains))

    def abandon_step(self) -> None:
        if self.allocator is not None:
            self.allocator.abandon_step()

    def is_live(self) -> bool | None:
        return self.allocator is not None and self.allocator.has_seen_requests

    def report(self) -> AllocatorReport:
        return AllocatorReport(
            profile_steps=self._options.profile_steps,
            arena=None if self.allocator is None else self.allocator.report(),
        )

    def close(self) -> None:
        if self.allocator is not None:
            self.allocator.close()

    def _plan(self, key: str, steps: Sequence[StepRequests]) -> ArenaPlan:
        options = self._options
        plan = plan_steps(
            key, steps, min_size=self._min_size, solver=make_solver(options.solver), time_limit=options.time_limit
        )
        _LOG.info(
            "megamem: %s: %d of %d requests have a place in an arena of %.2f MiB, %.2f %% above the lower bound",
            *(key, plan.num_planned, len(plan.sizes), plan.peak / 2**20, 100 * plan.gap),
        )
        if options.plans != "none":
            name = hashlib.sha256(key.encode()).hexdigest()[:12]
            try:
                write_plan(Path(options.plans) / f"{_rank_prefix()}{name}.json.gz", plan)
            except AllocationError as fault:
                _LOG.warning("megamem: allocator.plans: %s", fault)
        return plan


def _kind_of_step(arguments: Mapping[str, Any], trains: bool) -> str:
    model = arguments["model"]
    chunks = len(model) if isinstance(model, list) else 1
    sizes = [arguments.get(name) for name in ("seq_length", "decoder_seq_length")]
    tokens = "/".join(str(size) for size in dict.fromkeys(sizes) if size is not None)
    return (
        f"{'training' if trains else 'evaluation'}, {arguments['num_microbatches']} microbatches of "
        f"{arguments.get('micro_batch_size')} x {tokens} tokens{f', {chunks} chunks' if chunks > 1 else ''}"
    )


def _rank_prefix() -> str:
    return f"rank{dist.get_rank()}of{dist.get_world_size()}-"


def _read_plans(folder: Path) -> dict[str, ArenaPlan]:
    """This rank's plans by kind of step; files that cannot be read are said and passed over, and written anew."""
    plans: dict[str, ArenaPlan] = {}
    for path in sorted(folder.glob(f"{_rank_prefix()}*.json.gz")):
        try:
            plan = read_plan(path)
        except AllocationError as fault:
            _LOG.warning("megamem: allocator.plans: %s", fault)
            continue
        plans[plan.key] = plan
    return plans


@dataclass(frozen=True, kw_only=True)
class AllocatorReport:
    """What the static allocator did on this rank; `arena` is None before the first step."""

    profile_steps: int
    arena: ArenaReport | None

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        arena = self.arena
        if arena is None:
            return [("memory plan", "no step has run")]
        rows = [row for kind in arena.kinds for row in _kind_rows(kind.key, kind.plan, kind.num_plans)]
        if not arena.planned_peak:
            return [*rows, ("memory plan", f"none yet; {self.profile_steps} steps are recorded, after one to warm up")]
        requests = arena.counters.requests
        rows += [
            ("arena, reserved", mib(arena.counters.capacity)),
            (
                "requests served from it",
                f"{requests['served']} of {arena.num_requests} ({arena.served_share:.1%}), "
                f"{arena.served_bytes_share:.2%} of the bytes",
            ),
            ("left out by plan", _left_out(requests)),
            ("fallbacks to PyTorch's allocator", _fallbacks(arena)),
        ]
        if arena.counters.num_deferred:
            rows.append(("blocks kept for a second stream", str(arena.counters.num_deferred)))
        if arena.counters.num_stained:
            rows.append(("blocks written to while they were free", str(arena.counters.num_stained)))
        return rows


def _kind_rows(key: str, plan: ArenaPlan | None, num_plans: int) -> list[tuple[str, str]]:
    if plan is None:
        return []
    again = f", planned {num_plans} times" if num_plans > 1 else ""
    share = f"{plan.gap:.2%} above the lower bound" if plan.gap else "the least there can be"
    return [(f"planned peak, {key}", f"{mib(plan.peak)} ({share}){again}")]


def _left_out(requests: Mapping[Fate, int]) -> str:
    return ", ".join(f"{requests[fate]} {text}" for fate, text in _LEFT_OUT.items())


def _fallbacks(arena: ArenaReport) -> str:
    requests, nbytes = arena.counters.requests, arena.counters.nbytes
    return ", ".join(f"{requests[fate]} ({mib(nbytes[fate])}) {text}" for fate, text in _FALLBACKS.items())
