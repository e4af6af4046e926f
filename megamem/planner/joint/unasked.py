"""What options would bring that no plan switches on unasked: 8 bits, whose gradients are others, and more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
        is_sent = options.compress != wishes.options.compress  # else it changes what layers save
        name, option, value = _named(options, is_sent=is_sent)
        flag = f"--megamem-{option.replace('.', '-').replace('_', '-')} {value}"
        if is_sent:
            flag = f"--megamem-activations-policy auto {flag}"
        saving = "" if is_sent else f", {_saved(planned, options) / _GIB:.1f} GiB less left alone"
        faster = f"{100 * (1 - found.priced.step_seconds / best.priced.step_seconds):.1f} % faster"
        yield Alternative(
            name=f"{name} {value}",
            step_seconds=step * found.priced.step_seconds / best.priced.step_seconds,
            peak_memory=found.priced.peak,
            host_memory=found.priced.host,
            fits=found.priced.fits(frame.host),
            verdict=f"{faster}{saving}; not chosen: {why}; add {flag}",
            settings={option: value},
        )


def _named(options: LayerOptions, *, is_sent: bool) -> tuple[str, str, str]:
    """A short name, the option, its value."""
    if is_sent:
        return "compress", "activations.compress", options.compress
    if options.mlp.is_on:
        return "mlp.tiles", "mlp.tiles", str(options.mlp.tiles)
    return "fp8", "fp8.saved_activations", options.mode


def _saved(planned: LayoutPlan, options: LayerOptions) -> float:
    """Bytes of the fullest rank that layers do not hold with these options, all else left alone."""
    model, setup = planned.model, planned.best.frame.setup(None)
    other = type(model)(planned.job, model.hardware, model.limit, options)
    return model.price(setup).peak - other.price(setup).peak


def _options(planned: LayoutPlan, wishes: Wishes) -> Iterator[tuple[LayerOptions, str]]:
    if wishes.options.compress == "none" and planned.best.activations.policy in ("memo", "ordered"):
        yield replace(wishes.options, compress="fp8"), "gradients carry the error of 8 bits"
    for mode, why in _MODES.items():
        low_precision = LowPrecision(saved_activations=mode)  # type: ignore[arg-type]
        yield replace(wishes.options, low_precision=low_precision, mlp=Mlp()), why
    if not (wishes.weighs_tiles or planned.model.options.mlp.is_on):
        yield replace(wishes.options, mlp=Mlp(tiles="auto")), "mlp was left off"
