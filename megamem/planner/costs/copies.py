"""What computing waits for when activations travel to host memory and back: the engine's waits, gone through in time.

    forward    the compute stream waits, before a layer, for the copies of all layers but the one before it
    backward   a layer's copy back starts when the layer after it begins its backward pass; its own waits for the copy,
               and from the second layer of a pass on for every copy to the host

(`runtime.activations`: Courier.retire, Courier.fetch, ActivationEngine.on_begin.) Copies of one direction follow each
other. A chunk runs forward and backward in turns until the pattern repeats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

_ROUNDS = 3  # the first fills the queues, the last is what repeats


class CopiedLayer(NamedTuple):
    """A layer in seconds and bytes: computing forward and backward (recomputation included), and what travels."""

    forward: float
    backward: float
    nbytes: float


class Stalls(NamedTuple):
    """Seconds that computing waits in one forward and one backward pass of a chunk."""

    forward: float
    backward: float


def stalls(layers: Sequence[CopiedLayer], to_host: float, from_host: float, *, turns_around: bool) -> Stalls:
    """Waits of a chunk in the steady state, with these rates in bytes per second.

    turns_around:  the backward pass is of the microbatch that just ran forward (no pipeline, or its last stage); the
                   parcels that have not been let go of come back without a copy
    """
    if not any(layer.nbytes for layer in layers):
        return Stalls(0.0, 0.0)
    pattern = _Pattern(layers, to_host, from_host, turns_around)
    found = Stalls(0.0, 0.0)
    for _ in range(_ROUNDS):
        found = Stalls(pattern.forward(), pattern.backward())
    return found


class _Pattern:
    """A chunk's passes in turns, on three clocks."""

    def __init__(self, layers: Sequence[CopiedLayer], to_host: float, from_host: float, turns_around: bool) -> None:
        self.layers, self.to_host, self.from_host, self.turns_around = layers, to_host, from_host, turns_around
        self.now = self.out = self.back = 0.0
        self.transit: deque[tuple[int, float]] = deque()  # layer, end of its copy
        self.ready: dict[int, float] = {}

    def forward(self) -> float:
        """One forward pass; the waits in it."""
        waited = 0.0
        for index, layer in enumerate(self.layers):
            waited += self._retire(1)
            self.now += layer.forward
            if layer.nbytes:
                self.out = max(self.out, self.now) + layer.nbytes / self.to_host
                self.transit.append((index, self.out))
        return waited

    def backward(self) -> float:
        """One backward pass; the waits in it."""
        waited = 0.0
        order = [index for index in reversed(range(len(self.layers))) if self.layers[index].nbytes]
        following = dict(pairwise(order))
        if self.turns_around and order:
            self.ready[order[0]] = self.now  # its sources are still there
        for place, index in enumerate(reversed(range(len(self.layers)))):
            if (later := following.get(index)) is not None:
                self._fetch(later)
            elif order and index == order[-1] and not self.turns_around:
                self._fetch(order[0])  # of the next microbatch, ahead of its backward pass
            waited += self._retire(0 if place else 1)
            waited += self._wait(self.ready.pop(index, self.now) if self.layers[index].nbytes else self.now)
            self.now += self.layers[index].backward
        return waited

    def _fetch(self, index: int) -> None:
        has_sources = self.turns_around and any(known == index for known, _ in self.transit)
        if has_sources:
            self.ready[index] = self.now
            return
        self.back = max(self.back, self.now) + self.layers[index].nbytes / self.from_host
        self.ready[index] = self.back

    def _retire(self, keep: int) -> float:
        waited = 0.0
        while len(self.transit) > keep:
            waited += self._wait(self.transit.popleft()[1])
        return waited

    def _wait(self, until: float) -> float:
        waited = max(0.0, until - self.now)
        self.now += waited
        return waited
