"""Where tiles of an MLP keep the output of its first linear layer, as the activation policy has it.

It has two names in a rule: the anchor `fc1`, and what the MLP saves for its activation function (`saved`, or the path
of the module). Stored is the larger of the two shares, for both are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, final

from torch import Tensor

from megamem.ir.activation import Fate, LayerRule
from megamem.runtime.activations.codec import codec_for
from megamem.runtime.activations.parcels import Manifest, Parcel
from megamem.runtime.tiles.parts import AbstractTileStore

if TYPE_CHECKING:
    from megamem.runtime.activations.engine import ActivationEngine

Manifests = dict[tuple[object, ...], Manifest]


@final
class TileShelf(AbstractTileStore):
    """What the tiles of one call of one MLP keep: in device memory, or as parcels of their own, one behind the other.

    A tile's copy runs while the next one computes, and its device memory goes back before the one after that: two
    tiles are there at a time. In the backward pass the tile before is on its way while one computes.

    manifests:      of the parcels of this layer, by shapes; filled as they are met.
    warn_of_room:   called when host memory is full.
    """

    def __init__(
        self, engine: ActivationEngine, fate: Fate, manifests: Manifests, warn_of_room: Callable[[], None]
    ) -> None:
        self._engine, self._fate, self._manifests, self._warn_of_room = engine, fate, manifests, warn_of_room
        self._resident: dict[int, list[Tensor]] = {}
        self._parcels: list[tuple[int, Parcel]] = []
        self.kept_nbytes = 0

    @property
    def has_parcels(self) -> bool:
        """Whether a tile is in host memory."""
        return bool(self._parcels)

    def stored_tokens(self, tokens: int) -> int:
        return self._fate.num_tokens(tokens)

    def put(self, tile: int, tensors: Sequence[Tensor]) -> bool:
        if self._fate.tier == "hbm":
            self._resident[tile] = list(tensors)
            self.kept_nbytes += sum(tensor.nbytes for tensor in tensors)
            return True
        courier, stats = self._engine.courier, self._engine.stats
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        manifest = self._manifests.get(key)
        if manifest is None:
            codec = codec_for(self._fate.codec, tensors[0].dtype)
            manifest = self._manifests[key] = Manifest(tensors, [codec, *[None] * (len(tensors) - 1)])
        parcel = courier.store(tensors, manifest=manifest)
        courier.retire(keep_in_flight=1)
        if parcel is None:
            stats.num_without_room += 1
            self._warn_of_room()
            return False
        stats.add_swapped(parcel)
        self._parcels.append((tile, parcel))
        return True

    def fetch(self) -> None:
        """Start to bring back the tile that will be taken first."""
        if self._parcels:
            self._engine.courier.fetch(self._parcels[-1][1])

    def take(self, tile: int) -> list[Tensor]:
        if tile in self._resident:
            return self._resident.pop(tile)
        number, parcel = self._parcels.pop()
        assert number == tile
        tensors = self._engine.courier.take(parcel)
        self.fetch()
        return tensors

    def on_recomputed(self, nbytes: int) -> None:
        self._engine.stats.recomputed_nbytes += nbytes


def fate_of_tiles(rule: LayerRule, path: str) -> Fate:
    """What becomes of the output of the first linear layer of the module at `path`."""
    fates = (rule.fates["fc1"], rule.fate_of(path))
    return max(fates, key=lambda fate: (fate.fraction, fate.tier == "hbm"))
