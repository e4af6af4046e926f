"""The three backends: what each promises, what the simulator catches, and (`-m gpu`) the real thing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from megamem.errors import UnsupportedError
from megamem.runtime.activations import streams_cuda
from megamem.runtime.activations.host_arena import HostArena
from megamem.runtime.activations.parcels import Courier
from megamem.runtime.activations.streams import AbstractDevice, HostDevice, map_pages
from megamem.runtime.activations.streams_cuda import CudaDevice, piece_bounds
from megamem.testing.streams import RaceError, SimulatedDevice

has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICES = [
    HostDevice,
    SimulatedDevice,
    pytest.param(CudaDevice, marks=[pytest.mark.gpu, has_gpu]),
]


@pytest.fixture
def cuda() -> Iterator[CudaDevice]:
    device = CudaDevice(chunk_bytes=2 << 20, profile=True)
    yield device
    device.synchronize()


@pytest.mark.parametrize("build", DEVICES)
def test_copies_there_and_back(build: type[AbstractDevice]) -> None:
    device = build()
    source = device.empty((1000,), torch.float32)
    source.copy_(torch.arange(1000.0))
    host = device.host_buffer(1 << 16)
    claimed = host[512 : 512 + 4000]
    device.claim_host(claimed, 0, claimed.numel())
    device.to_host.wait(device.compute.record())
    device.to_host.copy(claimed, source.view(torch.uint8))
    stored = device.to_host.record()
    back = device.empty((1000,), torch.float32)
    device.to_device.wait(device.compute.record())
    device.to_device.wait(stored)
    device.to_device.copy_all([(back.view(torch.uint8), claimed)])
    fetched = device.to_device.record()
    device.compute.wait(fetched)
    assert torch.equal(back.cpu(), torch.arange(1000.0))
    device.synchronize()
    assert stored.done()
    assert fetched.done()
    assert device.stall_ms() >= 0.0


@pytest.mark.parametrize("build", DEVICES)
def test_events_are_numbered_along_their_stream(build: type[AbstractDevice]) -> None:
    device = build()
    for stream in (device.compute, device.to_host, device.to_device):
        first, second = stream.record(), stream.record()
        assert first.number < second.number
        assert first.stream is second.stream is stream


def test_mapped_pages_are_aligned_zero_and_outlive_the_function() -> None:
    memory, view = map_pages(10_000, 1 << 21)
    assert (memory.numel(), memory.data_ptr() % (1 << 21), int(memory.sum())) == (10_000, 0, 0)
    del view
    memory.fill_(3)
    assert int(memory[5:9].clone().sum()) == 12


# The simulator itself.


def test_the_latest_policy_copies_only_when_forced() -> None:
    device = SimulatedDevice(policy="latest")
    first, second = torch.ones(4), torch.ones(4)
    host = device.host_buffer(4096)
    device.claim_host(host, 0, 1024)
    device.to_host.wait(device.compute.record())
    device.to_host.copy(host[:16], first.view(torch.uint8))
    one = device.to_host.record()
    device.to_host.wait(device.compute.record())
    device.to_host.copy(host[512:528], second.view(torch.uint8))
    two = device.to_host.record()
    assert not one.done()
    device.compute.wait(one)
    assert (one.done(), two.done(), device.num_pending) == (True, False, 1)
    device.drain()
    assert two.done()


def test_the_earliest_policy_copies_at_once() -> None:
    device = SimulatedDevice(policy="earliest")
    host = device.host_buffer(4096)
    device.claim_host(host, 0, 512)
    device.to_host.wait(device.compute.record())
    device.to_host.copy(host[:16], torch.ones(4).view(torch.uint8))
    assert (device.num_pending, device.num_copies) == (0, 1)


def test_unfilled_memory_is_not_a_number() -> None:
    device = SimulatedDevice()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert bool(device.empty((3, 2), dtype).isnan().all())


def test_discarded_memory_is_poisoned_unless_someone_else_holds_it() -> None:
    device = SimulatedDevice()
    held, lent = torch.ones(4), torch.ones(4)
    alias = held.data
    device.discard([alias])
    assert bool((held == 1).all())
    device.discard([lent])
    assert bool(lent.isnan().all())


def stored_slot(device: SimulatedDevice, source: Tensor) -> Tensor:
    host = device.host_buffer(1024)[:512]
    device.claim_host(host, 0, host.numel())
    device.to_host.wait(device.compute.record())
    device.to_host.copy(host[: 4 * source.numel()], source.view(torch.uint8))
    return host


def test_a_source_that_changes_under_its_copy_is_a_race() -> None:
    device = SimulatedDevice(policy="latest")
    source = torch.ones(4)
    stored_slot(device, source)
    source.add_(1)
    with pytest.raises(RaceError, match="overwritten"):
        device.drain()


def test_a_kernel_that_overwrites_a_source_is_a_race_unless_it_waits() -> None:
    device = SimulatedDevice(policy="latest")
    source = torch.ones(4)
    stored_slot(device, source)
    done = device.to_host.record()
    with pytest.raises(RaceError, match="nothing orders"):
        device.kernel(writes=[source])
    device.compute.wait(done)
    device.kernel(writes=[source])


def test_discarding_what_a_copy_still_reads_is_a_race() -> None:
    device = SimulatedDevice(policy="latest")
    source = torch.ones(4)
    stored_slot(device, source)
    with pytest.raises(RaceError, match="given back while to_host reads"):
        device.discard([source])


def test_reading_a_slot_that_was_never_written_is_a_race() -> None:
    device = SimulatedDevice()
    host = device.host_buffer(1024)[:512]
    device.claim_host(host, 0, host.numel())
    target = device.empty((4,), torch.float32)
    device.to_device.wait(device.compute.record())
    with pytest.raises(RaceError, match="never written"):
        device.to_device.copy(target.view(torch.uint8), host[:16])


def test_reading_a_slot_without_a_tenant_is_a_race() -> None:
    device = SimulatedDevice(policy="earliest")
    host = stored_slot(device, torch.ones(4))
    device.release_host(host, 0, host.numel(), device.to_host.record())
    target = device.empty((4,), torch.float32)
    with pytest.raises(RaceError, match="no tenant"):
        device.to_device.copy(target.view(torch.uint8), host[:16])
    assert bool((host == 0xFF).all())


def test_reading_before_the_copy_to_the_host_is_a_race() -> None:
    device = SimulatedDevice(policy="latest")
    host = stored_slot(device, torch.ones(4))
    fresh = SimulatedDevice(policy="latest")
    target = torch.empty(4)
    with pytest.raises(RaceError, match="another device"):
        device.to_device.wait(fresh.compute.record())
    device.to_device.wait(device.compute.record())
    with pytest.raises(RaceError, match="behind to_host, which writes"):
        device.to_device.copy(target.view(torch.uint8), host[:16])


def test_an_event_seen_to_be_done_orders_what_follows() -> None:
    """The host looked, so no wait is needed; only looking away would be a race."""
    device = SimulatedDevice(policy="earliest")
    source = torch.ones(4)
    stored_slot(device, source)
    assert device.to_host.record().done()
    device.kernel(writes=[source])


def test_leaks_are_found() -> None:
    device = SimulatedDevice(policy="latest")
    host = stored_slot(device, torch.ones(4))
    with pytest.raises(RaceError, match="pending"):
        device.check_quiescent()
    device.drain()
    with pytest.raises(RaceError, match="never given back"):
        device.check_quiescent()
    device.release_host(host, 0, host.numel(), None)
    device.check_quiescent()


# CUDA, as far as it goes without a GPU.


def test_the_cuda_module_imports_and_refuses_without_a_gpu() -> None:
    importlib.import_module("megamem.runtime.activations.streams_cuda")
    with mock.patch("torch.cuda.is_available", return_value=False), pytest.raises(UnsupportedError, match="HostDevice"):
        CudaDevice()


def test_pieces_end_where_chunks_do() -> None:
    assert piece_bounds(0, 16, 8) == [(0, 8), (8, 16)]
    assert piece_bounds(3, 20, 8) == [(0, 5), (5, 13), (13, 20)]
    assert piece_bounds(7, 2, 8) == [(0, 1), (1, 2)]
    for skip in range(8):
        for nbytes in range(1, 40):
            pieces = piece_bounds(skip, nbytes, 8)
            assert [byte for start, stop in pieces for byte in range(start, stop)] == list(range(nbytes))
            assert all((skip + start) // 8 == (skip + stop - 1) // 8 for start, stop in pieces)


class FakeRuntime:
    """cudaHostRegister of a machine that allows `allowed` calls."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.ranges: list[tuple[int, int]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if len(self.ranges) == self.allowed:
            return 2
        self.ranges.append((address, nbytes))
        return 0


@pytest.mark.parametrize("allowed", [0, 2, 99])
def test_a_refused_registration_keeps_the_slices_before_it(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(allowed)
    cleared: list[bool] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(streams_cuda, "_clear_error", lambda: cleared.append(True))
    memory, _ = map_pages(10 * 4096 + 512)
    done = streams_cuda._pin(memory, 4 * 4096)
    assert sum(nbytes for _, nbytes in done) == min(allowed * 4 * 4096, memory.numel())
    assert cleared == ([True] if allowed < 3 else [])
    assert all(address % 4096 == nbytes % 4096 == 0 for address, nbytes in runtime.ranges)


# CUDA on a GPU.


def busy(milliseconds: float = 50.0) -> None:
    """Keep the current stream busy, roughly."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@pytest.mark.gpu
@has_gpu
def test_host_memory_is_pinned_and_given_back(cuda: CudaDevice) -> None:
    memory = cuda.host_buffer(5 << 20)
    assert memory.numel() == 5 << 20
    assert memory.is_pinned()
    assert memory[-4096:].is_pinned()
    assert len(cuda.blocks) == 1
    del memory
    assert cuda.blocks == []


@pytest.mark.gpu
@has_gpu
def test_nothing_on_the_way_waits_for_the_gpu(cuda: CudaDevice) -> None:
    arena = HostArena(cuda, 64 << 20)
    arena.reserve()
    courier = Courier(cuda, arena)
    tensors = [torch.randn(1 << 20, device="cuda"), torch.randn(33, 7, device="cuda").t()]
    want = [tensor.clone() for tensor in tensors]
    cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy()
        working = cuda.compute.record()
        parcel = courier.store(tensors)
        assert parcel is not None
        del tensors
        courier.retire(0)
        courier.fetch(parcel)
        got = courier.take(parcel)
        assert not working.done(), "the host waited, or the GPU is too fast for this test"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, expected in zip(got, want, strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.stride() == expected.stride()
    assert cuda.stall_ms() > 0.0


@pytest.mark.gpu
@has_gpu
def test_events_order_streams(cuda: CudaDevice) -> None:
    """A copy waits for the slow kernel in front of its source, and compute for the copy."""
    host = cuda.host_buffer(8 << 20)
    source = torch.zeros(8 << 20, dtype=torch.uint8, device="cuda")
    cuda.synchronize()
    busy()
    source.fill_(5)
    cuda.to_host.wait(cuda.compute.record())
    cuda.to_host.copy(host, source)
    stored = cuda.to_host.record()
    assert not stored.done()
    cuda.compute.wait(stored)
    source.fill_(6)
    cuda.synchronize()
    assert stored.done()
    assert bool((host == 5).all())


@pytest.mark.gpu
@has_gpu
def test_large_copies_cross_registered_slices(cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_cuda, "SLICE_NBYTES", 4 << 20)
    host = cuda.host_buffer(64 << 20)
    source = torch.randint(0, 255, ((50 << 20) + 13,), dtype=torch.uint8, device="cuda")
    where = host[512 * 3 : 512 * 3 + source.numel()]
    cuda.to_host.wait(cuda.compute.record())
    cuda.to_host.copy(where, source)
    stored = cuda.to_host.record()
    back = cuda.empty(source.shape, torch.uint8)
    cuda.to_device.wait(cuda.compute.record())
    cuda.to_device.wait(stored)
    cuda.to_device.copy(back, where)
    cuda.compute.wait(cuda.to_device.record())
    assert torch.equal(back, source)


@pytest.mark.gpu
@has_gpu
def test_training_orders_give_the_same_as_on_the_host(cuda: CudaDevice) -> None:
    for device, where in ((HostDevice(), "cpu"), (cuda, "cuda")):
        arena = HostArena(device, 8 << 20)
        courier = Courier(device, arena)
        generator = torch.Generator().manual_seed(0)
        parcels = []
        for _ in range(40):
            courier.retire()
            value = torch.randn(37, 1001, generator=generator)
            tensors = [value.to(where), (value.to(where) * 2).t()]
            parcels.append((courier.store(tensors), value))
            del tensors
        assert [parcel is None for parcel, _ in parcels] == [False] * 28 + [True] * 12
        for index in reversed(range(28)):
            parcel, value = parcels[index]
            if index and (ahead := parcels[index - 1][0]) is not None:
                courier.fetch(ahead)
            assert parcel is not None
            first, second = courier.take(parcel)
            assert torch.equal(first.cpu(), value)
            assert torch.equal(second.cpu(), (value * 2).t())
        courier.flush()
        assert (arena.in_use, courier.ledger.staging_nbytes) == (0, 0)


@pytest.mark.gpu
@has_gpu
def test_device_memory_is_reused_without_record_stream(cuda: CudaDevice) -> None:
    """After the first layers no new memory is reserved: blocks come back in stream order."""
    courier = Courier(cuda, HostArena(cuda, 512 << 20))
    courier.arena.reserve()
    peaks = []
    for _ in range(30):
        courier.retire()
        tensor = torch.ones(4 << 20, dtype=torch.uint8, device="cuda")
        parcel = courier.store([tensor])
        assert parcel is not None
        courier.drop(parcel)
        del tensor
        peaks.append(torch.cuda.memory_allocated())
    assert len(set(peaks[3:])) == 1


@pytest.mark.gpu
@has_gpu
def test_events_are_pooled(cuda: CudaDevice) -> None:
    for _ in range(100):
        cuda.to_host.record()
    assert len(cuda.to_host.pool) == 1


@pytest.mark.gpu
@has_gpu
def test_another_compute_stream_is_refused(cuda: CudaDevice) -> None:
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(UnsupportedError, match="runs on CUDA stream"):
        cuda.compute.record()
