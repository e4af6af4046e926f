"""The arena's core: what it serves and what it leaves alone; fuzzed under AddressSanitizer and UBSan."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamem.errors import AllocationError
from megamem.ir.arena import NATIVE, OPTIONAL
from megamem.native.arena import ArenaCore, align
from megamem.native.build import SOURCES

DRIVER = Path(__file__).with_name("arena_driver.cpp")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
KIB = 1024


@pytest.fixture
def core() -> Iterator[ArenaCore]:
    made = ArenaCore.on_host()
    yield made
    made.destroy()


def serve(core: ArenaCore, sizes: list[int]) -> list[int | None]:
    """Offsets at which a step's requests are served; None for the native allocator's."""
    core.begin(0)
    return [None if (at := core.malloc(size)) is None else at - core.base for size in sizes]


# -- serving -----------------------------------------------------------------------------------------------------------


def test_planned_requests_lie_at_their_offsets(core: ArenaCore) -> None:
    core.load(0, [KIB, 2 * KIB, KIB], [0, KIB, NATIVE])
    assert serve(core, [KIB, 2 * KIB, KIB, KIB]) == [0, KIB, None, None]
    counters = core.counters()
    assert counters.requests == {
        "served": 2,
        "unplanned": 1,
        "missed": 1,
        "conflict": 0,
        "small": 0,
        "elsewhere": 0,
    }
    assert counters.nbytes["served"] == counters.live_nbytes == counters.capacity == counters.peak_nbytes == 3 * KIB
    assert core.blocks() == [(core.base, KIB), (core.base + KIB, 2 * KIB)]


def test_a_place_that_is_taken_is_not_served_again(core: ArenaCore) -> None:
    core.load(0, [KIB, 2 * KIB], [0, 512])
    assert serve(core, [KIB, 2 * KIB]) == [0, None]
    assert core.counters().requests["conflict"] == 1
    assert core.free(core.base)
    assert serve(core, [KIB, 2 * KIB]) == [0, None]
    core.end()
    assert core.malloc(KIB) is None


def test_a_block_that_outlives_its_step_keeps_its_place(core: ArenaCore) -> None:
    core.load(0, [KIB], [0])
    assert serve(core, [KIB]) == [0]
    assert serve(core, [KIB]) == [None]


def test_plans_share_the_arena_and_no_block(core: ArenaCore) -> None:
    core.load(0, [KIB, KIB], [0, KIB])
    core.load(1, [3 * KIB], [512])
    core.begin(0)
    held = core.malloc(KIB)
    core.begin(1)
    assert core.malloc(3 * KIB) is None
    assert held is not None and core.free(held)
    core.begin(1)
    assert core.malloc(3 * KIB) == core.base + 512
    assert core.counters().capacity == 512 + 3 * KIB


def test_a_larger_plan_moves_the_arena_and_live_blocks_stay(core: ArenaCore) -> None:
    core.load(0, [KIB], [0])
    core.begin(0)
    held = core.malloc(KIB)
    core.load(0, [4 * KIB], [0])
    core.begin(0)
    assert held is not None and not held <= core.base < held + KIB
    assert core.malloc(4 * KIB) == core.base
    assert core.counters().num_retired == 1
    assert core.free(held) and core.counters().num_retired == 0


def test_other_streams_and_small_requests_are_not_in_the_sequence(core: ArenaCore) -> None:
    core.load(0, [2 * KIB, 3 * KIB], [0, 2 * KIB], min_size=KIB)
    core.begin(0, stream=7)
    assert core.malloc(2 * KIB, stream=8) is None
    assert core.malloc(KIB - 1, stream=7) is None
    assert core.malloc(2 * KIB, stream=7) == core.base
    assert core.malloc(3 * KIB, stream=7) == core.base + 2 * KIB
    requests = core.counters().requests
    assert (requests["elsewhere"], requests["small"], requests["missed"]) == (1, 1, 0)


def test_without_memory_nothing_is_served(core: ArenaCore) -> None:
    core.load(0, [KIB], [1 << 61])
    assert not core.begin(0)
    assert core.malloc(KIB) is None
    core.load(0, [KIB], [0])
    assert core.begin(0) and core.malloc(KIB) == core.base


@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [([KIB], [100]), ([KIB], [-3]), ([0], [0]), ([-1], [NATIVE]), ([1 << 62], [0]), ([KIB], [1 << 62]), ([KIB], [])],
)
def test_a_plan_that_cannot_be_is_refused(core: ArenaCore, sizes: list[int], offsets: list[int]) -> None:
    with pytest.raises(AllocationError):
        core.load(0, sizes, offsets)
    with pytest.raises(AllocationError, match="no plan 0"):
        core.begin(0)


def test_memory_goes_back_when_it_is_not_needed(core: ArenaCore) -> None:
    core.load(0, [KIB], [0])
    core.begin(0)
    held = core.malloc(KIB)
    core.end()
    assert held is not None and not core.shrink(), "a block is live"
    core.free(held)
    assert core.shrink() and core.counters().capacity == 0
    assert core.begin(0) and core.malloc(KIB) is not None, "the next step has an arena again"
    core.reset()
    assert core.counters().num_retired == 1
    with pytest.raises(AllocationError):
        core.begin(0)


def test_frees_of_what_is_no_block_are_counted(core: ArenaCore) -> None:
    core.load(0, [2 * KIB], [0])
    serve(core, [2 * KIB])
    assert not core.free(core.base + 4 * KIB), "not the arena's"
    assert core.free(core.base + 512) and core.free(core.base) and core.free(core.base)
    assert core.counters().num_unknown == 2


# -- matching ----------------------------------------------------------------------------------------------------------


def test_it_finds_its_way_back_after_requests_too_many_and_too_few(core: ArenaCore) -> None:
    sizes = [512 * (1 + (7 * i) % 31) for i in range(200)]
    core.load(0, sizes, [NATIVE] * len(sizes))
    came = [*sizes[:50], 99999, *sizes[50:90], *sizes[95:140], 77777, 88888, *sizes[140:]]
    core.begin(0)
    for size in came:
        assert core.malloc(size) is None
    counters = core.counters()
    assert counters.num_losses == 3
    assert 3 <= counters.requests["missed"] <= 15
    assert counters.requests["missed"] + counters.requests["unplanned"] == len(came)


def test_any_size_and_requests_that_need_not_come(core: ArenaCore) -> None:
    offsets = [0, NATIVE, OPTIONAL, OPTIONAL, KIB]
    core.load(0, [KIB, 0, 700, 0, 2 * KIB], offsets)
    for middle in ([123], [9999, 700], [5, 700, 6], [5, 6]):
        assert serve(core, [KIB, *middle, 2 * KIB]) == [0, *[None] * len(middle), KIB], middle
        core.free(core.base)
        core.free(core.base + KIB)
    assert core.counters().requests["missed"] == 0


def test_a_step_of_another_kind_costs_no_more_than_its_requests(core: ArenaCore) -> None:
    core.load(0, [KIB] * 5000, [NATIVE] * 5000)
    core.begin(0)
    for number in range(20000):
        core.malloc(2 * KIB + number)
    assert core.counters().requests["missed"] == 20000


def test_two_steps_are_aligned() -> None:
    assert align([1, 2, 3, 4], [1, 2, 3, 4]) == [0, 1, 2, 3]
    assert align([1, 2, 3, 4, 5], [1, 2, 9, 3, 4, 5]) == [0, 1, -1, 2, 3, 4]
    assert align([1, 2, 3, 4, 5], [1, 2, 4, 5]) == [0, 1, 3, 4]
    assert align([1, 2, 3, 4, 5], [1, 2, 9, 4, 5]) == [0, 1, 2, 3, 4], "another size at the same place"
    assert align([], [1]) == [-1] and align([1], []) == []


# -- second streams, poison and the log --------------------------------------------------------------------------------


def test_a_block_that_a_second_stream_uses_is_kept(core: ArenaCore) -> None:
    """Host memory has no events to wait for, so it is kept for good; the driver below has a device with events."""
    core.load(0, [KIB], [0])
    core.begin(0, stream=1)
    held = core.malloc(KIB, stream=1)
    assert held is not None and core.record_use(held, 2)
    assert not core.record_use(held + 512, 2), "no block begins there"
    core.free(held)
    core.begin(0, stream=1)
    assert core.malloc(KIB, stream=1) is None
    assert core.counters().num_deferred == 1 and core.counters().requests["conflict"] == 1


def test_the_stream_itself_is_no_second_one(core: ArenaCore) -> None:
    core.load(0, [KIB], [0])
    core.begin(0, stream=1)
    held = core.malloc(KIB, stream=1)
    assert held is not None and core.record_use(held, 1)
    core.free(held)
    assert core.counters().num_deferred == 0 and core.counters().live_nbytes == 0


def test_what_is_free_is_poisoned_and_a_write_to_it_shows(core: ArenaCore) -> None:
    import ctypes

    core.poison(True)
    core.load(0, [KIB, KIB], [0, KIB])
    core.begin(0)
    held = core.malloc(KIB)
    assert held is not None and ctypes.string_at(held, 2 * KIB) == b"\xff" * 2 * KIB
    ctypes.memset(held, 0, KIB)
    core.free(held)
    assert ctypes.string_at(held, KIB) == b"\xff" * KIB
    ctypes.memset(held + 100, 7, 1)  # after its free
    core.begin(0)
    assert core.malloc(KIB) == held and core.counters().num_stained == 1


def test_the_log_holds_both_allocators_and_ends_when_it_is_full(core: ArenaCore) -> None:
    core.load(0, [KIB], [0])
    core.watch(max_events=5)
    core.begin(0, stream=3)
    held = core.malloc(1000)
    assert held is None, "another stream"
    held = core.malloc(KIB, stream=3)
    core.note_malloc(4096, 777, 3)
    core.note_free(4096)
    assert held is not None and core.free(held)
    core.note_free(1)
    events = core.events()
    assert [(event.kind, event.address, event.size, event.stream) for event in events] == [
        ("step", 0, 0, 3),
        ("malloc", held, KIB, 3),
        ("malloc", 4096, 777, 3),
        ("free", 4096, 0, 0),
        ("free", held, 0, 0),
    ]
    assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)
    assert core.counters().num_dropped == 1
    core.watch(max_events=None)
    core.note_free(1)
    assert core.num_events == 5


# -- the driver --------------------------------------------------------------------------------------------------------


def build(target: Path, flags: tuple[str, ...], sources: Path = SOURCES) -> None:
    """Compile the driver with the core in one; skips where the toolchain cannot."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    names = [*(f"{name}.cpp" for name in ("align", "arena", "arena_c", "matcher", "region")), str(DRIVER)]
    text = "".join(f'#include "{name}"\n' for name in names)
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", *flags, f"-I{sources}"]
    made = subprocess.run(
        [*command, "-x", "c++", "-", "-o", str(target)], input=text, capture_output=True, text=True, check=False
    )
    if made.returncode != 0 and "san" in made.stderr and "cannot find" in made.stderr:
        pytest.skip(f"the toolchain lacks sanitizers: {made.stderr.strip()[-200:]}")
    assert made.returncode == 0, made.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("driver") / "driver"
    build(target, SANITIZED)
    return target


def drive(driver: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(driver), *map(str, arguments)], capture_output=True, text=True, check=False)


def test_random_traces_under_sanitizers(sanitized: Path) -> None:
    """Never two blocks on one byte, no leak, no crash on plans that cannot be; ci/bench/arena.py runs a million."""
    run = drive(sanitized, "fuzz", 1, 1500)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["traces"] == 1500 and found["served"] > 20_000


def test_threads_under_sanitizers(sanitized: Path) -> None:
    run = drive(sanitized, "threads", 3, 100)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["served"] > 100


@pytest.mark.parametrize(
    ("file", "line", "without"),
    [
        ("region.cpp", "    if (bits != 0) return false;\n", ""),
        ("arena.cpp", "      deferred_.push_back(std::move(kept));\n", "      settle(*region, at);\n"),
    ],
)
def test_the_driver_can_fail(tmp_path: Path, file: str, line: str, without: str) -> None:
    """A guard taken out of the core shows."""
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text(encoding="utf-8")
    assert text.count(line) == 1
    (sources / file).write_text(text.replace(line, without), encoding="utf-8")
    build(tmp_path / "driver", ("-O0", "-Wno-unused"), sources)
    run = drive(tmp_path / "driver", "fuzz", 1, 2000)
    assert run.returncode == 1 and "violated: " in run.stderr
