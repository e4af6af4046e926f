"""The buffers that a refusal names do not fit, and every one of them is needed for that."""

import pytest
from random_problems import FRAGMENTED, fragmented_problem

from megamem.planner.allocation.core import Core
from megamem.planner.allocation.explain import infeasible_subset
from megamem.planner.allocation.native_core import NativeCore
from megamem.planner.allocation.python_core import PythonCore
from megamem.planner.allocation.sweep import Sweep


@pytest.mark.parametrize("core", [NativeCore(), PythonCore()], ids=["native", "python"])
@pytest.mark.parametrize("arguments", FRAGMENTED)
def test_the_subset_is_irreducible(core: Core, arguments: dict[str, int]) -> None:
    sweep, capacity = Sweep.of(fragmented_problem(**arguments)), arguments["capacity"]

    def status(indices: list[int]) -> str:
        return core.search(sweep.subset(indices), capacity, range(len(indices)), max_nodes=100_000).status

    found = infeasible_subset(core, sweep, range(len(sweep)), capacity)
    assert status(found) == "none"
    assert all(status([i for i in found if i != left_out]) == "found" for left_out in found)


def test_too_many_live_bytes_need_no_more_than_one_instant() -> None:
    """Where one section is too full, the subset is of that section."""
    sweep = Sweep.of(fragmented_problem(**FRAGMENTED[0]))
    found = infeasible_subset(NativeCore(), sweep, range(len(sweep)), sweep.max_live - 1)
    assert any(set(found) <= set(sweep.members(section)) for section in range(sweep.num_sections))
    assert sum(sweep.size[i] for i in found) >= sweep.max_live


def test_stopping_leaves_a_subset_that_is_still_too_large() -> None:
    sweep = Sweep.of(fragmented_problem(**FRAGMENTED[0]))
    everyone = list(range(len(sweep)))
    assert infeasible_subset(NativeCore(), sweep, everyone, 8, watch=lambda: True) == everyone
