"""Parcels: what comes back, what is refused, what is counted, and that nothing is left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from megamem.errors import ActivationError
from megamem.runtime.activations.host_arena import HostArena
from megamem.runtime.activations.parcels import Courier, Parcel
from megamem.runtime.activations.streams import HostDevice
from megamem.testing.streams import SimulatedDevice


def courier_of(nbytes: int = 1 << 20, policy: str = "latest") -> Courier:
    device = SimulatedDevice(0, policy)  # type: ignore[arg-type]
    return Courier(device, HostArena(device, nbytes))


def stored(courier: Courier, *tensors: Tensor) -> Parcel:
    parcel = courier.store(tensors)
    assert parcel is not None
    return parcel


def check_nothing_left(courier: Courier) -> None:
    courier.flush()
    courier.device.synchronize()
    assert isinstance(courier.device, SimulatedDevice)
    courier.device.check_quiescent()
    assert (courier.ledger.num_live, courier.ledger.staging_nbytes, courier.arena.in_use) == (0, 0, 0)


TENSORS = {
    "matrix": lambda: torch.randn(5, 3),
    "transposed": lambda: torch.randn(5, 3).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "slice": lambda: torch.randn(6, 4)[1:3],
    "strided": lambda: torch.randn(6, 4)[:, ::2],
    "expanded": lambda: torch.randn(4, 1).expand(4, 3),
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 3),
    "bfloat16": lambda: torch.randn(33).bfloat16(),
    "float8": lambda: torch.randn(33).to(torch.float8_e4m3fn),
    "bool": lambda: torch.randn(9) > 0,
    "int64": lambda: torch.arange(9),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "with grad": lambda: torch.randn(5, requires_grad=True),
    "of a graph": lambda: torch.randn(5, requires_grad=True) * 2,
}


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_every_kind_of_tensor_comes_back(name: str, forward: bool) -> None:
    courier = courier_of()
    tensor = TENSORS[name]()
    want = tensor.detach().clone()
    shape, stride = tensor.shape, tensor.stride()
    keeps_stride = name not in ("strided", "expanded")
    parcel = stored(courier, torch.randn(3), tensor)
    del tensor
    if not forward:
        courier.retire(0)
    _, got = courier.take(parcel)
    assert (got.shape, got.dtype, got.requires_grad) == (shape, want.dtype, False)
    assert torch.equal(
        got.float() if got.dtype.itemsize == 1 else got, want.float() if want.dtype.itemsize == 1 else want
    )
    assert got.stride() == stride if keeps_stride else got.is_contiguous()
    check_nothing_left(courier)


def test_retire_gives_the_memory_back_only_then() -> None:
    courier = courier_of()
    source = torch.ones(8)
    alias = source.untyped_storage()
    parcel = stored(courier, source)
    del source
    assert courier.ledger.staging_nbytes == 32
    courier.retire(keep_in_flight=1)
    assert courier.num_in_flight == 1
    courier.retire(keep_in_flight=0)
    assert (courier.num_in_flight, courier.ledger.staging_nbytes) == (0, 0)
    del alias
    assert bool((courier.take(parcel)[0] == 1).all())
    check_nothing_left(courier)


def test_retire_runs_the_callback_once_and_survives_its_error() -> None:
    courier = courier_of()
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ActivationError("changed in place")

    first = courier.store([torch.ones(3)], fail)
    second = stored(courier, torch.full((3,), 2.0))
    with pytest.raises(ActivationError, match="in place"):
        courier.retire(0)
    courier.retire(0)
    assert calls == [1]
    assert bool((courier.take(second)[0] == 2).all())
    del first
    check_nothing_left(courier)


def test_forwarding_copies_nothing_back_and_checks_first() -> None:
    courier = courier_of()
    calls: list[str] = []
    parcel = courier.store([torch.ones(3)], lambda: calls.append("retired"))
    assert parcel is not None
    courier.fetch(parcel)
    assert (calls, courier.arena.in_use) == (["retired"], 0)
    got = courier.take(parcel)
    courier.retire(0)
    assert calls == ["retired"]
    assert bool((got[0] == 1).all())
    ledger = courier.ledger
    assert (ledger.bytes_forwarded, ledger.bytes_fetched, ledger.bytes_stored) == (12, 0, 12)
    check_nothing_left(courier)


def test_a_forwarded_parcel_may_be_retired_before_it_is_taken() -> None:
    courier = courier_of()
    taken, dropped = stored(courier, torch.ones(3)), stored(courier, torch.ones(3))
    for parcel in (taken, dropped):
        courier.fetch(parcel)
    courier.retire(0)
    assert courier.ledger.staging_nbytes == 24
    assert bool((courier.take(taken)[0] == 1).all())
    courier.drop(dropped)
    assert courier.ledger.staging_nbytes == 0
    check_nothing_left(courier)


def test_a_parcel_is_taken_once() -> None:
    courier = courier_of()
    taken, dropped = stored(courier, torch.ones(3)), stored(courier, torch.ones(3))
    courier.take(taken)
    courier.drop(dropped)
    courier.drop(dropped)
    courier.drop(taken)
    assert not (taken.is_open or dropped.is_open)
    for parcel in (taken, dropped):
        for again in (courier.take, courier.fetch):
            with pytest.raises(ActivationError, match="retain_graph"):
                again(parcel)
    check_nothing_left(courier)


def test_what_does_not_fit_changes_nothing() -> None:
    courier = courier_of(1024)
    parcel = stored(courier, torch.ones(3))
    assert courier.store([torch.ones(3), torch.ones(3)]) is None
    assert (courier.arena.in_use, courier.num_in_flight, courier.ledger.num_refused) == (512, 1, 1)
    courier.take(parcel)
    with pytest.raises(ValueError, match="at least one"):
        courier.store([])
    check_nothing_left(courier)


def test_an_error_while_storing_leaves_the_arena_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = courier_of()

    def fail(pairs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(courier.device.to_host, "copy_all", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            courier.store([torch.ones(3)])
    assert (courier.arena.in_use, courier.num_in_flight, courier.ledger.num_live) == (0, 0, 0)
    courier.take(stored(courier, torch.ones(3)))
    check_nothing_left(courier)


def test_an_error_while_fetching_leaves_the_parcel_to_be_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = courier_of()
    parcel = stored(courier, torch.ones(3))
    courier.retire(0)

    def fail(shape: object, dtype: object) -> Tensor:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(courier.device, "empty", fail)
        with pytest.raises(torch.OutOfMemoryError):
            courier.fetch(parcel)
    assert bool((courier.take(parcel)[0] == 1).all())
    check_nothing_left(courier)


def test_lost_parcels_are_dropped_by_the_next_call() -> None:
    courier = courier_of()
    for index in range(3):
        parcel = stored(courier, torch.ones(3))
        if index:
            courier.retire(0)
        if index == 2:
            courier.fetch(parcel)
        del parcel
    assert courier.ledger.num_live == 1
    assert courier.arena.in_use == 512
    check_nothing_left(courier)


def test_parcels_lost_in_a_cycle_are_dropped_after_collection() -> None:
    courier = courier_of()
    cycle: list[object] = [stored(courier, torch.ones(3))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert courier.arena.in_use == 512  # finalizers only take a note
    check_nothing_left(courier)


def test_a_courier_that_is_gone_does_not_mind() -> None:
    courier = courier_of()
    parcel = stored(courier, torch.ones(3))
    del courier
    del parcel


def test_prefetch_is_idempotent_and_counted() -> None:
    courier = courier_of()
    parcel = stored(courier, torch.ones(1000))
    courier.retire(0)
    for _ in range(3):
        courier.fetch(parcel)
    assert (courier.ledger.bytes_fetched, courier.ledger.staging_nbytes) == (4000, 4000)
    courier.take(parcel)
    assert (courier.ledger.staging_nbytes, courier.ledger.peak_staging_nbytes) == (0, 4000)
    assert (courier.ledger.num_stored, courier.ledger.peak_live) == (1, 1)
    check_nothing_left(courier)


def test_the_same_on_the_host_device() -> None:
    device = HostDevice()
    courier = Courier(device, HostArena(device, 1 << 16))
    want = [torch.randn(7, 5), torch.randn(3, 4).t()]
    parcel = courier.store([tensor.clone() for tensor in want])
    assert parcel is not None
    courier.retire(0)
    got = courier.take(parcel)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert courier.arena.in_use == 0
