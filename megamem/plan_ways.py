"""What to do where nothing fits: the option that forbids it, or more GPUs, or shorter sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from megamem.errors import InfeasibleError

if TYPE_CHECKING:
    from megamem.config import Config
    from megamem.planner.joint.layout import Wishes
    from megamem.planner.joint.search import Fixed


def ways_out(wishes: Wishes, fixed: Fixed, host: float, best: Callable[[Wishes, Fixed], Config]) -> str:
    """The end of a sentence that says that nothing fits.

    host:  bytes of host memory that a plan may use unasked
    best:  the plan with other wishes, or another layout; raises InfeasibleError
    """
    for option, other, free in _without_one(wishes, fixed, host):
        try:
            found = best(other, free).plan
        except InfeasibleError:
            continue
        assert found is not None and found.predicted is not None
        seconds, layout = found.predicted.step_seconds, found.made_for.job.layout
        return f"; without {option} there is a plan: {seconds:.4g} s a step on {layout.text()}"
    return "; --min-gpus (without --gpus) finds how many GPUs it takes, --max-seq how long a sequence may be"


def _without_one(wishes: Wishes, fixed: Fixed, host: float) -> Iterator[tuple[str, Wishes, Fixed]]:
    """Each option that was given, with what is asked for without it."""
    if wishes.activations != "auto":
        given = wishes.activations if isinstance(wishes.activations, str) else wishes.activations.policy
        yield f"--activations {given}", replace(wishes, activations="auto"), fixed
    for given, option, other in (
        (wishes.schedule, "--schedule", replace(wishes, schedule="auto")),
        (wishes.vocabulary, "--vocabulary", replace(wishes, vocabulary="auto")),
        (wishes.allocator, "--allocator", replace(wishes, allocator="auto")),
    ):
        if given != "auto":
            yield f"{option} {given}", other, fixed
    if wishes.host < host:
        yield f"--host-memory {_size(wishes.host)}", replace(wishes, host=host), fixed
    if wishes.device is not None:
        yield f"--device-memory {_size(wishes.device)}", replace(wishes, device=None), fixed
    sizes = {name: size for name, size in vars(fixed).items() if size not in (None, ())}
    if sizes:
        names = ", ".join(
            name.replace("_", " ") + (f" {size}" if name != "split" else "") for name, size in sizes.items()
        )
        yield f"the layout as it is given ({names})", wishes, type(fixed)()


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.4g}GiB"
