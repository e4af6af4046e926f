"""A layer replicated in a trace is what a deeper model asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megamem.errors import AllocationError
from megamem.ir.allocation_trace import AllocationTrace, Phase, Place, Request

pytest.importorskip("torch", reason="pip install 'megamem[train]'")  # of the room, not of this module

from megamem.profiler.replication import renumbered, replicate


class Model:
    """Writes what a stack of layers asks for: outputs handed on, saved tensors, scratch, gradients."""

    def __init__(self) -> None:
        self.births: list[tuple[int, int]] = []  # size, event
        self.deaths: dict[int, int] = {}
        self.phases: list[Phase] = []
        self.now = 0

    def malloc(self, size: int) -> int:
        self.births.append((size, self.now))
        self.now += 1
        return len(self.births) - 1

    def free(self, *requests: int) -> None:
        for request in requests:
            self.deaths[request] = self.now
            self.now += 1

    def enter(self, label: str) -> None:
        self.phases.append(Phase(begin=self.now, label=label))

    def trace(self) -> AllocationTrace:
        requests = [
            Request(size=size, birth=birth, death=self.deaths.get(number))
            for number, (size, birth) in enumerate(self.births)
        ]
        return AllocationTrace(
            requests=tuple(requests), phases=tuple(self.phases), num_events=self.now, persistent=1000, source="test"
        )


def step(layers: int, *, microbatches: int = 2, odd: int | None = None) -> AllocationTrace:
    """Two forward passes, then two backward passes; layer `odd` wants one buffer more."""
    model = Model()
    saved: dict[tuple[int, int], int] = {}
    for microbatch in range(microbatches):
        hidden = model.malloc(64)
        for layer in range(layers):
            model.enter(f"layer {layer} forward, microbatch {microbatch}")
            scratch = model.malloc(256)
            saved[layer, microbatch] = model.malloc(128 + (layer == odd))
            output = model.malloc(64)
            model.free(scratch, hidden)
            model.enter("")
            model.free(model.malloc(16))
            hidden = output
        model.free(model.malloc(1024), hidden)
    for microbatch in range(microbatches):
        gradient = model.malloc(65)
        for layer in reversed(range(layers)):
            model.enter(f"layer {layer} backward, microbatch {microbatch}")
            other = model.malloc(65)
            model.free(saved[layer, microbatch], gradient)
            gradient = other
        model.free(gradient)
    model.enter("optimizer")
    model.free(model.malloc(4))
    return model.trace()


@pytest.mark.parametrize("copies", [0, 1, 3, 76])
def test_four_layers_stand_for_more(copies: int) -> None:
    found = replicate(step(4), layers=(1, 2), copies=copies, persistent=10)
    wanted = step(4 + copies)
    assert (found.requests, found.phases) == (wanted.requests, wanted.phases)
    assert found.persistent == 1000 + 10 * copies
    assert found.peak_live() == wanted.peak_live()


def test_what_does_not_repeat_is_not_repeated() -> None:
    with pytest.raises(AllocationError, match="layers 1 and 2 do not ask for the same memory"):
        replicate(step(4, odd=2), layers=(1, 2), copies=2)
    with pytest.raises(AllocationError, match="layer 5 is in no phase"):
        replicate(step(4), layers=(5, 6), copies=2)
    with pytest.raises(AllocationError, match="neighbours"):
        replicate(step(4), layers=(1, 3), copies=2)


def test_a_buffer_that_stays_for_later_layers_is_refused() -> None:
    trace = step(4)
    places = trace.places()
    index = next(i for i, place in enumerate(places) if place.layer == 1)
    assert trace.requests[index].death is not None
    kept = replace(trace.requests[index], death=None)
    requests = tuple(kept if i == index else request for i, request in enumerate(trace.requests))
    with pytest.raises(AllocationError):
        replicate(replace(trace, requests=requests), layers=(1, 2), copies=1)


def test_places_are_labels_taken_apart() -> None:
    assert Place.of("layer 3 forward, microbatch 0") == Place(part="forward", layer=3, microbatch=0)
    assert Place.of("output layer backward, microbatch 7") == Place(part="output layer backward", microbatch=7)
    assert Place.of("optimizer") == Place(part="optimizer")
    assert Place.of("") == Place()
    assert renumbered("layer 1 backward, microbatch 1", {1: 9}) == "layer 9 backward, microbatch 1"
    assert renumbered("optimizer", {}) == "optimizer"
    trace = step(3)
    counts = {(place.layer, place.part) for place in trace.places()}
    assert {(2, "backward"), (None, "optimizer"), (0, "forward")} <= counts
