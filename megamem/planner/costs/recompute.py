"""What a layer rule costs: seconds of recomputation before a layer's backward pass.

A replay runs the layer's forward on the tokens that are not stored, attention answered from the store, and the outputs
of anchors answered as far as they are stored; it ends at the last tensor that is missing, before the product of fc2
(`runtime.activations.recipe`, `replay`). No replay looks into an MLP that runs in tiles: they run its first product
again for what is not stored of it. What `LayerTime.again` has is not counted here.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamem.ir.activation import LayerRule
from megamem.planner.costs.layer import LayerTime
from megamem.planner.memory.inventory import Saved
from megamem.planner.memory.ledger import fate_of_tiles


def replay_seconds(
    layer: LayerTime, tensors: Sequence[Saved], rule: LayerRule, *, before: LayerTime | None = None
) -> float:
    """Recomputation of one layer in one microbatch. `before`: the layer from which the input is rebuilt, if it is."""
    if rule.untouched:
        return 0.0
    stored = [rule.fate_of(one.name).fraction for one in tensors if one.rebuilt and not (one.routed or one.tiled)]
    seconds = 0.0 if before is None else before.residual
    if layer.tiles:
        seconds += (1.0 - fate_of_tiles(rule).fraction) * layer.anchor("fc1")
    first = min(stored, default=1.0)
    if first >= 1.0:
        return seconds
    seconds += (1.0 - first) * layer.rebuild
    if layer.job.model.latent is not None:
        seconds += (1.0 - first) * layer.anchor("qkv")
    for name, whole in layer.anchors.items():
        if layer.tiles and name == "fc1":
            continue  # its own tiles run it again
        share = max(first, rule.fates[name].fraction)
        if name == "fc1":  # the replay ends before it where all that is made of it is stored
            made = [rule.fate_of(one.name).fraction for one in tensors if one.anchor == name and one.rebuilt]
            share = max(share, min(made, default=share))
        seconds += (1.0 - share) * whole
    return seconds
