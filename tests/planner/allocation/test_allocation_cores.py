"""The compiled core and its Python twin: the same answers, and the same nodes on the way to them."""

import random
import threading
import time

import pytest
from random_problems import published, random_problem, tight_problem

from megamem.planner.allocation.core import Core
from megamem.planner.allocation.exact import preorders
from megamem.planner.allocation.greedy import orders
from megamem.planner.allocation.native_core import NativeCore
from megamem.planner.allocation.python_core import PythonCore
from megamem.planner.allocation.sweep import Sweep

CORES: tuple[type[Core], ...] = (NativeCore, PythonCore)


def test_first_fit_and_best_fit_are_the_same() -> None:
    for seed in range(150):
        sweep = Sweep.of(random_problem(seed, most=60, horizon=400, largest=40))
        for _, order in list(orders(sweep))[::3]:
            for best_fit in (False, True):
                native = NativeCore().first_fit(sweep, order, best_fit=best_fit)
                assert list(native or []) == PythonCore().first_fit(sweep, order, best_fit=best_fit)


def test_searches_visit_the_same_nodes() -> None:
    rng = random.Random(5)
    seen = set()
    for seed in range(300):
        problem = tight_problem(seed, capacity=10, steps=10, largest=5)
        sweep = Sweep.of(problem)
        for preorder in preorders(problem, sweep, range(len(sweep)))[:2]:
            capacity = sweep.max_live + rng.choice([-1, 0, 0, 1])
            limit = rng.choice([20, 2000])
            native, python = (
                core().search(sweep, capacity, preorder.order, fullest_first=preorder.fullest_first, max_nodes=limit)
                for core in CORES
            )
            assert (native.status, native.nodes) == (python.status, python.nodes), (seed, capacity)
            assert (native.offsets is None) == (python.offsets is None)
            assert list(native.offsets or []) == list(python.offsets or [])
            seen.add((native.status, native.nodes > 0))
    assert seen == {("found", True), ("none", False), ("none", True), ("limit", True)}


def test_sections_are_conflicts() -> None:
    """Two buffers share a section exactly when they are live together, in parts of a problem too."""
    for seed in range(300):
        problem = random_problem(seed, most=9)
        indices = random.Random(seed).sample(range(len(problem)), (len(problem) + 1) // 2)
        for sweep, part in ((Sweep.of(problem), problem), (Sweep.of(problem).subset(indices), problem.subset(indices))):
            for i, one in enumerate(part.buffers):
                for j, other in enumerate(part.buffers):
                    shared = sweep.first[i] < sweep.last[j] and sweep.first[j] < sweep.last[i]
                    assert shared == one.overlaps(other)
            most = max(
                sum(b.size for b in part.buffers if b.lower <= instant < b.upper) for instant in range(9)
            )  # fmt: skip
            assert sweep.max_live * sweep.unit == most
            assert all(sweep.first[i] < sweep.last[i] <= sweep.num_sections for i in range(len(sweep)))


@pytest.mark.parametrize("core", CORES)
def test_a_watch_stops_the_core(core: type[Core]) -> None:
    sweep = Sweep.of(random_problem(1, most=2000, least=2000, horizon=3000, largest=50))
    order = list(range(len(sweep)))
    assert core().first_fit(sweep, order, watch=lambda: True) is None
    problem = tight_problem(8, capacity=60, steps=60)
    sweep = Sweep.of(problem)
    preorder = preorders(problem, sweep, range(len(sweep)))[0]
    result = core().search(sweep, sweep.max_live, preorder.order, max_nodes=1 << 40, watch=lambda: True)
    assert (result.status, result.offsets) == ("stopped", None)


@pytest.mark.parametrize("core", CORES)
def test_an_exception_in_the_watch_comes_out(core: type[Core]) -> None:
    def watch() -> bool:
        raise KeyboardInterrupt

    sweep = Sweep.of(random_problem(1, most=400, least=400, horizon=300, largest=50))
    with pytest.raises(KeyboardInterrupt):
        core().first_fit(sweep, range(len(sweep)), watch=watch)


def test_the_compiled_core_lets_other_threads_run_and_runs_in_several() -> None:
    problem = published("A")
    sweep = Sweep.of(problem)
    expected = NativeCore().search(sweep, sweep.max_live, range(len(sweep)), max_nodes=20_000)
    found = []

    def work() -> None:
        found.append(NativeCore().search(sweep, sweep.max_live, range(len(sweep)), max_nodes=20_000))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 60
    assert found == [expected] * 3


def test_an_empty_problem() -> None:
    sweep = Sweep.of(random_problem(1)).subset([])
    for core in CORES:
        assert list(core().first_fit(sweep, []) or []) == []
        assert core().search(sweep, 1, [], max_nodes=1).status == "found"
