"""Parcels on their way to host memory and back, and the device memory that they hold on the way.

What `megamem.runtime.activations.parcels.Courier` does with tensors, here in bytes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class Cargo:
    """A parcel: in transit while its sources are not let go of; `buffers` once it is on its way back."""

    nbytes: int
    has_sources: bool = True
    has_buffers: bool = False
    is_taken: bool = False


class Courier:
    """Sources in transit, the bytes that copies hold, and those that came back by a copy."""

    def __init__(self) -> None:
        self.staging = self.returned = 0
        self.transit: deque[Cargo] = deque()

    def store(self, nbytes: int) -> Cargo | None:
        if not nbytes:
            return None
        cargo = Cargo(nbytes)
        self.transit.append(cargo)
        self.staging += nbytes
        return cargo

    def retire(self, keep_in_flight: int) -> None:
        while len(self.transit) > keep_in_flight:
            cargo = self.transit.popleft()
            cargo.has_sources = False
            if not cargo.has_buffers and not cargo.is_taken:
                self.staging -= cargo.nbytes

    def fetch(self, cargo: Cargo) -> None:
        if cargo.has_buffers or cargo.is_taken:
            return
        cargo.has_buffers = True
        if not cargo.has_sources:
            self.staging += cargo.nbytes
            self.returned += cargo.nbytes

    def take(self, cargo: Cargo) -> None:
        self.fetch(cargo)
        cargo.has_buffers, cargo.is_taken = False, True
        self.staging -= cargo.nbytes
