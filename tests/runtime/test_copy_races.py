"""Thousands of training-like orders of store, retire, fetch, take and drop, on a device that copies at the worst time.

And the proof that this would notice: with any one wait of the courier removed, some order fails.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megamem.runtime.activations import parcels
from megamem.runtime.activations.codec import AbstractCodec
from megamem.runtime.activations.host_arena import HostArena
from megamem.runtime.activations.parcels import Courier, Manifest, Parcel
from megamem.testing.streams import COMPUTE, NAMES, TO_DEVICE, TO_HOST, RaceError, SimulatedDevice

NUM_ORDERS = 3200
BATCHES = 8

Action = tuple[str, int, int]
"""("F" or "B", microbatch, chunk)"""


def one_f_one_b(num_microbatches: int, warmup: int) -> Iterator[Action]:
    """A pipeline stage with one chunk: `warmup` forwards, then one backward after each forward, then the rest."""
    for index in range(num_microbatches + warmup):
        if index < num_microbatches:
            yield "F", index, 0
        if index >= warmup:
            yield "B", index - warmup, 0


def any_order(rng: random.Random, num_microbatches: int, num_chunks: int, most_alive: int) -> Iterator[Action]:
    """Any order that an interleaved schedule could have: chunks in order, backwards in reverse, few alive at a time."""
    done = dict.fromkeys(range(num_microbatches), 0)
    last = 2 * num_chunks
    while pending := [index for index, steps in done.items() if steps < last]:
        alive = [index for index in pending if done[index]]
        fresh = [index for index in pending if not done[index]][:1]
        index = rng.choice(alive + fresh if len(alive) < most_alive else alive)
        steps = done[index]
        done[index] += 1
        yield ("F", index, steps) if steps < num_chunks else ("B", index, last - steps - 1)


class Halved(AbstractCodec):
    """Two parts: the whole numbers below 2**20 that the tensors hold, high and low bits apart."""

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(shape, torch.int16), (shape, torch.uint8)]

    def encode(self, tensor: Tensor) -> list[Tensor]:
        number = tensor.to(torch.int32).contiguous()
        return [(number >> 8).to(torch.int16), (number & 255).to(torch.uint8)]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        high, low = parts
        return ((high.to(torch.int32) << 8) + low).to(dtype)


class Training:
    """Layers that save tiny tensors through a courier and compare what they get back."""

    def __init__(self, device: SimulatedDevice, rng: random.Random) -> None:
        self.device = device
        self.rng = rng
        self.arena = HostArena(device, rng.choice((2, 5, 9, 64)) * 512)
        self.courier = Courier(device, self.arena)
        self.num_layers = rng.choice((1, 2, 3))
        self.keep_in_flight = rng.choice((0, 1, 1, 2))
        self.saved: dict[tuple[int, int, int], tuple[Parcel | None, list[Tensor]]] = {}
        self.num_retired = 0

    def count_retired(self) -> None:
        self.num_retired += 1

    def produce(self) -> list[Tensor]:
        seed = self.rng.randrange(1 << 20)
        tensors = [torch.arange(seed, seed + 6, dtype=torch.float32).view(2, 3)]
        if self.rng.random() < 0.5:
            tensors.append(torch.full((4, 2), float(seed)).t())
        if self.rng.random() < 0.2:
            tensors.append(torch.arange(seed, seed + 8).view(2, 4)[:, 1:3])  # not dense
        self.device.kernel(writes=tensors)
        return tensors

    def forward(self, microbatch: int, chunk: int) -> None:
        for layer in range(self.num_layers):
            self.courier.retire(self.keep_in_flight)
            tensors = self.produce()
            want = [tensor.clone() for tensor in tensors]
            codecs = [
                Halved() if tensor.is_floating_point() and self.rng.random() < 0.3 else None for tensor in tensors
            ]
            parcel = self.courier.store(tensors, self.count_retired, manifest=Manifest(tensors, codecs))
            for tensor, codec in zip(tensors, codecs, strict=True):
                if codec is not None:
                    tensor.fill_(-1.0)  # the copies do not read it
            self.saved[microbatch, chunk, layer] = (parcel, want)
            del tensors

    def backward(self, microbatch: int, chunk: int, upcoming: Action | None) -> None:
        for layer in reversed(range(self.num_layers)):
            if self.rng.random() < 0.7:
                self.courier.retire(self.keep_in_flight)
            if self.rng.random() < 0.8:
                self.prefetch((microbatch, chunk, layer - 1))
                if layer == 0 and upcoming is not None:
                    self.prefetch((upcoming[1], upcoming[2], self.num_layers - 1))
            parcel, want = self.saved.pop((microbatch, chunk, layer))
            if parcel is not None:
                self.use(self.courier.take(parcel), want)

    def prefetch(self, key: tuple[int, int, int]) -> None:
        parcel = self.saved.get(key, (None, []))[0]
        if parcel is not None:
            self.courier.fetch(parcel)

    def use(self, tensors: list[Tensor], want: list[Tensor]) -> None:
        self.device.kernel(reads=tensors)
        for got, expected in zip(tensors, want, strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), f"{got} instead of {expected}"
        self.device.discard(tensors)

    def lose(self, microbatch: int, chunk: int) -> None:
        """The graph of a chunk is freed without a backward pass."""
        for key in [key for key in self.saved if key[:2] == (microbatch, chunk)]:
            parcel, _ = self.saved.pop(key)
            if parcel is not None and self.rng.random() < 0.5:
                self.courier.fetch(parcel)
            if parcel is not None and self.rng.random() < 0.5:
                self.courier.drop(parcel)

    def step(self) -> None:
        rng = self.rng
        num_chunks = rng.choice((1, 1, 2))
        if num_chunks == 1 and rng.random() < 0.5:
            actions = list(one_f_one_b(rng.randint(1, 4), rng.randint(0, 2)))
        else:
            actions = list(any_order(rng, rng.randint(1, 3), num_chunks, rng.randint(1, 3)))
        for index, (kind, microbatch, chunk) in enumerate(actions):
            upcoming = next((action for action in actions[index + 1 :] if action[0] == "B"), None)
            if kind == "F":
                self.forward(microbatch, chunk)
            elif rng.random() < 0.15:
                self.lose(microbatch, chunk)
            else:
                self.backward(microbatch, chunk, upcoming)
        if rng.random() < 0.5:
            self.courier.flush()

    def finish(self) -> None:
        self.courier.flush()
        self.device.drain()
        self.device.check_quiescent()
        ledger = self.courier.ledger
        assert (ledger.num_live, ledger.staging_nbytes, self.courier.num_in_flight) == (0, 0, 0)
        assert (self.arena.in_use, self.arena.num_slots) == (0, 0)
        assert self.arena.largest_free == self.arena.capacity
        assert self.num_retired <= ledger.num_stored


def train(
    seed: int, policy: str, alter: Callable[[SimulatedDevice], None] | None = None, detect: bool = True
) -> Training:
    rng = random.Random(seed)
    device = SimulatedDevice(seed, policy, detect)  # type: ignore[arg-type]
    if alter is not None:
        alter(device)
    training = Training(device, rng)
    for _ in range(rng.choice((1, 1, 2))):
        training.step()
    training.finish()
    return training


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_order_gives_back_what_was_stored(batch: int) -> None:
    seen = dict.fromkeys(("stored", "refused", "fetched", "forwarded"), 0)
    size = NUM_ORDERS // BATCHES
    for seed in range(batch * size, (batch + 1) * size):
        policy = ("random", "random", "latest", "earliest")[seed % 4]
        try:
            ledger = train(seed, policy).courier.ledger
        except BaseException as error:
            error.add_note(f"train(seed={seed}, policy={policy!r})")
            raise
        seen["stored"] += ledger.num_stored
        seen["refused"] += ledger.num_refused
        seen["fetched"] += ledger.bytes_fetched > 0
        seen["forwarded"] += ledger.bytes_forwarded > 0
    assert all(count > size // 10 for count in seen.values()), seen


def deaf(waiter: int, *to: int) -> Callable[[SimulatedDevice], None]:
    """Make stream `waiter` ignore events of the streams `to`: one kind of wait in the courier, taken out."""

    def alter(device: SimulatedDevice) -> None:
        stream = device.streams[waiter]
        wait = stream.wait
        stream.wait = lambda event: None if event.stream.index in to else wait(event)  # type: ignore[method-assign]

    return alter


GUARDS = {
    "store waits for what computes the tensors": (TO_HOST, COMPUTE),
    "store waits for the readers of the slot's last tenant": (TO_HOST, TO_DEVICE),
    "retire waits for the copy": (COMPUTE, TO_HOST),
    "fetch waits for what used the memory before": (TO_DEVICE, COMPUTE),
    "take waits for the copy to the device": (COMPUTE, TO_DEVICE),
}


def is_caught(alter: Callable[[SimulatedDevice], None] | None, policy: str, detect: bool = True) -> bool:
    for seed in range(300):
        try:
            train(seed, policy, alter, detect)
        except (RaceError, AssertionError):
            return True
    return False


@pytest.mark.parametrize("policy", ["latest", "random", "earliest"])
@pytest.mark.parametrize("guard", GUARDS)
def test_a_missing_wait_is_caught(guard: str, policy: str) -> None:
    waiter, to = GUARDS[guard]
    if (waiter, to, policy) == (TO_HOST, TO_DEVICE, "earliest"):
        return  # the arena sees that the readers are done before it hands the slot on: no guard is left to wait for
    assert is_caught(deaf(waiter, to), policy), f"{NAMES[waiter]} deaf to {NAMES[to]} went unnoticed"


@pytest.mark.parametrize("policy", ["latest", "random", "earliest"])
def test_fetch_waits_for_the_copy_to_the_host_in_two_ways(policy: str) -> None:
    """`compute` has waited for `stored` in `retire`, so fetch's event of `compute` implies it; either wait will do."""
    assert not is_caught(deaf(TO_DEVICE, TO_HOST), policy)

    def deaf_for_stored_both_ways(device: SimulatedDevice) -> None:
        deaf(TO_DEVICE, TO_HOST)(device)
        deaf(COMPUTE, TO_HOST)(device)
        device.discard = lambda tensors: None  # type: ignore[method-assign] - or it would see retire's missing wait

    assert is_caught(deaf_for_stored_both_ways, policy)


@pytest.mark.parametrize("to", [TO_HOST, TO_DEVICE])
def test_a_missing_wait_of_compute_spoils_values(to: int) -> None:
    """Without the clocks: poison alone reaches the tensors that training sees."""
    assert is_caught(deaf(COMPUTE, to), "latest", detect=False)


def test_values_are_right_without_clocks_too() -> None:
    assert not is_caught(None, "latest", detect=False)


def test_slots_freed_without_a_guard_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    free = HostArena.free
    monkeypatch.setattr(HostArena, "free", lambda self, slot, after: free(self, slot, None))
    assert is_caught(None, "latest")


def test_dropping_a_fetched_parcel_without_waiting_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(self: Courier, cargo: parcels._Cargo) -> None:
        if cargo.is_open and cargo.buffers is not None and not cargo.is_queued:
            self.device.discard(cargo.buffers)
        original(self, cargo)

    original = Courier._drop
    monkeypatch.setattr(Courier, "_drop", drop)
    assert is_caught(None, "latest")


def test_forwarding_without_keeping_the_sources_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy to the host of a forwarded parcel cannot be called off: its source must outlive it."""

    def forward(self: Courier, cargo: parcels._Cargo) -> None:
        original(self, cargo)
        for index, (_, tensors, queued) in enumerate(self._transit):
            if queued is cargo:
                self._transit[index] = (self.device.compute.record(), [torch.empty(0)], queued)
                tensors.clear()

    original = Courier._forward
    monkeypatch.setattr(Courier, "_forward", forward)
    assert is_caught(None, "latest")
