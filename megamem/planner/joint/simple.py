"""The policies that have one fraction for all layers, and MEMO's rule for it (`fractions.memo`)."""

from __future__ import annotations

import math
from dataclasses import replace

from megamem.errors import InfeasibleError
from megamem.planner.evaluation import Model
from megamem.planner.fractions.memo import swap_fraction
from megamem.planner.fractions.problem import Limits
from megamem.planner.fractions.rank import groups_of, moments_of
from megamem.planner.joint.settle import Frame
from megamem.sections import Activations

ONE_FRACTION = {
    "recompute": Activations(policy="recompute"),
    "memo": Activations(policy="memo", swap_fraction="auto"),
    "ordered": Activations(policy="ordered", swap_fraction="auto"),
}
"""What each of them is before its fraction is known."""


def with_fraction(model: Model, frame: Frame, options: Activations) -> Activations:
    """`options` with the fraction that the rule gives the fullest rank; `recompute` has none.

    Raises InfeasibleError where not even layer inputs and attention outputs can be swapped.
    """
    if options.policy not in ("memo", "ordered"):
        return replace(options, swap_fraction=1.0)
    to_host, from_host = model.rates
    shares = []
    for rank in range(frame.schedule.placement.num_ranks):
        assigned = groups_of(model, frame.schedule, rank, 1, options.experts)
        limits = Limits(device=model.limit, host=frame.host, to_host=to_host, from_host=from_host)
        for number, item in enumerate(assigned):
            flight = max(moment[number] for moment in moments_of(frame.schedule, rank, assigned))
            flight *= sum(one.group.layers for one in assigned) / item.group.layers
            shares.append(swap_fraction(item.group, limits, in_flight=flight, ordered=options.policy == "ordered"))
    if any(share is None for share in shares):
        raise InfeasibleError(
            f"activations.policy: {options.policy}: not even inputs and attention outputs of layers can be swapped: "
            f"their copies take longer than a layer computes, or exceed {frame.host / 2**30:.1f} GiB of host memory; "
            "set policy to auto, which weighs what to do instead"
        )
    return replace(options, swap_fraction=math.floor(min(share for share in shares if share is not None) * 1e4) / 1e4)
