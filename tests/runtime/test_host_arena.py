"""Slots never overlap, are chosen by the calls alone, and carry the guards of everyone who was there before."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from torch import Tensor

from megamem.errors import ActivationError
from megamem.runtime.activations.host_arena import ALIGNMENT, HostArena, Slot, aligned, merge_guards
from megamem.runtime.activations.streams import HostDevice
from megamem.testing.streams import RaceError, SimulatedDevice


def slot_of(arena: HostArena, nbytes: int) -> Slot:
    slot = arena.allocate(nbytes)
    assert slot is not None
    return slot


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    assert [aligned(n) for n in (0, 1, 512, 513)] == [512, 512, 512, 1024]


def test_nothing_is_reserved_before_first_use_and_untouched_pages_are_free() -> None:
    arena = HostArena(HostDevice(), 1 << 36)
    assert arena.capacity == arena.largest_free == 1 << 36
    slot = slot_of(arena, 1 << 30)
    slot.memory[-1] = 7
    assert (slot.start, slot.nbytes, arena.in_use, arena.peak) == (0, 1 << 30, 1 << 30, 1 << 30)
    assert not arena.shrunk


def test_first_fit_and_coalescing() -> None:
    arena = HostArena(HostDevice(), 10 * ALIGNMENT)
    slots = [slot_of(arena, 2 * ALIGNMENT) for _ in range(5)]
    assert arena.allocate(1) is None
    for index in (1, 3, 2):
        arena.free(slots[index], None)
    assert arena.largest_free == 6 * ALIGNMENT
    assert slot_of(arena, 1).start == 2 * ALIGNMENT
    assert arena.allocate(6 * ALIGNMENT) is None
    assert slot_of(arena, 5 * ALIGNMENT).start == 3 * ALIGNMENT
    assert arena.peak == 10 * ALIGNMENT


def test_slots_do_not_share_bytes() -> None:
    arena = HostArena(HostDevice(), 1 << 16)
    rng = random.Random(0)
    live: list[tuple[Slot, int]] = []
    for number in range(3000):
        if live and rng.random() < 0.5:
            slot, value = live.pop(rng.randrange(len(live)))
            assert bool((slot.memory == value).all())
            arena.free(slot, None)
        elif (got := arena.allocate(rng.randint(0, 5000))) is not None:
            got.memory.fill_(number % 251)
            live.append((got, number % 251))
        assert arena.in_use == sum(slot.nbytes for slot, _ in live)
    for slot, _ in live:
        arena.free(slot, None)
    assert arena.largest_free == arena.capacity


def test_choices_do_not_depend_on_which_copies_are_over() -> None:
    def starts(policy: str) -> list[int | None]:
        device = SimulatedDevice(1, policy)  # type: ignore[arg-type]
        arena = HostArena(device, 1 << 14)
        rng = random.Random(3)
        live: list[Slot] = []
        got = []
        for _ in range(300):
            if live and rng.random() < 0.45:
                arena.free(live.pop(rng.randrange(len(live))), device.to_host.record())
            else:
                slot = arena.allocate(rng.randint(1, 3000))
                got.append(None if slot is None else slot.start)
                live += [] if slot is None else [slot]
        return got

    assert starts("latest") == starts("earliest") == starts("random")


def test_double_free_and_foreign_slots_are_refused() -> None:
    arena, other = HostArena(HostDevice(), 4096), HostArena(HostDevice(), 4096)
    slot, foreign = slot_of(arena, 10), slot_of(other, 10)
    with pytest.raises(ActivationError, match="another arena"):
        arena.free(foreign, None)
    arena.free(slot, None)
    with pytest.raises(ActivationError, match="freed twice"):
        arena.free(slot, None)
    again = slot_of(arena, 10)
    with pytest.raises(ActivationError, match="freed twice"):
        arena.free(slot, None)  # the same place, but not the same tenant
    arena.free(again, None)


def test_guards_pass_to_the_next_tenants() -> None:
    device = SimulatedDevice(0, "latest")
    arena = HostArena(device, 4 * ALIGNMENT)
    left, right = slot_of(arena, 2 * ALIGNMENT), slot_of(arena, 2 * ALIGNMENT)
    first, second = device.to_device.record(), device.to_host.record()
    third = device.to_device.record()
    arena.free(left, first)
    arena.free(right, third)
    whole = slot_of(arena, 4 * ALIGNMENT)
    assert whole.guards == (third,)  # merged; the later event of a stream stands for the earlier
    arena.free(whole, second)
    quarter = slot_of(arena, ALIGNMENT)
    assert set(quarter.guards) == {second, third}
    rest = slot_of(arena, 3 * ALIGNMENT)
    assert set(rest.guards) == {second, third}  # split: both parts carry them
    device.drain()
    arena.free(quarter, None)
    assert slot_of(arena, ALIGNMENT).guards == ()  # done: dropped


def test_merging_keeps_the_last_event_of_each_stream() -> None:
    device = SimulatedDevice()
    one, two, three = device.to_host.record(), device.to_host.record(), device.to_device.record()
    assert set(merge_guards((one, three), (two,))) == {two, three}
    assert merge_guards((two,), (one,)) == (two,)
    assert merge_guards((), (one,)) == (one,)


class ShrunkDevice:
    """A device that can reserve less than it is asked for."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.zeros(min(nbytes, self.nbytes), dtype=torch.uint8)

    def claim_host(self, block: Tensor, start: int, nbytes: int) -> None: ...


@pytest.mark.parametrize("given", [0, 511, 2000])
def test_a_refused_reservation_leaves_a_smaller_arena(given: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "megamem"):
        arena = HostArena(ShrunkDevice(given), 8192)  # type: ignore[arg-type]
        assert arena.reserve() == arena.reserve() == given // 512 * 512
        assert (arena.allocate(512) is None) == (given < 512)
        assert arena.allocate(4096) is None
    assert arena.shrunk
    assert len(caplog.records) == 1
    assert "recomputed" in caplog.text


def test_ranks_can_agree_on_less() -> None:
    arena = HostArena(HostDevice(), 8192)
    arena.limit(3000)
    assert arena.capacity == arena.largest_free == 2560
    slot = slot_of(arena, 2560)
    assert arena.allocate(1) is None
    with pytest.raises(ActivationError, match="in use"):
        arena.limit(512)
    arena.free(slot, None)


def test_an_arena_of_nothing() -> None:
    arena = HostArena(HostDevice(), 0)
    assert arena.allocate(1) is None
    assert (arena.largest_free, arena.capacity, arena.shrunk) == (0, 0, False)
    with pytest.raises(ValueError, match="0 bytes or more"):
        HostArena(HostDevice(), -1)


def test_the_simulator_sees_overlapping_tenants() -> None:
    device = SimulatedDevice()
    memory = device.host_buffer(4096)
    device.claim_host(memory, 0, 1024)
    with pytest.raises(RaceError, match="tenant"):
        device.claim_host(memory, 512, 1024)
