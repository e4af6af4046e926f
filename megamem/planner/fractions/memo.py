"""MEMO's own rule for one fraction of all tensors (arXiv 2407.12117, section 4.1), and the same for `ordered`.

Layer input and attention output of every layer travel whole, of everything else the fraction alpha:

    (S_input + S_attention + alpha S_others) / B <= T_layer              a copy hides behind the next layer's forward
    (n - 2) (S_input + S_attention + alpha S_others) <= M_host           the last two layers are not swapped

The largest alpha in 0..1 that satisfies both. With `ordered` S_others are the anchors alone.
"""

from __future__ import annotations

from megamem.ir.activation import BASE, SAVED
from megamem.planner.fractions.problem import Group, Limits

KEPT_LAYERS = 2  # their backward pass starts before a copy could come back


def swap_fraction(group: Group, limits: Limits, *, in_flight: float = 1.0, ordered: bool = False) -> float | None:
    """Alpha for layers like those of `group`; None where even the base does not fit, link or host memory.

    in_flight:  microbatches of the group that wait for their backward pass at the same time
    ordered:    of the outputs of linear layers only
    """
    base = sum(group.nbytes.get(name, 0.0) for name in BASE)
    others = sum(group.away(name) for name in group.anchors) if ordered else group.away(SAVED)
    layers = max(1.0, group.layers * in_flight - (0 if ordered else KEPT_LAYERS))
    room = min(limits.to_host * group.forward, limits.host / layers) - base
    if room < 0:
        return None
    return min(1.0, room / others)
