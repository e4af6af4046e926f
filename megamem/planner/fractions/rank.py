"""The problem of one pipeline rank under a schedule, and the activation plan that the solutions of all ranks make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megamem.errors import InfeasibleError
from megamem.ir.activation import BASE, RECOMPUTE, SAVED, Fate
from megamem.ir.schedule import Schedule
from megamem.planner.activations import CODED
from megamem.planner.evaluation import Model
from megamem.planner.fractions.linear import has_many_optima, is_available, solve
from megamem.planner.fractions.problem import Group, Limits, Problem, Solution
from megamem.planner.fractions.table import Realised, nearness, realise, rows_of
from megamem.planner.memory.activations import ActivationMemory
from megamem.planner.memory.inventory import Anchor, Saved, storage_bytes
from megamem.planner.memory.parameters import stage_layers

Fates = dict[str, Fate]
ExpertFate = Literal["keep", "swap", "recompute"]
"""`activations.experts`: of all of them, in all layers."""


def expert_fates(model: Model) -> tuple[ExpertFate, ...]:
    """Those to weigh, what costs nothing first; one where there are no experts."""
    return ("keep",) if model.job.model.experts is None else ("keep", "recompute", "swap")


def least_over_experts(model: Model, cost: Callable[[ExpertFate], float]) -> float:
    """The least cost over what may become of experts' tensors. Raises the first InfeasibleError where none can be."""
    fault: InfeasibleError | None = None
    found = []
    for experts in expert_fates(model):
        try:
            found.append(cost(experts))
        except InfeasibleError as error:
            fault = fault or error
    if fault is not None and not found:
        raise fault
    return min(found)


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A group of the problem and the layers that are in it."""

    group: Group
    numbers: tuple[int, ...]
    chunk: int


def groups_of(
    model: Model, schedule: Schedule, rank: int, every: int = 1, experts: ExpertFate = "keep"
) -> list[Assigned]:
    """The groups of a rank: per chunk its dense layers and those with experts.

    every:    `activations.residual_every`; of `every` layers one stores its input, the others rebuild it
    experts:  `activations.experts`
    """
    placement, memory = schedule.placement, model.memory(None, recompute="none")
    undivided = any(action.kind == "BW" for action in schedule.ranks[rank])
    found = []
    for chunk in range(placement.num_chunks):
        numbers = stage_layers(model.job, placement.stage(rank, chunk))
        for is_moe in (False, True):
            alike = tuple(number for number in numbers if model.job.model.is_moe(number) == is_moe)
            if alike:
                group = _group(model, memory, alike, undivided=undivided)
                if is_moe:
                    moved = sum(one.nbytes for one in memory.kind(alike[0]).tensors if one.routed)
                    group = _with_experts(group, float(moved), model.layer(alike[0]).experts, experts)
                if every > 1 and not is_moe:
                    group = _sparse(group, model.layer(alike[0]).residual, every)
                found.append(Assigned(group=group, numbers=alike, chunk=chunk))
    return found


def _group(model: Model, memory: ActivationMemory, numbers: Sequence[int], *, undivided: bool) -> Group:
    kind, times = memory.kind(numbers[0]), model.layer(numbers[0])
    own = [one for one in kind.tensors if not one.routed]
    rest = [one for one in own if one.rebuilt]
    scratch = sum(one.nbytes for one in own if not one.rebuilt and one.name not in BASE)
    base = {one.name: float(one.nbytes) for one in own if one.name in BASE}
    base["attention_output"] += scratch  # the log-sum-exp goes where attention's output goes
    again = 0.0 if model.job.model.latent is None else times.anchor("qkv")
    anchors = {anchor.name: float(anchor.nbytes) for anchor in kind.anchors}
    if model.options.codes_activations and "fc1" in anchors:  # stored in its place
        anchors["fc1"] = float(sum(one.nbytes for one in rest if one.name == CODED))
    sent, coding = _in_codes(model, kind.anchors, rest)
    tiled = float(sum(one.nbytes for one in rest if one.tiled))
    away = max(0.0, 1.0 - 2.0 / kind.tiles) if kind.tiles else 0.0
    return Group(
        layers=len(numbers),
        nbytes={
            **base,
            **anchors,
            SAVED: float(sum(one.nbytes for one in rest)),
        },
        seconds={**times.anchors, SAVED: times.rebuild + again},
        forward=times.forward.total,
        backward=times.backward.total + times.again + (times.weight.total if undivided else 0.0),
        held=float(storage_bytes(one for one in kind.tensors if one.routed)),
        storage={SAVED: float(storage_bytes(rest))},
        sent=sent,
        coding=coding,
        beside={SAVED: away * tiled, "fc1": away * anchors.get("fc1", 0.0)} if tiled else {},
    )


def _in_codes(
    model: Model, anchors: Sequence[Anchor], rest: Sequence[Saved]
) -> tuple[dict[str, float], dict[str, float]]:
    """With `activations.compress` the bytes of `saved` and anchors that travel, and the seconds of codecs both ways."""
    travels = model.options.travels_coded
    coded = [one for one in rest if one.coded and travels(one.name)]
    sizes = {one.name: (one.nbytes, one.coded) for one in anchors if travels(one.name)}
    if coded:
        sizes[SAVED] = sum(one.nbytes for one in coded), sum(one.coded for one in coded)
    sent = {name: float(codes) for name, (_, codes) in sizes.items()}
    if coded:
        sent[SAVED] += sum(one.nbytes for one in rest) - sizes[SAVED][0]
    return sent, {name: 2 * sum(pair) / model.hardware.hbm for name, pair in sizes.items()}


def _with_experts(group: Group, moved: float, seconds: float, experts: ExpertFate) -> Group:
    """The group with its experts' tensors where they go: `moved` bytes of a layer, `seconds` to make them again."""
    if experts == "swap":
        return replace(group, held=0.0, moved=moved)
    if experts == "recompute":
        return replace(group, held=0.0, again=group.held, again_seconds=seconds, backward=group.backward + seconds)
    return group


def _sparse(group: Group, residual: float, every: int) -> Group:
    """The group where only every `every`-th layer stores its input; the others cost a pass without attention."""
    nbytes = {**group.nbytes, "layer_input": group.nbytes["layer_input"] / every}
    return replace(group, nbytes=nbytes, backward=group.backward + residual * (every - 1) / every)


def moments_of(schedule: Schedule, rank: int, assigned: Sequence[Assigned]) -> tuple[tuple[float, ...], ...]:
    """Microbatches of each group that are held together, at the moments that no other exceeds everywhere."""
    now = [0] * schedule.placement.num_chunks
    seen: set[tuple[int, ...]] = set()
    for action in schedule.ranks[rank]:
        if action.kind == "F":
            now[action.chunk] += 1
            seen.add(tuple(now))
        elif action.kind in ("B", "BW"):
            now[action.chunk] -= 1
    most = [one for one in seen if not any(other != one and all(map(int.__ge__, other, one)) for other in seen)]
    return tuple(tuple(float(one[item.chunk]) for item in assigned) for one in sorted(most))


def problem_of(
    model: Model,
    schedule: Schedule,
    rank: int,
    device: float,
    host: float,
    every: int = 1,
    experts: ExpertFate = "keep",
) -> tuple[Problem, list[Assigned]]:
    """What is to be decided on a rank that has `device` bytes for activations, and `host` bytes of host memory."""
    assigned = groups_of(model, schedule, rank, every, experts)
    to_host, from_host = model.rates
    problem = Problem(
        groups=tuple(item.group for item in assigned),
        limits=Limits(device=device, host=host, to_host=to_host, from_host=from_host),
        moments=moments_of(schedule, rank, assigned),
    )
    return problem, assigned


def fates_of(model: Model, problem: Problem, assigned: Sequence[Assigned]) -> tuple[dict[int, Fates], float, float]:
    """Of what `problem_of` makes: fates by layer number, the seconds per microbatch they cost, and the optimum's.

    Raises InfeasibleError.
    """
    best = solve(problem)
    found = _realised(problem, best)
    fates: dict[int, Fates] = {}
    for item, parts in zip(assigned, found.parts, strict=True):
        for numbers, row in rows_of(item.numbers, item.group, parts):
            fates |= dict.fromkeys(numbers, _of_codes(row) if model.options.codes_activations else row)
    return fates, found.seconds, best.seconds


def _realised(problem: Problem, optimum: Solution) -> Realised:
    """The better of the tables near two optima, where the first is not near enough: of many, a solver finds any."""
    has_others = optimum.method == "simplex" and is_available() and has_many_optima(problem)
    found: Realised | None = None
    try:
        found = realise(problem, optimum)
    except InfeasibleError:
        if not has_others:
            raise
    if found is not None and (not has_others or found.seconds <= optimum.seconds + nearness(problem)):
        return found
    other = realise(problem, solve(problem, "highs"))
    return other if found is None or other.seconds < found.seconds else found


def _of_codes(row: Fates) -> Fates:
    """A row for layers whose activation functions save codes: what was decided on fc1 is their fate."""
    stored = max((row[name] for name in ("fc1", SAVED) if name in row), key=lambda fate: fate.fraction)
    return {**row, **({"fc1": RECOMPUTE} if "fc1" in row else {}), CODED: stored}
