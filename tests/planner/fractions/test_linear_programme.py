"""The linear programme: against brute force, against HiGHS, and as it must change when a limit does."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megamem.errors import InfeasibleError, MissingPackage
from megamem.planner.fractions import linear
from megamem.planner.fractions.memo import swap_fraction
from megamem.planner.fractions.problem import (
    Group,
    Limits,
    Problem,
    Shares,
    cost,
    device_bytes,
    fits,
    host_bytes,
    whole_bytes,
)
from megamem.planner.fractions.simplex import Infeasible, minimise
from megamem.planner.fractions.table import fates_of, realise, rows_of, text_of

GIB = float(1 << 30)


def random_problem(seed: int, groups: int | None = None) -> Problem:
    draw, of_experts, of_codes = random.Random(seed), random.Random(-seed), random.Random(seed + 0.5)
    made = []
    for _ in range(groups or draw.choice((1, 1, 2, 3))):
        anchors = {name: draw.uniform(0.5, 8) * GIB for name in ("qkv", "projection", "fc1")}
        saved = sum(anchors.values()) * draw.uniform(1.1, 2)
        density = draw.uniform(0.05, 0.3) / GIB
        seconds = {name: nbytes * density * draw.uniform(0.9, 1.1) for name, nbytes in anchors.items()}
        made.append(
            Group(
                layers=draw.randint(2, 40),
                nbytes={"layer_input": GIB, "attention_output": GIB, **anchors, "saved": saved},
                seconds={**seconds, "saved": saved * draw.uniform(0.001, 0.02) / GIB},
                forward=draw.uniform(0.2, 3),
                backward=draw.uniform(0.4, 6),
                # What experts save is not decided on by tokens: it stays, travels, or is made again.
                **of_experts.choice(({}, {}, {"held": GIB}, {"moved": 2 * GIB}, {"again": GIB})),
                **of_codes.choice(({}, _compressed(saved, anchors["fc1"]))),
            )
        )
    total = sum(group.layers * whole_bytes(group) for group in made)
    limits = Limits(
        device=draw.uniform(0.2, 1.5) * total,
        host=draw.uniform(0.2, 2) * total,
        to_host=draw.uniform(1, 10) * GIB,
        from_host=draw.uniform(1, 10) * GIB,
        lag=draw.choice((1, 1, 2)),
    )
    moments = tuple(tuple(float(draw.randint(1, 4)) for _ in made) for _ in range(draw.randint(1, 2)))
    return Problem(groups=tuple(made), limits=limits, moments=moments)


def _compressed(saved: float, fc1: float) -> dict[str, dict[str, float]]:
    """`activations.compress`: half the bytes of two tensors, for some seconds."""
    return {"sent": {"saved": 0.7 * saved, "fc1": 0.52 * fc1}, "coding": {"saved": 0.01 * saved / GIB, "fc1": 0.02}}


def work(problem: Problem) -> float:
    """Seconds of computing that costs are compared with."""
    return sum(group.layers * (group.forward + group.backward) for group in problem.groups)


def grid(group: Group, steps: int) -> Iterator[Shares]:
    """All shares of a group in steps: base kept or swapped, `saved` and anchors in any tier and share."""
    points = [index / steps for index in range(steps + 1)]
    tiers = [(kept, swapped) for kept in points for swapped in points if kept + swapped <= 1 + 1e-9]
    for base in itertools.product(points, repeat=2):
        names = ("layer_input", "attention_output")
        kept0 = dict(zip(names, base, strict=True))
        swapped0 = {name: 1 - share for name, share in kept0.items()}
        for saved in tiers:
            beyond = [tier for tier in tiers if sum(tier) + sum(saved) <= 1 + 1e-9]
            for chosen in itertools.product(beyond, repeat=len(group.anchors)):
                kept, swapped = {**kept0, "saved": saved[0]}, {**swapped0, "saved": saved[1]}
                for name, (one, other) in zip(group.anchors, chosen, strict=True):
                    kept[name], swapped[name] = one, other
                yield Shares(kept=kept, swapped=swapped)


@pytest.mark.parametrize("seed", range(4))
def test_no_point_of_a_grid_is_better(seed: int) -> None:
    problem = random_problem(seed, groups=1)
    group = problem.groups[0]
    anchors = {"fc1": group.nbytes["fc1"]}  # one anchor, or the grid has millions of points
    small = replace(
        group,
        nbytes={name: group.nbytes[name] for name in ("layer_input", "attention_output", "saved")} | anchors,
        seconds={name: group.seconds[name] for name in ("fc1", "saved")},
    )
    limits = replace(problem.limits, device=small.layers * whole_bytes(small) * 0.7)
    problem = replace(problem, groups=(small,), limits=limits, moments=((1.0,),))
    found = linear.solve(problem, "simplex")
    feasible = [(shares,) for shares in grid(small, 5) if fits(problem, (shares,))]
    assert feasible
    best = min(cost(problem, shares) for shares in feasible)
    assert found.seconds <= best + 1e-9
    assert fits(problem, found.shares)
    assert best <= found.seconds + 0.25 * work(problem)  # and the grid comes near: it is not empty of good points


@pytest.mark.parametrize("seed", range(40))
def test_both_solvers_find_the_same_optimum(seed: int) -> None:
    pytest.importorskip("scipy", reason="pip install 'megamem[solve]'")
    problem = random_problem(1000 + seed)
    assert linear.num_rows(problem) == len(linear._Programme(problem).rows)
    if seed % 4 == 0:
        limits = problem.limits
        problem = replace(problem, limits=replace(limits, device=limits.device / 5, host=limits.host / 5))
    try:
        expected = linear.solve(problem, "highs")
    except InfeasibleError:
        with pytest.raises(InfeasibleError, match="inputs and attention outputs of layers need"):
            linear.solve(problem, "simplex")
        return
    found = linear.solve(problem, "simplex")
    assert found.seconds == pytest.approx(expected.seconds, abs=1e-7 * work(problem))
    assert fits(problem, found.shares)


@pytest.mark.parametrize("field", ["device", "host", "to_host", "from_host"])
@pytest.mark.parametrize("seed", range(8))
def test_more_of_anything_never_costs_time(field: str, seed: int) -> None:
    problem = random_problem(2000 + seed)
    seconds = []
    for factor in (0.5, 0.75, 1.0, 1.5, 4.0):
        limits = replace(problem.limits, **{field: getattr(problem.limits, field) * factor})
        try:
            seconds.append(linear.solve(replace(problem, limits=limits)).seconds)
        except InfeasibleError:
            seconds.append(float("inf"))
    tolerance = 1e-9 * work(problem)
    assert all(later <= before + tolerance for before, later in itertools.pairwise(seconds))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_held_by_more_microbatches_costs_no_less(seed: int) -> None:
    problem = random_problem(3000 + seed)
    more = replace(problem, moments=tuple(tuple(count + 1 for count in moment) for moment in problem.moments))
    with contextlib.suppress(InfeasibleError):
        assert linear.solve(problem).seconds <= linear.solve(more).seconds + 1e-9 * work(problem)


def test_with_room_for_everything_nothing_is_recomputed() -> None:
    problem = random_problem(1)
    limits = replace(problem.limits, device=1e6 * GIB)
    found = linear.solve(replace(problem, limits=limits))
    assert found.seconds == pytest.approx(0, abs=1e-9)


def test_the_densest_tensor_is_stored_first() -> None:
    group = Group(
        layers=10,
        nbytes={"layer_input": GIB, "attention_output": GIB, "qkv": 2 * GIB, "fc1": 4 * GIB, "saved": 9 * GIB},
        seconds={"qkv": 0.4, "fc1": 0.4, "saved": 0.01},
        forward=1.0,
        backward=2.0,
    )
    limits = Limits(device=100 * GIB, host=45 * GIB, to_host=100 * GIB, from_host=100 * GIB)
    problem = Problem(groups=(group,), limits=replace(limits, device=30 * GIB), moments=((1.0,),))
    shares = linear.solve(problem).shares[0]
    assert shares.stored("qkv") == pytest.approx(1) and 0 < shares.stored("fc1") < 1 and shares.stored("saved") == 0


def test_without_memory_for_inputs_and_attention_outputs_the_message_has_the_sums() -> None:
    problem = random_problem(2)
    tiny = replace(problem, limits=replace(problem.limits, device=GIB, host=GIB))
    with pytest.raises(InfeasibleError, match=r"need \d.* GiB.* there are 1.0 GiB of device and 1.0 GiB of host"):
        linear.solve(tiny)


def test_asking_for_highs_without_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(MissingPackage, match=r"megamem\[solve\]"):
        linear.solve(random_problem(1), "highs")


@pytest.mark.parametrize("seed", range(30))
def test_tables_with_one_tier_per_tensor_come_close(seed: int) -> None:
    problem = random_problem(4000 + seed)
    try:
        best = linear.solve(problem)
    except InfeasibleError:
        return
    found = realise(problem, best)
    assert best.seconds - 1e-7 * work(problem) <= found.seconds <= best.seconds + 0.08 * work(problem)
    for group, parts in zip(problem.groups, found.parts, strict=True):
        assert sum(part.layers for part in parts) == group.layers
        for part in parts:
            assert not set(part.shares.kept) & set(part.shares.swapped)


def test_parts_become_rows_of_a_table() -> None:
    problem = random_problem(4001, groups=1)
    group = replace(problem.groups[0], layers=4)
    shares = Shares(
        kept={"layer_input": 1.0, "qkv": 0.5}, swapped={"attention_output": 1.0, "fc1": 0.25, "saved": 0.125}
    )
    fates = fates_of(group, shares)
    assert {name: str(fate) for name, fate in fates.items()} == {
        "layer_input": "keep",
        "attention_output": "swap",
        "qkv": "0.625@hbm",
        "projection": "recompute",
        "fc1": "0.375",
        "saved": "0.125",
    }
    from megamem.planner.fractions.table import Part

    (row,) = rows_of((3, 4, 5, 6), group, [Part(layers=4, shares=shares)])
    assert row[0] == (3, 4, 5, 6) and text_of([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"


def test_memos_rule() -> None:
    """Section 4.1: alpha is what link or host memory allow; the paper's own shapes give the published crossover."""
    group = Group(
        layers=32,
        nbytes={"layer_input": GIB, "attention_output": GIB, "saved": 14 * GIB, "fc1": 4 * GIB},
        seconds={"fc1": 1.0, "saved": 0.1},
        forward=1.0,
        backward=2.0,
    )
    link = Limits(device=0, host=1e4 * GIB, to_host=9 * GIB, from_host=9 * GIB)
    assert swap_fraction(group, link) == pytest.approx((9 - 2) / 14)
    host = Limits(device=0, host=30 * 9 * GIB, to_host=1e4 * GIB, from_host=1e4 * GIB)
    assert swap_fraction(group, host) == pytest.approx((9 - 2) / 14)  # n - 2 layers share the host
    assert swap_fraction(group, host, in_flight=2) == pytest.approx((270 / 62 - 2) / 14)
    assert swap_fraction(group, replace(link, to_host=GIB)) is None
    assert swap_fraction(group, replace(link, to_host=100 * GIB)) == 1
    assert swap_fraction(group, link, ordered=True) == 1


def test_the_simplex_method_on_programmes_with_a_known_end() -> None:
    assert minimise([-3.0, -5.0], [[1, 0], [0, 2], [3, 2]], [4, 12, 18]) == pytest.approx([2, 6])
    assert minimise([1.0, 1.0], [[-1, -2], [-3, -1]], [-4, -6]) == pytest.approx([1.6, 1.2])
    with pytest.raises(Infeasible):
        minimise([1.0], [[1.0], [-1.0]], [1.0, -2.0])
    with pytest.raises(ValueError, match="no lower bound"):
        minimise([-1.0], [[-1.0]], [1.0])
    # Beale's programme, on which the steepest slope alone cycles
    rows = [[0.25, -60, -0.04, 9], [0.5, -90, -0.02, 3], [0, 0, 1, 0]]
    found = minimise([-0.75, 150, -0.02, 6], rows, [0, 0, 1])
    assert found == pytest.approx([0.04, 0, 1, 0])


def test_memory_of_shares_is_counted_at_every_moment() -> None:
    problem = random_problem(5, groups=2)
    problem = replace(problem, groups=tuple(replace(one, held=0.0, moved=0.0, again=0.0) for one in problem.groups))
    shares = tuple(Shares(kept={"layer_input": 1.0}, swapped={"attention_output": 1.0}) for _ in problem.groups)
    moment = problem.moments[0]
    only = replace(problem, moments=(moment,))
    held = sum(count * group.layers * GIB for count, group in zip(moment, problem.groups, strict=True))
    assert host_bytes(only, shares) == held
    work_space = max(whole_bytes(group) for group in problem.groups)  # less its kept input, and the next one's parcel
    staged = (1 + problem.limits.lag) * GIB
    assert device_bytes(only, shares) == held + max(work_space, staged)
