"""What the engine did, counted as it happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megamem.runtime.activations.parcels import Parcel


@dataclass(slots=True)
class Retained:
    """Bytes of device memory held between forward and backward; `peak` is the most since `forget_peak`."""

    now: int = 0
    peak: int = 0

    def add(self, nbytes: int) -> None:
        """Count `nbytes` as held (negative: given back)."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def forget_peak(self) -> None:
        """Count the most from now on."""
        self.peak = self.now


@dataclass(slots=True)
class ActivationStats:
    """Totals since the engine was made, of this rank. Bytes are those of tensors; a token counts once a replay.

    kept_nbytes         left in device memory until the layer's backward pass
    untouched_nbytes    the same, of layers that the plan leaves alone
    swapped_nbytes      moved to host memory
    link_nbytes         what was copied to move it, and as much is copied back: less where it is compressed
    recomputed_nbytes   thrown away and rebuilt
    replayed_tokens     tokens over which a layer's forward ran again
    retained            of what is kept: held now, and at most
    peak_held_nbytes    the most device memory held for backward passes at any time: kept, in staging buffers, and the
                        layer that is back for its backward pass
    """

    num_runs: int = 0
    num_untouched: int = 0
    num_unplanned: int = 0
    num_without_room: int = 0
    kept_nbytes: int = 0
    untouched_nbytes: int = 0
    swapped_nbytes: int = 0
    link_nbytes: int = 0
    recomputed_nbytes: int = 0
    replayed_tokens: int = 0
    num_steps: int = 0
    retained: Retained = field(default_factory=Retained)
    peak_held_nbytes: int = 0

    def add_swapped(self, parcel: Parcel) -> None:
        """Count what was stored."""
        self.swapped_nbytes += parcel.tensors_nbytes
        self.link_nbytes += parcel.nbytes
