"""What a configuration leaves to the planner: its options that say `auto`, and the section that says what to plan with.

Other options have an `auto` of their own, which the run itself resolves (`host_memory`, `loss_chunk`, `chunks` ...);
they are not meant here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megamem.options import Bytes, File, option
from megamem.sections import Section

if TYPE_CHECKING:
    from megamem.config import Config

LEFT: Mapping[str, tuple[str, ...]] = {
    "activations": ("policy", "swap_fraction"),
    "vocabulary": ("fused_loss", "parallel"),
    "allocator": ("mode",),
}
"""Options whose `auto` the planner resolves, by section."""


@dataclass(frozen=True, kw_only=True)
class Planning(Section):
    """What the planner goes by where options of other sections are left to it. Switches nothing on by itself."""

    NAME: ClassVar[str] = "planner"
    KEY: ClassVar[str] = "hardware"

    hardware: str = option(
        File("NAME|FILE|auto"),
        "auto",
        "The GPU: a name of `megamem plan --list`, or what `megamem profile --hardware` wrote. auto: the one that the "
        "process has.",
    )
    device_memory: int | Literal["auto"] = option(
        Bytes(), "auto", "Device memory of each GPU for training. auto: all of it but the headroom of the GPU's row."
    )

    @classmethod
    def is_off(cls, values: Mapping[str, object]) -> bool:
        """Always: it is no capability."""
        return True

    @classmethod
    def contradictions(cls, values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
        """None inside the section; that nothing is left to the planner is told by `unused`."""
        return []


def undecided(config: Config) -> list[str]:
    """The options that are left to the planner, as `section.option`."""
    return [
        f"{section}.{name}"
        for section, names in LEFT.items()
        for name in names
        if getattr(getattr(config, section), name) == "auto"
    ]


def unused(config: Config) -> list[str]:
    """Options of the planner that nothing reads, one sentence each."""
    if undecided(config):
        return []
    return [
        f"planner.{name}: has no effect, because nothing is left to the planner; set activations.policy (or another of "
        f"{', '.join(f'{section}.{names[0]}' for section, names in LEFT.items())}) to auto, or remove {name}"
        for name in config.planner.given()
    ]
