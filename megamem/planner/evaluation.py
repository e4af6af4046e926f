"""One way to run a job, priced: the time of a step by kind, and the memory of every pipeline rank by kind.

    Model(job, hardware).price(Setup(...))

Times of stages follow from the layers (`costs`), recomputation and waits for copies from the activation plan, the step
from the simulator of schedules, memory from the ledger (`memory`) and the working space of the action that runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from megamem.ir.activation import ActivationPlan
from megamem.ir.job import Job
from megamem.ir.plan import MEMORY_KINDS, TIME_KINDS, RankMemory, Traffic, timeline_text
from megamem.ir.schedule import Barriers, Placement, Schedule
from megamem.ir.workload import PipelineCosts, StageCost, VocabularyCost
from megamem.planner.costs.copies import CopiedLayer, Stalls, stalls
from megamem.planner.costs.layer import LayerTime, PassTime
from megamem.planner.costs.recompute import replay_seconds
from megamem.planner.costs.work import output_flops, output_traffic, projection_flops
from megamem.planner.hardware import Hardware
from megamem.planner.layer_options import STOCK_LAYERS, LayerOptions
from megamem.planner.memory.activations import ActivationMemory, Kind
from megamem.planner.memory.device import output_bytes, shared_bytes, static_bytes, transient_bytes
from megamem.planner.memory.ledger import Book, LayerBytes
from megamem.planner.memory.parameters import (
    Parameters,
    stage_parameters,
    stage_passes,
    states_of,
    vocabulary_parameters,
)
from megamem.planner.schedules.simulator import Simulation, simulate

_NOTHING = 1e-9  # of a step: what rounding leaves of a kind that takes no time
OPTIMIZER_BYTES = 34
"""Read and written per parameter of a rank's share by Adam: gradient, fp32 weight and both moments in, the last three
and the bf16 weight out, and the gradient once more for its norm."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a job is run.

    schedule:    of its pipeline; one rank for none
    plan:        fates of the activations; None: left to autograd
    fused_loss, barriers:  the output layer: whole on the last stage, fused with its loss, or shared by all ranks
    keep_logits: those of a shared output layer are kept from S to T
    static:      the allocator works from a plan
    recompute_all:  Megatron's full recomputation, which runs attention again
    more:        microbatches of the step beyond those of the schedule: one more of each takes as long as the busiest
                 rank computes, and changes no peak, once a schedule has reached its steady state
    """

    schedule: Schedule
    plan: ActivationPlan | None = None
    fused_loss: bool = False
    barriers: Barriers | None = None
    keep_logits: bool = False
    static: bool = False
    recompute_all: bool = False
    more: int = 0

    @property
    def microbatches(self) -> int:
        """Of the whole step."""
        return self.schedule.num_microbatches + self.more


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """One microbatch on one stage: seconds of F, B and W, and of everything in them by kind."""

    forward: float
    backward: float
    weight: float
    kinds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Priced:
    """What a setup takes. `busiest` is the pipeline rank whose time is divided into kinds."""

    setup: Setup
    step_seconds: float
    time: Mapping[str, float]
    memory: tuple[RankMemory, ...]
    traffic: Traffic
    simulation: Simulation
    books: tuple[Book, ...]
    busiest: int

    @property
    def peak(self) -> int:
        """Device memory of the fullest rank."""
        return max(rank.peak for rank in self.memory)

    @property
    def host(self) -> int:
        """Host memory of the rank that needs most."""
        return max(rank.host for rank in self.memory)

    def fits(self, host: float) -> bool:
        """Whether every rank's device memory suffices, and `host` bytes of host memory do."""
        return all(rank.peak <= rank.limit for rank in self.memory) and self.host <= host


def with_timelines(priced: Priced) -> tuple[RankMemory, ...]:
    """The memory of all ranks with its timelines, which are long and seldom looked at."""
    found = []
    for memory, book, times in zip(priced.memory, priced.books, priced.simulation.times, strict=True):
        curve = [(0.0, 0.0)]
        for (start, end), during, after in zip(times, book.during, book.after, strict=True):
            curve += [(start, float(during.total)), (end, float(after))]
        found.append(replace(memory, timeline=timeline_text(sorted(curve, key=lambda point: point[0]))))
    return tuple(found)


class Model:
    """A job on some hardware; what does not depend on the setup is computed once.

    device_limit:  bytes of device memory for training; None: all that the device has but its headroom
    options:       what changes what its layers save
    """

    def __init__(
        self, job: Job, hardware: Hardware, device_limit: int | None = None, options: LayerOptions = STOCK_LAYERS
    ) -> None:
        self.job, self.hardware, self.options = job, hardware, options
        self.limit = hardware.for_training if device_limit is None else device_limit
        self._layers: dict[bool, LayerTime] = {}
        self._transients: dict[bool, tuple[int, int]] = {}
        self._kinds: dict[Job, dict[bool, Kind]] = {}
        self._untouched: dict[str | None, ActivationMemory] = {}

    def layer(self, number: int) -> LayerTime:
        """The times of a layer; layers that are alike share them."""
        is_moe = self.job.model.is_moe(number)
        if is_moe not in self._layers:
            self._layers[is_moe] = LayerTime(self.job, number, self.hardware, self.options)
        return self._layers[is_moe]

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes per second to and from host memory: in a pipeline both directions work at once."""
        if self.job.layout.pipeline == 1:
            return self.hardware.to_host, self.hardware.from_host
        return self.hardware.to_host_both, self.hardware.from_host_both

    def transients(self, number: int) -> tuple[int, int]:
        """Working space of a layer's forward and backward pass."""
        is_moe = self.job.model.is_moe(number)
        if is_moe not in self._transients:
            self._transients[is_moe] = transient_bytes(self.job, number, self.options)
        return self._transients[is_moe]

    @cached_property
    def output(self) -> tuple[float, float]:
        """Seconds of the output layer's product, and of the loss, forward and backward; with multi-token prediction
        those of all depths, and its projections among the products."""
        depths = self.job.model.mtp_num_layers
        logits = (1 + depths) * output_flops(self.job) + depths * projection_flops(self.job)
        return logits / self.hardware.gemm, (1 + depths) * output_traffic(self.job) / self.hardware.hbm

    @cached_property
    def hop(self) -> float:
        """A message between neighbouring pipeline ranks."""
        layout = self.job.layout
        if layout.pipeline == 1:
            return 0.0
        nbytes = self.job.tokens * self.job.model.hidden_size * self.job.itemsize
        stride = layout.world_size // layout.pipeline  # pipeline ranks are the outermost dimension
        return nbytes / self.hardware.bandwidth(2, stride) + self.hardware.latency

    def memory(self, plan: ActivationPlan | None, *, recompute: str | None = None) -> ActivationMemory:
        """What the layers hold under an activation plan; with `recompute`, as if Megatron recomputed that."""
        if plan is None and recompute in self._untouched:
            return self._untouched[recompute]
        job = self.job
        if recompute is not None:
            job = replace(job, recompute=recompute, recompute_method="uniform", recompute_num_layers=1)
        memory = ActivationMemory(job, plan, self.options, self._kinds)
        if plan is None:
            self._untouched[recompute] = memory
        return memory

    def price(self, setup: Setup) -> Priced:
        """Time and memory of a setup."""
        return _Pricing(self, setup).run()

    def step_seconds(self, setup: Setup) -> float:
        """The time of a step alone, in a fraction of the effort."""
        return _Pricing(self, setup).step_seconds()


class _Pricing:
    """The steps of one price."""

    def __init__(self, model: Model, setup: Setup) -> None:
        self.model, self.setup, self.job = model, setup, model.job
        self.placement: Placement = setup.schedule.placement
        self.memory = model.memory(setup.plan, recompute="full" if setup.recompute_all else None)
        self.job = self.memory.job
        self.last = self.placement.num_stages - 1

    def run(self) -> Priced:
        stages = [self._stage(stage) for stage in range(self.placement.num_stages)]
        simulation = simulate(self.setup.schedule, self._costs(stages))
        books = self.memory.books(self.setup.schedule)
        busiest, kinds = self._kinds(stages, simulation)
        return Priced(
            setup=self.setup,
            step_seconds=sum(kinds.values()),
            time={kind: kinds[kind] for kind in TIME_KINDS if kinds[kind] > _NOTHING * simulation.makespan},
            memory=tuple(self._rank(rank, book) for rank, book in enumerate(books)),
            traffic=self._traffic(books, stages),
            simulation=simulation,
            books=books,
            busiest=busiest,
        )

    def step_seconds(self) -> float:
        """As `run` has it, without looking at memory."""
        stages = [self._stage(stage) for stage in range(self.placement.num_stages)]
        _, kinds = self._kinds(stages, simulate(self.setup.schedule, self._costs(stages)))
        return sum(kinds.values())

    # -- time ------------------------------------------------------------------------------------------------------

    def _stage(self, stage: int) -> StageTime:
        kinds = dict.fromkeys(TIME_KINDS, 0.0)
        forward = backward = weight = 0.0
        layers = self.memory.stage(stage)
        copied: list[CopiedLayer] = []
        for number, bytes_of in zip(stage_passes(self.job, stage), layers, strict=True):
            times, again = self.model.layer(number), self._again(number, bytes_of)
            _add(kinds, times.forward, times.backward, times.weight)
            coding = bytes_of.packed / self.model.hardware.hbm  # and as much to read codes
            kinds["recompute"] += again
            kinds["elementwise"] += 2 * coding
            ahead, behind = times.forward.total + coding, times.backward.total + coding + again
            forward += ahead
            backward += behind
            weight += times.weight.total
            copied.append(CopiedLayer(ahead, behind + times.weight.total, float(bytes_of.host)))
        waits = self._waits(stage, copied)
        kinds["exposed_copies"] += waits.forward + waits.backward
        forward, backward = forward + waits.forward, backward + waits.backward
        if stage == self.last and self.setup.barriers is None:
            logits, loss = self.model.output
            again = logits if self.setup.fused_loss else 0.0
            kinds["output_layer"] += 3 * logits + loss
            kinds["recompute"] += again
            forward, backward, weight = (
                forward + logits + loss / 2,
                backward + logits + loss / 2 + again,
                weight + logits,
            )
        return StageTime(forward=forward, backward=backward, weight=weight, kinds=kinds)

    def _again(self, number: int, layer: LayerBytes) -> float:
        """Recomputation of a layer."""
        always = self.model.layer(number).again
        if self.setup.plan is None:
            return always + self._again_by_megatron(number, layer)
        before = None if layer.stores_input else self.model.layer(number - 1)
        tensors = self.memory.kind(number).tensors
        replay = replay_seconds(self.model.layer(number), tensors, self.setup.plan.rule(number), before=before)
        again = self.setup.plan.experts_again and self.job.model.is_moe(number)
        return always + replay + (self.model.layer(number).experts if again else 0.0)

    def _again_by_megatron(self, number: int, layer: LayerBytes) -> float:
        forward = self.model.layer(number).forward
        if self.job.recompute == "full":
            return forward.total if layer.back else 0.0
        if self.job.recompute != "selective":
            return 0.0
        return self.model.layer(number).selected(self.job.recompute_modules)

    def _waits(self, stage: int, copied: Sequence[CopiedLayer]) -> Stalls:
        to_host, from_host = self.model.rates
        return stalls(copied, to_host, from_host, turns_around=stage == self.last)

    def _costs(self, stages: Sequence[StageTime]) -> PipelineCosts:
        rows = []
        for number, stage in enumerate(stages):
            layers = self.memory.stage(number)
            kept = float(sum(layer.kept for layer in layers))
            waiting = float(sum(layer.weight_gradients for layer in layers))
            rows.append(
                StageCost(
                    forward=stage.forward,
                    backward=stage.backward,
                    weight=stage.weight,
                    activation=max(kept, waiting),
                    weight_grad=waiting,
                    offload=sum(layer.host for layer in layers) / self.model.rates[0],
                )
            )
        return PipelineCosts(stages=tuple(rows), comm=self.model.hop, vocabulary=self._share())

    def _share(self) -> VocabularyCost | None:
        if self.setup.barriers is None:
            return None
        ranks, hardware = self.placement.num_ranks, self.model.hardware
        logits = output_flops(self.job, ranks) / hardware.gemm
        loss = output_traffic(self.job, ranks) / hardware.hbm
        lookup = 3 * self.job.tokens * self.job.model.hidden_size * self.job.itemsize / hardware.hbm
        return VocabularyCost(
            logits=logits + loss / 2,
            input_grad=logits,
            weight_grad=logits,
            embed=lookup,
            embed_grad=lookup,
            collective=2 * self.model.hop,
            kept=float(self._shared_bytes),
            recompute=loss / 2 if self.setup.keep_logits else None,  # T reads them all the same
        )

    def _kinds(self, stages: Sequence[StageTime], simulation: Simulation) -> tuple[int, dict[str, float]]:
        """The rank that computes longest, and where its time goes; what is left is bubble."""
        count = self.setup.microbatches
        totals = []
        for rank in range(self.placement.num_ranks):
            mine = [stages[self.placement.stage(rank, chunk)] for chunk in range(self.placement.num_chunks)]
            totals.append({kind: count * sum(stage.kinds[kind] for stage in mine) for kind in TIME_KINDS})
            if (share := simulation.costs.vocabulary) is not None and self.setup.barriers is not None:
                spent = [share.seconds(kind, self.setup.barriers) for kind in ("S", "T", "IF", "IB")]
                totals[-1]["output_layer"] += count * sum(spent)
        busiest = max(range(len(totals)), key=lambda rank: sum(totals[rank].values()))
        kinds = totals[busiest]
        busy = sum(kinds.values()) * self.setup.schedule.num_microbatches / count
        kinds["bubble"] = max(0.0, simulation.makespan - busy)
        kinds["optimizer"], kinds["data_parallel"] = self._after_step(stages)
        return busiest, kinds

    def _after_step(self, stages: Sequence[StageTime]) -> tuple[float, float]:
        """The optimizer's step, and the reduction and gathering that computing does not hide, of the slowest rank."""
        layout, hardware = self.job.layout, self.model.hardware
        optimizer = exposed = 0.0
        for rank in range(self.placement.num_ranks):
            parameters = self._parameters(rank)
            states = states_of(self.job, parameters)
            per_parameter = 3 if self.job.bf16 else 2
            optimizer = max(optimizer, states.optimizer / (4 * per_parameter) * OPTIMIZER_BYTES / hardware.hbm)
            ranks = layout.data * layout.context
            if ranks == 1:
                continue
            share = (ranks - 1) / ranks / hardware.bandwidth(ranks, layout.tensor)
            reduce, gather = states.gradients * share, states.weights * share
            if not layout.distributed_optimizer:
                reduce, gather = 2 * reduce, 0.0
            mine = [stages[self.placement.stage(rank, chunk)] for chunk in range(self.placement.num_chunks)]
            if self.job.overlap:
                reduce = max(0.0, reduce - sum(stage.backward + stage.weight for stage in mine))
                gather = max(0.0, gather - sum(stage.forward for stage in mine))
            exposed = max(exposed, reduce + gather)
        return optimizer, exposed

    def _parameters(self, rank: int) -> Parameters:
        sharded = self.setup.barriers is not None
        found = vocabulary_parameters(self.job) if sharded else Parameters()
        for chunk in range(self.placement.num_chunks):
            found += stage_parameters(self.job, self.placement.stage(rank, chunk), shards_vocabulary=sharded)
        return found

    # -- memory ----------------------------------------------------------------------------------------------------

    def _rank(self, rank: int, book: Book) -> RankMemory:
        kinds: dict[str, int] = dict.fromkeys(MEMORY_KINDS, 0)
        kinds |= static_bytes(
            self.job, self.placement, rank, self.model.hardware, shards_vocabulary=self.setup.barriers is not None
        )
        hardware = self.model.hardware
        share = hardware.fragmentation_arena if self.setup.static else hardware.fragmentation_caching
        chunks = range(self.placement.num_chunks)
        spaces = {
            (kind, chunk): self._space(kind, rank, chunk) for kind in ("S", "T", "F", "B", "BW") for chunk in chunks
        }
        fullest, most, shared = (book.peak, 0, 0), -1, 0
        for (kind, chunk, _, _, _), moment in zip(self.setup.schedule.ranks[rank], book.during, strict=True):
            if kind == "S":
                shared += self._shared_bytes
            output, space = spaces.get((kind, chunk), (0, 0))
            total = sum(moment) + output + shared + space
            if total > most:
                fullest, most = (moment, output + shared, space), total
            if kind == "T":
                shared -= self._shared_bytes
        moment, output, space = fullest
        kinds |= moment._asdict() | {"output_layer": output, "transients": space}
        kinds["fragmentation"] = round(share * max(0, most))
        return RankMemory(
            rank=rank,
            kinds={kind: nbytes for kind, nbytes in kinds.items() if nbytes},
            limit=self.model.limit,
            host=book.host,
        )

    @cached_property
    def _shared_bytes(self) -> int:
        """Of a microbatch between S and T."""
        setup, ranks = self.setup, self.placement.num_ranks
        return shared_bytes(self.job, setup.barriers or 1, shards=ranks, keep_logits=setup.keep_logits)

    def _space(self, kind: str, rank: int, chunk: int) -> tuple[int, int]:
        """Bytes that an action holds besides what layers save: of the output layer, and working space."""
        words = self.model.options.loss_chunk
        if kind in ("S", "T"):
            ranks, sums = self.placement.num_ranks, self.setup.barriers == 2
            return output_bytes(self.job, fused=True, shards=ranks, chunk=words, sums_gradient=sums), 0
        stage = self.placement.stage(rank, chunk)
        numbers = stage_passes(self.job, stage)
        pairs = [self.model.transients(number) for number in (*numbers[:1], *numbers[-1:])]
        space = max((pair[0 if kind == "F" else 1] for pair in pairs), default=0)
        if stage == self.last and self.setup.barriers is None:
            return output_bytes(self.job, fused=self.setup.fused_loss, chunk=words), space
        return 0, space

    def _traffic(self, books: Sequence[Book], stages: Sequence[StageTime]) -> Traffic:
        rank = max(range(len(books)), key=lambda number: books[number].to_host)
        book, (to_host, from_host) = books[rank], self.model.rates
        mine = [stages[self.placement.stage(rank, chunk)] for chunk in range(self.placement.num_chunks)]
        scale = self.setup.microbatches / self.setup.schedule.num_microbatches
        return Traffic(
            to_host=round(scale * book.to_host),
            from_host=round(scale * book.from_host),
            link_seconds=scale * max(book.to_host / to_host, book.from_host / from_host),
            exposed_seconds=sum(stage.kinds["exposed_copies"] for stage in mine) * self.setup.microbatches,
        )


def _add(kinds: dict[str, float], *passes: PassTime) -> None:
    for one in passes:
        for kind, seconds in vars(one).items():
            kinds[kind] += seconds
