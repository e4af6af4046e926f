"""Activation memory of every pipeline rank: the inventory of its layers, the rules, and the schedule together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megamem.ir.activation import ActivationPlan, LayerRule
from megamem.ir.job import Job
from megamem.ir.schedule import Placement, Schedule
from megamem.planner.layer_options import STOCK_LAYERS, LayerOptions
from megamem.planner.memory.formats import with_options
from megamem.planner.memory.inventory import (
    Anchor,
    Saved,
    anchors_of,
    output_weight_gradient_bytes,
    saved_tensors,
    storage_bytes,
    weight_gradient_bytes,
)
from megamem.planner.memory.ledger import Book, LayerBytes, layer_bytes, untouched_bytes
from megamem.planner.memory.moves import Moves
from megamem.planner.memory.parameters import stage_passes
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Layers that are alike: with experts, or without."""

    tensors: tuple[Saved, ...]
    anchors: tuple[Anchor, ...]
    weight_gradients: int
    tiles: int


class ActivationMemory:
    """The layers of one job under one activation plan, by stage of the model.

    options:  what changes what layers save
    kinds:    the tensors of its layers, as far as they are known already

    Without a plan they are left to autograd, and to Megatron's own recomputation as far as the job has it; a plan takes
    its place.
    """

    def __init__(
        self,
        job: Job,
        plan: ActivationPlan | None,
        options: LayerOptions = STOCK_LAYERS,
        kinds: dict[Job, dict[bool, Kind]] | None = None,
    ) -> None:
        self.job, self.plan, self.options = job if plan is None else replace(job, recompute="none"), plan, options
        self._base_apart = plan is not None and any(not rule.store_input for rule in plan.rules if not rule.untouched)
        self._kinds = {} if kinds is None else kinds.setdefault(self.job, {})
        self._stages: dict[int, list[LayerBytes]] = {}
        self._made: dict[tuple[bool, int, bool, bool], LayerBytes] = {}

    def books(self, schedule: Schedule) -> tuple[Book, ...]:
        """What every rank of the schedule holds, action by action."""
        placement = schedule.placement
        offloads = any(action.kind == "OFFLOAD" for actions in schedule.ranks for action in actions)
        splits_vocabulary = schedule.shards_vocabulary
        moves = Moves(base_apart=self._base_apart)
        return tuple(
            moves.book(
                self.chunks(placement, rank),
                self.spared(placement, rank) if offloads else None,
                [0 if splits_vocabulary else self._end(placement, rank, c) for c in range(placement.num_chunks)],
                schedule.ranks[rank],
            )
            for rank in range(placement.num_ranks)
        )

    def chunks(self, placement: Placement, rank: int) -> list[list[LayerBytes]]:
        """The layers of each chunk of a rank."""
        return [self.stage(placement.stage(rank, chunk)) for chunk in range(placement.num_chunks)]

    def spared(self, placement: Placement, rank: int) -> list[list[LayerBytes]]:
        """The same layers, left to autograd."""
        stages = (placement.stage(rank, chunk) for chunk in range(placement.num_chunks))
        return [self._alone(stage_passes(self.job, stage), self._untouched) for stage in stages]

    def stage(self, stage: int) -> list[LayerBytes]:
        """The layers of one stage, in the order of the model."""
        if stage not in self._stages:
            self._stages[stage] = self._stage(stage)
        return self._stages[stage]

    def _stage(self, stage: int) -> list[LayerBytes]:
        layers, last = stage_passes(self.job, stage), self.job.model.num_layers
        if self.plan is None:
            return self._alone(layers, self._stock)
        made: list[LayerBytes] = []
        previous_can_rebuild = False
        for index, number in enumerate(layers):
            rule = self.plan.rule(number)
            stores = rule.store_input or not previous_can_rebuild or number > last
            held = index == 0 and stage > 0
            found = self._under(number, rule, input_is_held=held, stores_input=stores)
            made.append(replace(found, begins=True) if number > last else found)
            replays = self._base_apart or made[-1].back > 0
            previous_can_rebuild = not rule.untouched and replays and not self.job.model.is_moe(number)
        return made

    def _alone(self, layers: Sequence[int], made: Callable[[Sequence[int]], list[LayerBytes]]) -> list[LayerBytes]:
        """The layers of a stage as `made` has them; each of multi-token prediction for itself."""
        own = [number for number in layers if number <= self.job.model.num_layers]
        more = [layer for number in layers[len(own) :] for layer in made([number])]
        return [*made(own), *(replace(layer, begins=True) for layer in more)]

    def kind(self, number: int) -> Kind:
        """The tensors and anchors of a layer."""
        is_moe = self.job.model.is_moe(number)
        if is_moe not in self._kinds:
            tiles = self.options.tiles(self.job, number)
            self._kinds[is_moe] = Kind(
                tensors=tuple(with_options(saved_tensors(self.job, number), self.job, number, self.options)),
                anchors=anchors_of(self.job, number),
                weight_gradients=weight_gradient_bytes(self.job, number, tiles=tiles),
                tiles=tiles,
            )
        return self._kinds[is_moe]

    def _under(self, number: int, rule: LayerRule, *, input_is_held: bool, stores_input: bool) -> LayerBytes:
        """Of a layer under a rule."""
        is_moe = self.job.model.is_moe(number)
        key = is_moe, id(rule), input_is_held, stores_input
        if key not in self._made:
            kind = self.kind(number)
            found = layer_bytes(
                self._own(kind) if rule.untouched else [one for one in kind.tensors if not one.shared],
                kind.anchors,
                rule,
                tokens=self.job.seq_length // self.job.layout.sequence_shards,
                input_is_held=input_is_held,
                base_apart=self._base_apart and not is_moe,
                stores_input=stores_input,
                num_tiles=kind.tiles,
            )
            self._made[key] = self._made_again(replace(found, weight_gradients=kind.weight_gradients), kind)
        return self._made[key]

    def _made_again(self, layer: LayerBytes, kind: Kind) -> LayerBytes:
        """The layer with its experts' tensors left out, where they are recomputed."""
        if self.plan is None or not self.plan.experts_again:
            return layer
        again = storage_bytes(one for one in kind.tensors if one.routed)
        return replace(layer, routed=0, again=again)

    def _own(self, kind: Kind) -> Sequence[Saved]:
        """What a layer saves where autograd decides: without its experts' tensors, where they are recomputed."""
        again = self.plan is not None and self.plan.experts_again
        return [one for one in kind.tensors if not (again and one.routed)]

    def _stock(self, numbers: Sequence[int]) -> list[LayerBytes]:
        """The layers of a stage as Megatron runs them."""
        made = self._untouched(numbers)
        if self.job.recompute != "full":
            return made
        by_block = self.job.recompute_method == "block"
        size = 1 if by_block else self.job.recompute_num_layers
        last = self.job.recompute_num_layers if by_block else len(made)
        for start in range(0, min(last, len(made)), size):
            made[start : start + size] = self._recomputed(numbers[start : start + size], is_first=start == 0)
        return made

    def _recomputed(self, numbers: Sequence[int], *, is_first: bool) -> list[LayerBytes]:
        """Layers that are made again together, from the input of the first: each holds those before it as well.

        With the first of a stage goes what all were given: the mask.
        """
        made: list[LayerBytes] = []
        back = 0
        for index, number in enumerate(numbers):
            kind = self.kind(number)
            whole = storage_bytes(one for one in kind.tensors if not one.shared)
            if index:
                kept, back = 0, back + whole
            else:
                given = self.job.tokens * self.job.model.hidden_size * self.job.itemsize
                kept = given + storage_bytes(one for one in kind.tensors if one.shared and is_first)
                saves_input = any(one.name == "layer_input" and not one.on_demand for one in kind.tensors)
                back = whole - given * saves_input
            made.append(LayerBytes(kept=kept, back=back, weight_gradients=kind.weight_gradients))
        return made

    def _untouched(self, numbers: Sequence[int]) -> list[LayerBytes]:
        """The layers of a stage left to autograd; what they share is with the first, whose backward pass is last."""
        made = []
        for index, number in enumerate(numbers):
            kind = self.kind(number)
            tensors = [one for one in self._own(kind) if index == 0 or not one.shared]
            again = [one for one in tensors if self._is_selected(one, self.job.model.is_moe(number))]
            found = untouched_bytes(one for one in tensors if one not in again)
            found = replace(found, again=storage_bytes(again), weight_gradients=kind.weight_gradients)
            made.append(self._made_again(found, kind))
        return made

    def _is_selected(self, one: Saved, is_moe: bool) -> bool:
        """Whether Megatron's selective recomputation makes a tensor again: its checkpoints of an MLP, an MoE layer or
        its shared experts keep their input alone. Core attention is left out of `saved_tensors`.
        """
        modules = self.job.recompute_modules
        if self.job.recompute != "selective" or one.storage.name == "n2":
            return False
        if not is_moe or "moe" in modules:
            return one.name.startswith("mlp") and ("moe" if is_moe else "mlp") in modules
        return one.name.startswith("mlp.shared_experts") and "shared_experts" in modules

    def _end(self, placement: Placement, rank: int, chunk: int) -> int:
        is_last = placement.stage(rank, chunk) == placement.num_stages - 1
        return output_weight_gradient_bytes(self.job) if is_last else 0


def single_rank_schedule(num_microbatches: int) -> Schedule:
    """Without pipeline parallelism: forward and backward pass of one microbatch after the other."""
    return build_schedule("1f1b", Request(num_ranks=1, num_microbatches=num_microbatches))


def metered_peaks(
    job: Job, plan: ActivationPlan | None, schedule: Schedule, options: LayerOptions = STOCK_LAYERS
) -> Sequence[int]:
    """The bytes that `Handle.meter` of every pipeline rank shows at most after a training step."""
    return [book.metered for book in ActivationMemory(job, plan, options).books(schedule)]
