"""Where no layout fits: the one that comes nearest, its largest kinds of memory, and by how much it is short.

What a layout needs is priced with the least that the wishes allow: the schedule that holds fewest microbatches of those
that need no search (1f1b), the output layer fused with its loss, a static plan, and layers of which nothing stays but
what has to: inputs and attention outputs in host memory, every fourth input alone, all else computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megamem.errors import MegamemError
from megamem.ir.job import Job
from megamem.ir.plan import RankMemory
from megamem.ir.schedule import Placement
from megamem.planner.activations import plan_activations
from megamem.planner.evaluation import Model, Priced
from megamem.planner.fractions.rank import ExpertFate
from megamem.planner.hardware import Hardware
from megamem.planner.joint.layout import STOCK, Wishes, with_tiles
from megamem.planner.joint.settle import RESIDUALS, Frame
from megamem.planner.memory.device import static_bytes
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request
from megamem.sections import Activations

_TO_PRICE = 12  # of the layouts whose states and hidden states leave most room
_NAMED = 3  # kinds of memory
_TEXTS = {
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "kept": "activations",
    "at_work": "the layer at work",
    "staging": "copies under way",
    "output_layer": "output layer",
    "transients": "working space",
    "fragmentation": "fragmentation",
}


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """What a layout needs at least, and has not.

    device:  bytes of device memory that its fullest rank is short of, with as much in host memory as can be; below 0
             where that suffices
    host:    bytes of host memory that are short then
    """

    job: Job
    rank: RankMemory
    device: int
    host: int
    host_limit: float

    @property
    def missing(self) -> int:
        """Bytes in all: what host memory cannot take may stay in device memory that is free."""
        return self.device + max(0, self.host)

    def text(self) -> str:
        """Which layout, what is short, and the largest kinds of memory."""
        of_rank = f" on pipeline rank {self.rank.rank}" if self.job.layout.pipeline > 1 else ""
        layout = f"{self.job.layout.text()} with microbatches of {self.job.micro_batch_size}"
        parts = []
        if self.device > 0 or self.host <= 0:
            largest = sorted(self.rank.kinds.items(), key=lambda item: -item[1])[:_NAMED]
            kinds = ", ".join(f"{_gib(nbytes)} {_TEXTS.get(kind, kind)}" for kind, nbytes in largest)
            parts.append(
                f"{_gib(max(self.device, 0))} GiB of device memory{of_rank} ({_gib(self.rank.peak)} needed: {kinds}; "
                f"{_gib(self.rank.limit)} there)"
            )
        if self.host > 0:
            needed = self.host + self.host_limit
            free = f", with {_gib(-self.device)} GiB of device memory left" if self.device < 0 else ""
            parts.append(
                f"{_gib(self.host)} GiB of host memory per GPU ({_gib(needed)} needed for inputs and attention outputs "
                f"of layers, {_gib(self.host_limit)} there{free})"
            )
        return f"{layout} is short of " + " and ".join(parts)


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f}"


def shortages(jobs: Sequence[Job], hardware: Hardware, wishes: Wishes) -> list[Shortage]:
    """Of the likeliest layouts, the one that comes nearest first; those that are short of nothing are in front."""
    wishes = with_tiles(jobs[0], wishes) or wishes
    likely = sorted(jobs, key=lambda job: _floor(job, hardware))[:_TO_PRICE]
    found = [shortage for job in likely if (shortage := _of(job, hardware, wishes)) is not None]
    return sorted(found, key=lambda one: one.missing)


def text_of(job: Job, hardware: Hardware, wishes: Wishes, fault: str) -> str:
    """Why a layout that was given does not fit; `fault` where that is not for want of memory."""
    found = shortages([job], hardware, wishes)
    if not found or found[0].missing <= 0:
        return fault
    return f"{job.model.name or 'the model'}, {job.seq_length} tokens: nothing fits: {found[0].text()}"


def _floor(job: Job, hardware: Hardware) -> float:
    """States of the first rank, and a share of what its layers hold that orders layouts alike."""
    ranks = job.layout.pipeline
    placement = Placement(shape="round-robin", num_ranks=ranks, num_chunks=1)
    one_chunk = job if job.layout.chunks == 1 else replace(job, layout=replace(job.layout, chunks=1, split=()))
    states = sum(static_bytes(one_chunk, placement, 0, hardware).values())
    held = min(ranks, job.num_microbatches) * -(-job.model.num_layers // ranks)
    inside = job.tokens * job.model.hidden_size * job.itemsize
    return states + inside * (2 * held + 16)


def _of(job: Job, hardware: Hardware, wishes: Wishes) -> Shortage | None:
    """What a layout is short of."""
    ranks, chunks = job.layout.pipeline, job.layout.chunks
    request = Request(num_ranks=ranks, num_microbatches=_microbatches(job), num_chunks=chunks)
    model = Model(job, hardware, wishes.device, wishes.options)
    try:
        schedule = build_schedule("interleaved" if chunks > 1 else "1f1b", request)
        frame = Frame(
            name=STOCK,
            schedule=schedule,
            fused_loss=wishes.vocabulary != "off",
            static=wishes.allocator != "off",
            host=wishes.host,
        )
        found = [_priced(model, frame, options) for options in _leanest(job, wishes)]
    except MegamemError:
        return None
    priced = min(found, key=lambda one: _missing(one, wishes.host))
    rank = max(priced.memory, key=lambda one: one.peak - one.limit)
    return Shortage(
        job=job,
        rank=rank,
        device=rank.peak - rank.limit,
        host=round(priced.host - wishes.host),
        host_limit=wishes.host,
    )


def _missing(priced: Priced, host: float) -> float:
    return max(rank.peak - rank.limit for rank in priced.memory) + max(0.0, priced.host - host)


def _microbatches(job: Job) -> int:
    """Enough to fill the pipeline, in multiples of the ranks that Megatron's interleaved schedule takes."""
    return min(job.num_microbatches, 2 * job.layout.pipeline)


def _priced(model: Model, frame: Frame, options: Activations | None) -> Priced:
    layers = model.job.model.num_layers
    plan = None if options is None else plan_activations(options, layers, model.options.low_precision)
    return model.price(frame.setup(plan))


def _leanest(job: Job, wishes: Wishes) -> Sequence[Activations | None]:
    """The activations that need least: those that were asked for, or without host memory and with it."""
    given = wishes.activations
    if given == "off" or (isinstance(given, Activations) and not given.is_on):
        return (None,)
    if isinstance(given, Activations):
        return (replace(given, swap_fraction=0.0) if isinstance(given.swap_fraction, str) else given,)
    experts: ExpertFate = "keep" if job.model.experts is None else "recompute"
    every = RESIDUALS[-1]
    kept = Activations(policy="recompute", residual_every=every, experts=experts)
    return (kept, replace(kept, policy="ordered", swap_fraction=0.0, keep_last_layers=0))
