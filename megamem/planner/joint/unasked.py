"""What options would bring that no plan switches on unasked: 8 bits, whose gradients are others, and more."""

from __future__ import annotations

from collections.abc import Iterator

from megamem.ir.plan import Alternative
from megamem.planner.joint.layout import LayoutPlan, Wishes, settled_with
from megamem.planner.layer_options import LayerOptions
from megamem.sections import LowPrecision, Mlp

_MODES = {
    "rebuild": "it replaces norms and activation functions",
    "mlp": "gradients carry the error of 8 bits",
    "all": "gradients carry the error of 8 bits",
}
"""Modes of `fp8.saved_activations`, and why none is chosen unasked. `regelu2` is for fine-tuning alone."""
_GIB = float(1 << 30)


def unasked(planned: LayoutPlan, wishes: Wishes, step: float) -> Iterator[Alternative]:
    """The best frame with each of these options, where that is faster; `step` is what the plan takes in full."""
    best, frame = planned.best, planned.best.frame
    if wishes.options.rebuilds:
        return
    for options, why in _options(planned, wishes):
        found = settled_with(planned, wishes, options)
        if found is None:
            continue
        left_alone = type(planned.model)(planned.job, planned.model.hardware, planned.model.limit, options)
        less = planned.model.price(frame.setup(None)).peak - left_alone.price(frame.setup(None)).peak
        name, value = ("mlp.tiles", str(options.mlp.tiles)) if options.mlp.is_on else ("fp8", options.mode)
        option = name if options.mlp.is_on else "fp8.saved_activations"
        flag = f"--megamem-{option.replace('.', '-').replace('_', '-')} {value}"
        faster = f"{100 * (1 - found.priced.step_seconds / best.priced.step_seconds):.1f} % faster"
        yield Alternative(
            name=f"{name} {value}",
            step_seconds=step * found.priced.step_seconds / best.priced.step_seconds,
            peak_memory=found.priced.peak,
            host_memory=found.priced.host,
            fits=found.priced.fits(frame.host),
            verdict=f"{faster}, {less / _GIB:.1f} GiB less left alone; not chosen: {why}; add {flag}",
            settings={option: value},
        )


def _options(planned: LayoutPlan, wishes: Wishes) -> Iterator[tuple[LayerOptions, str]]:
    for mode, why in _MODES.items():
        yield LayerOptions(low_precision=LowPrecision(saved_activations=mode)), why  # type: ignore[arg-type]
    if not (wishes.weighs_tiles or planned.model.options.mlp.is_on):
        yield LayerOptions(mlp=Mlp(tiles="auto")), "mlp was left off"
