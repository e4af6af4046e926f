"""From the optimum of the linear programme to rows of `activations.table`, which the runtime executes.

The runtime gives each tensor of a layer one tier, the optimum may give it two. So a group of layers is cut in two: in
the layers at the back, whose backward pass comes first, such a tensor is kept, in those at the front it is swapped.
With the tiers settled so the programme is solved again, which evens out the copies of the two parts. What is lost is
what whole layers cannot express; it is measured (`Realised.seconds` against `Solution.seconds`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megamem.errors import InfeasibleError
from megamem.ir.activation import ANCHORS, BASE, SAVED, Fate
from megamem.planner.fractions.linear import solve
from megamem.planner.fractions.problem import Group, Problem, Shares, Solution, cost, fits

_DIGITS = 4  # of a fraction in the table
_MOST_TRIES = 4  # cuts and tiers that are priced
_NEAR = 5e-4  # of the rank's computing: so near the optimum no further cut is tried


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive layers with the same fates: how many, and the shares of their tensors, one tier each."""

    layers: int
    shares: Shares


@dataclass(frozen=True, kw_only=True)
class Realised:
    """What the runtime can do of an optimum: parts per group, front to back, and the seconds it costs the rank."""

    parts: tuple[tuple[Part, ...], ...]
    seconds: float


def realise(problem: Problem, optimum: Solution) -> Realised:
    """The best parts with one tier per tensor near the optimum. Raises InfeasibleError where none fits."""
    best: Realised | None = None
    near = nearness(problem)
    for tries, cut in enumerate(_cuts(problem, optimum)):
        if tries >= _MOST_TRIES:
            break
        try:
            found = _settled(problem, cut)
        except InfeasibleError:
            continue
        if best is None or found.seconds < best.seconds - 1e-12:
            best = found
        if best.seconds <= optimum.seconds + near:
            break
    if best is None:
        raise InfeasibleError("no table with one tier per tensor fits; give more host or device memory")
    return best


def nearness(problem: Problem) -> float:
    """Seconds per microbatch that make no difference."""
    return _NEAR * sum(group.layers * (group.forward + group.backward) for group in problem.groups)


_Cut = list[list[tuple[int, dict[str, str]]]]
"""Per group its parts: how many layers, and each tensor's tier."""


def _cuts(problem: Problem, optimum: Solution) -> Iterator[_Cut]:
    """Ways to cut the groups, the most promising first."""
    choices = [list(_cuts_of(group, one)) for group, one in zip(problem.groups, optimum.shares, strict=True)]
    for combination in product(*choices):
        yield list(combination)


def _cuts_of(group: Group, shares: Shares) -> Iterator[list[tuple[int, dict[str, str]]]]:
    pure = {
        name: "kept" if shares.kept.get(name, 0.0) > shares.swapped.get(name, 0.0) else "swapped"
        for name in group.nbytes
    }
    mixed = [
        name for name in group.nbytes if shares.kept.get(name, 0.0) > 1e-6 and shares.swapped.get(name, 0.0) > 1e-6
    ]
    if not mixed:
        yield [(group.layers, pure)]
        return
    largest = max(mixed, key=lambda name: group.nbytes[name])
    wanted = group.layers * shares.kept[largest] / shares.stored(largest)
    for back in dict.fromkeys((round(wanted), math.floor(wanted), math.ceil(wanted))):
        front = {**pure, **dict.fromkeys(mixed, "swapped")}
        behind = {**pure, **dict.fromkeys(mixed, "kept")}
        parts = [(group.layers - back, front), (back, behind)]
        yield [part for part in parts if part[0]]
    for tiers in product(("kept", "swapped"), repeat=len(mixed)):
        yield [(group.layers, {**pure, **dict(zip(mixed, tiers, strict=True))})]


def _settled(problem: Problem, cut: _Cut) -> Realised:
    """The optimum with these parts and tiers, in fractions that a table can hold."""
    groups: list[Group] = []
    owners: list[int] = []
    for number, (group, parts) in enumerate(zip(problem.groups, cut, strict=True)):
        for layers, tiers in parts:
            groups.append(replace(group, layers=layers, tiers=tiers, of=group.of or group.layers))
            owners.append(number)
    moments = tuple(tuple(moment[owner] for owner in owners) for moment in problem.moments)
    inner = replace(problem, groups=tuple(groups), moments=moments)
    found = solve(inner)
    shares = tuple(_rounded(one) for one in found.shares)
    if not fits(inner, shares):
        raise InfeasibleError("rounded up beyond the limits")
    made: list[list[Part]] = [[] for _ in problem.groups]
    for owner, group, one in zip(owners, groups, shares, strict=True):
        made[owner].append(Part(layers=group.layers, shares=one))
    return Realised(parts=tuple(tuple(parts) for parts in made), seconds=cost(inner, shares))


def _rounded(shares: Shares) -> Shares:
    """Shares with few digits, rounded down; those of the base stay whole."""
    scale = 10**_DIGITS

    def down(name: str, share: float) -> float:
        return 1.0 if name in BASE else math.floor(share * scale + 1e-6) / scale

    return Shares(
        kept={name: value for name, share in shares.kept.items() if (value := down(name, share)) > 0},
        swapped={name: value for name, share in shares.swapped.items() if (value := down(name, share)) > 0},
    )


def fates_of(group: Group, shares: Shares) -> dict[str, Fate]:
    """The fates of a layer, by tensor. An anchor's fraction counts from the first token, as the runtime's does."""
    saved = shares.stored(SAVED)
    fates = {}
    for name in (*BASE, *group.anchors, SAVED):
        if name not in group.nbytes:
            continue
        share = shares.stored(name)
        if name in ANCHORS and share > 0:
            share = round(share + saved, _DIGITS)
            share = 1.0 if share >= 1.0 - 2 / 10**_DIGITS else share  # both were rounded down
        tier = "hbm" if shares.kept.get(name, 0.0) > 0 else "host"
        fates[name] = Fate(fraction=share, tier="hbm" if tier == "hbm" else "host")
    return fates


def rows_of(
    numbers: Sequence[int], group: Group, parts: Sequence[Part]
) -> list[tuple[tuple[int, ...], dict[str, Fate]]]:
    """Layer numbers with their fates, for the group whose layers these are, in order."""
    rows, start = [], 0
    for part in parts:
        rows.append((tuple(numbers[start : start + part.layers]), fates_of(group, part.shares)))
        start += part.layers
    return rows


def text_of(numbers: Sequence[int]) -> str:
    """Layer numbers as the rows of a table write them: `1-4,7`."""
    words: list[str] = []
    ordered = sorted(numbers)
    start = 0
    for place, number in enumerate(ordered):
        if place + 1 == len(ordered) or ordered[place + 1] != number + 1:
            first = ordered[start]
            words.append(str(first) if first == number else f"{first}-{number}")
            start = place + 1
    return ",".join(words)
