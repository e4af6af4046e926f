"""MEMO's two levels: passes by their groups or by repetition, each distinct one solved once."""

import pytest
from random_problems import layered_problem, random_problem, trace

from megamem.ir.allocation import Buffer, Problem
from megamem.planner.allocation import validator
from megamem.planner.allocation.bilevel import BilevelSolver, decompose
from megamem.planner.allocation.passes import find_passes
from megamem.planner.allocation.solver import Task


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_groups_are_passes(layers: int) -> None:
    problem = layered_problem(layers, tagged=True)
    passes = find_passes(problem)
    assert len(passes) == 2 * layers
    assert all(len({problem.buffers[i].group for i in part.indices}) == 1 for part in passes)
    assert len({part.program(problem) for part in passes}) == 2


def test_without_groups_passes_are_found_by_repetition() -> None:
    """All layers but those at the ends of a run, whose beginning is cut elsewhere, are found as they are."""
    layers = 8
    problem = layered_problem(layers)
    passes = find_passes(problem)
    names = [{problem.buffers[i].id.partition(".")[0] for i in part.indices} for part in passes]
    assert 2 * layers - 3 <= len(passes) <= 2 * layers
    assert sum(len(found) == 1 for found in names) >= 2 * layers - 3
    seen = [index for part in passes for index in part.indices]
    assert len(seen) == len(set(seen)), "a buffer belongs to one pass"


def test_members_of_a_pass_die_before_the_next_begins() -> None:
    for problem in (layered_problem(8), *(random_problem(seed, most=80, least=40, horizon=60) for seed in range(20))):
        spans = [
            (min(problem.buffers[i].lower for i in part.indices), max(problem.buffers[i].upper for i in part.indices))
            for part in find_passes(problem)
        ]
        assert all(early[1] <= late[0] for early, late in zip(sorted(spans), sorted(spans)[1:], strict=False))


def test_each_distinct_pass_is_solved_once() -> None:
    parts = decompose(Task(layered_problem(6, tagged=True)))
    assert parts.num_programs == 2
    assert len({id(outcome) for outcome in parts.programs}) == 2
    assert all(outcome.is_optimal for outcome in parts.programs)
    assert len(parts.blocks) == 12 + 6
    assert [block.size for block in parts.blocks.buffers[:12]] == [outcome.peak for outcome in parts.programs]


def test_buffers_lie_in_their_pass_s_block() -> None:
    task = Task(layered_problem(4, tagged=True))
    parts = decompose(task)
    bases = [1000 * 512 * number for number in range(len(parts.blocks))]
    whole = parts.compose(bases)
    for number, part in enumerate(parts.passes):
        size = parts.blocks.buffers[number].size
        for i in part.indices:
            assert bases[number] <= whole[i] <= bases[number] + size - task.problem.buffers[i].size
    assert [whole[i] for i in parts.others] == bases[len(parts.passes) :]


def test_refining_never_makes_it_worse_and_often_better() -> None:
    """A block that is at its peak only for a moment costs memory on level 2; the flat passes give it back."""
    buffers = []
    for layer in range(4):
        start, group = 10 * layer, f"layer {layer}"
        buffers.append(Buffer(id=f"spike {layer}", lower=start, upper=start + 1, size=1000, group=group))
        buffers.append(Buffer(id=f"tail {layer}", lower=start, upper=start + 9, size=10, group=group))
        buffers.append(Buffer(id=f"late {layer}", lower=start + 2, upper=start + 8, size=900))
    task = Task(Problem(buffers=tuple(buffers)))
    BilevelSolver().improve(task)  # without the order that `solve` begins with
    outcome = task.outcome()
    validator.check(outcome.solution)
    assert "refined" in outcome.solver
    assert (outcome.peak, outcome.is_optimal) == (1010, True)


def test_a_problem_without_passes_is_solved_flat() -> None:
    problem = random_problem(4)
    assert find_passes(problem) == []
    assert BilevelSolver().solve(problem).is_optimal


def test_a_trace_of_megatron_has_few_distinct_passes() -> None:
    """GPT-7B with full recomputation: forward, forward once more, and backward."""
    parts = decompose(Task(trace("gpt7b_512k_tp8_recomp")))
    assert 1 <= parts.num_programs <= 4
    assert len(parts.blocks) < 0.5 * len(trace("gpt7b_512k_tp8_recomp"))
