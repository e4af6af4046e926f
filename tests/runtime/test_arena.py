"""The static allocator between its planner and a front end: recording, planning, serving, and planning anew.

The front end here is Python over the compiled core, with addresses of its own for what the arena does not serve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.errors import AllocationError
from megamem.ir.arena import ArenaPlan, Freed, StepRequests
from megamem.native.arena import ArenaCore, Event
from megamem.planner.allocation.periodic import plan_steps
from megamem.planner.allocation.solvers import make_solver
from megamem.profiler.cuda_snapshot import read_snapshot
from megamem.runtime.arena import PATIENCE, StaticAllocator, read_steps
from megamem.runtime.arena_front_ends import FrontEnd
from megamem.runtime.arena_snapshot import write_snapshot

KIB = 1024
OUTSIDE = 1 << 50


class PythonFrontEnd(FrontEnd):
    """What an allocator is to a program: `malloc` and `free`, the arena first."""

    name = "Python"
    min_size = 0

    def __init__(self) -> None:
        self.core = ArenaCore.on_host()
        self.is_installed = False
        self._next = OUTSIDE

    def install(self) -> None:
        self.is_installed = True

    def uninstall(self) -> None:
        self.is_installed = False

    def stream(self) -> int:
        return 3

    def malloc(self, size: int) -> int:
        at = self.core.malloc(size, 3)
        if at is None:
            self._next += 1 << 20
            at = self._next
            self.core.note_malloc(at, size, 3)
        return at

    def free(self, at: int) -> None:
        if not self.core.free(at):
            self.core.note_free(at)

    def step(self, sizes: Sequence[int], *, hold: int = 2) -> list[bool]:
        """Requests of which `hold` are live at a time; which of them the arena served."""
        held: list[int] = []
        served = []
        for size in sizes:
            at = self.malloc(size)
            served.append(at < OUTSIDE)
            held.append(at)
            if len(held) > hold:
                self.free(held.pop(0))
        for at in held:
            self.free(at)
        return served


def make_plan(key: str, steps: Sequence[StepRequests]) -> ArenaPlan:
    return plan_steps(key, steps, min_size=0, solver=make_solver("greedy"), time_limit=5)


@pytest.fixture
def front_end() -> Iterator[PythonFrontEnd]:
    made = PythonFrontEnd()
    yield made
    made.core.destroy()


def allocator(front_end: FrontEnd, **options: object) -> StaticAllocator:
    return StaticAllocator(
        **{"front_end": front_end, "make_plan": make_plan, "profile_steps": 2, "min_size": 0, **options}  # type: ignore[arg-type]
    )


SIZES = [KIB * (1 + i % 5) for i in range(40)]
OTHER = [KIB * (7 + i % 3) for i in range(40)]


def test_it_warms_up_records_plans_and_serves(front_end: PythonFrontEnd) -> None:
    static = allocator(front_end)
    served = []
    for _ in range(5):
        static.begin_step("train")
        served.append(sum(front_end.step(SIZES)))
    assert served == [0, 0, 0, 40, 40]
    report = static.report()
    (kind,) = report.kinds
    assert (kind.key, kind.num_steps, kind.num_plans) == ("train", 5, 1)
    assert kind.plan is not None and kind.plan.num_planned == 40 and kind.plan.gap == 0
    assert report.planned_peak == kind.plan.peak == report.counters.capacity == report.counters.peak_nbytes
    assert (report.served_share, report.served_bytes_share, report.num_fallbacks) == (1, 1, 0)
    static.close()
    assert not front_end.is_installed and front_end.core.counters().capacity == 0


def test_kinds_do_not_disturb_each_other(front_end: PythonFrontEnd) -> None:
    static = allocator(front_end, profile_steps=1)
    served: dict[str, list[int]] = {"train": [], "evaluate": []}
    for _ in range(4):
        for key, sizes in (("train", SIZES), ("train", SIZES), ("evaluate", OTHER)):
            static.begin_step(key)
            served[key].append(sum(front_end.step(sizes)))
    assert served == {"train": [0, 0, 40, 40, 40, 40, 40, 40], "evaluate": [0, 0, 40, 40]}
    assert static.report().counters.capacity == max(
        kind.plan.peak for kind in static.report().kinds if kind.plan is not None
    )


def test_a_plan_that_is_not_kept_to_is_made_anew_and_then_more_patiently(front_end: PythonFrontEnd) -> None:
    static = allocator(front_end, profile_steps=1)
    for _ in range(3):
        static.begin_step("train")
        front_end.step(SIZES)
    changes = []
    for sizes in (OTHER, SIZES):
        count = 0
        while not sum(front_end.step(sizes)):
            count += 1
            static.begin_step("train")
        changes.append(count)
    # The departures, the steps to record, and one in which the new plan is served.
    assert changes == [PATIENCE + 2, 2 * PATIENCE + 2]
    assert static.report().kinds[0].num_plans == 3


def test_a_slight_departure_is_no_reason_to_plan(front_end: PythonFrontEnd) -> None:
    static = allocator(front_end, profile_steps=1)
    for number in range(30):
        static.begin_step("train")
        front_end.step([*SIZES[:20], KIB * (20 + number), *SIZES[20:]] if number > 3 else SIZES)
    report = static.report()
    assert report.kinds[0].num_plans == 1
    assert report.served_share > 0.9 and report.counters.num_losses == 26


def test_a_step_that_is_abandoned_is_forgotten(front_end: PythonFrontEnd) -> None:
    static = allocator(front_end)
    for abandoned in (False, False, True, False, False, False, False):
        static.begin_step("train")
        served = sum(front_end.step(SIZES[:10] if abandoned else SIZES))
        if abandoned:
            static.abandon_step()
    assert served == 40 and static.report().kinds[0].num_plans == 1


def test_a_planner_that_fails_leaves_the_native_allocator(
    front_end: PythonFrontEnd, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(key: str, steps: Sequence[StepRequests]) -> ArenaPlan:
        raise AllocationError("no plan today")

    static = allocator(front_end, make_plan=fail, profile_steps=1)
    with caplog.at_level(logging.WARNING, "megamem"):
        for _ in range(6):
            static.begin_step("train")
            assert not any(front_end.step(SIZES))
    assert [record.message for record in caplog.records] == [
        "megamem: steps of kind 'train' are left to the native allocator: no plan today"
    ]


def test_plans_from_before_are_served_at_once_unless_they_leave_out_other_requests(front_end: PythonFrontEnd) -> None:
    plan = make_plan("train", [StepRequests(sizes=[KIB], ends=[Freed(steps=0, position=1)])])
    static = allocator(front_end, plans={"train": plan})
    static.begin_step("train")
    assert all(front_end.step([KIB]))
    static.close()
    static = allocator(front_end, plans={"train": plan}, min_size=512)
    static.begin_step("train")
    assert not any(front_end.step([KIB]))


def test_an_arena_without_room_is_said_once(front_end: PythonFrontEnd, caplog: pytest.LogCaptureFixture) -> None:
    huge = ArenaPlan(key="train", sizes=(1 << 60,), offsets=(0,), min_size=0, lower_bound=1 << 60)
    static = allocator(front_end, plans={"train": huge})
    for _ in range(3):
        static.begin_step("train")
        assert not any(front_end.step(SIZES))
    assert len(caplog.records) == 1 and "so the native allocator serves" in caplog.records[0].message


def test_a_front_end_that_nobody_asks_is_noticed(front_end: PythonFrontEnd) -> None:
    static = allocator(front_end)
    static.begin_step("train")
    assert not static.has_seen_requests
    front_end.step([KIB])
    assert static.has_seen_requests
    static.begin_step("train")
    assert static.has_seen_requests


def test_a_snapshot_that_viewers_and_we_can_read(front_end: PythonFrontEnd, tmp_path: Path) -> None:
    from torch.cuda import _memory_viz

    static = allocator(front_end, profile_steps=1)
    static.record_history()
    for _ in range(3):
        static.begin_step("train")
        front_end.step(SIZES)
    held = [front_end.malloc(SIZES[0])]
    static.begin_step("train")
    held.append(front_end.malloc(SIZES[0]))
    snapshot = static.snapshot()
    (segment,) = snapshot["segments"]
    assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"] == static.report().planned_peak
    assert segment["allocated_size"] == KIB
    assert "KiB" in _memory_viz.segsum(snapshot) and "alloc" in _memory_viz.trace(snapshot)
    assert _memory_viz.trace_plot(snapshot) and _memory_viz.segment_plot(snapshot)
    write_snapshot(tmp_path / "arena.pickle", snapshot)
    trace = read_snapshot(tmp_path / "arena.pickle")
    assert len(trace) == 3 * len(SIZES) + 2
    with pytest.raises(AllocationError, match="cannot be written"):
        write_snapshot(tmp_path / "nowhere" / "arena.pickle", snapshot)


def event(kind: str, address: int = 0, size: int = 0, stream: int = 3) -> Event:
    return Event(kind, address, size, stream, 0)


def test_steps_are_read_from_events() -> None:
    first = [
        *(event("step"), event("malloc", 1, 100), event("malloc", 2, 10), event("malloc", 3, 100, stream=4)),
        *(event("malloc", 4, 200), event("use", 4, stream=9), event("free", 3), event("free", 1)),
        event("malloc", 5, 300),
    ]
    second = [event("step"), event("malloc", 1, 100), event("free", 5), event("malloc", 4, 200), event("free", 4)]
    one, two = read_steps([first, second], min_size=50)
    assert one == StepRequests(
        sizes=[100, 200, 300],
        ends=[Freed(steps=0, position=2), None, Freed(steps=1, position=1)],
        shared=frozenset({1}),
    )
    assert two == StepRequests(sizes=[100, 200], ends=[None, Freed(steps=0, position=2)])
