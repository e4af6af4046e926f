"""What a pipeline stage costs: time and memory of one microbatch, measured, computed or assumed.

    StageCost        F, B, W times and the activation memory of one microbatch on one stage
    PipelineCosts    one StageCost per stage of a placement, and the latency of a hop between ranks
    Workload         costs of the model's layers, from which the costs of any placement follow

Times have one unit of the user's choice throughout, memory likewise (bytes, or shares of a device's activations of one
microbatch, which is the default unit of all published tables).

A costs file (`megamem simulate --costs FILE`, YAML or JSON) is a mapping in one of two forms, `to_dict` of the classes:

    stages: [{forward: 1, backward: 1, weight: 1, activation: 1, weight_grad: 1}, ...]    # in order of stage
    comm: 0.02

    layers: [{...}, ...]                    # in order of the model, all of them
    first: {...}                            # embedding: added to the first stage
    last: {...}                             # output layer and loss: added to the last
    comm: 0.02
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from megamem.errors import ScheduleError
from megamem.ir.schedule import Placement


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One microbatch on one stage.

    forward, backward, weight:  time of F, of B (input gradient) and of W (weight gradient); a BW takes B + W
    activation:                 memory taken when F starts (M_B of arXiv 2401.10241, section 2.3); in a costs file the
                                default is 1, and 0 for `first` and `last`
    weight_grad:                how much of it is still held between the end of B and the end of W (M_W); in a costs
                                file the default is all of it
    offload:                    time to copy the activation to host memory, or back
    """

    forward: float
    backward: float
    weight: float
    activation: float = 1.0
    weight_grad: float = 1.0
    offload: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ScheduleError(f"{item.name}: a cost is a number, zero or more, not {value!r}")
        if self.weight_grad > self.activation:
            raise ScheduleError(f"weight_grad {self.weight_grad:g} is a part of activation {self.activation:g}")

    def __add__(self, other: StageCost) -> StageCost:
        return StageCost(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})

    @property
    def total(self) -> float:
        """Time of F, B and W together."""
        return self.forward + self.backward + self.weight


_NOTHING = StageCost(forward=0.0, backward=0.0, weight=0.0, activation=0.0, weight_grad=0.0)


@dataclass(frozen=True, kw_only=True)
class PipelineCosts:
    """The costs of every stage of a placement, in order of stage, and `comm`: the latency of one hop between ranks.

    A hop inside a rank (the turning points of a V placement) costs nothing.
    """

    stages: tuple[StageCost, ...]
    comm: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.comm) or self.comm < 0:
            raise ScheduleError(f"comm: a latency is zero or more, not {self.comm}")

    @classmethod
    def uniform(
        cls,
        placement: Placement,
        *,
        forward: float = 1.0,
        backward: float = 1.0,
        weight: float = 1.0,
        comm: float = 0.0,
        activation: float = 1.0,
        weight_grad: float | None = None,
        offload: float = 0.0,
    ) -> PipelineCosts:
        """Equal stages; the values are per rank and microbatch, and divided by the chunks. `comm` is per hop."""
        parts = placement.num_chunks
        stage = StageCost(
            forward=forward / parts,
            backward=backward / parts,
            weight=weight / parts,
            activation=activation / parts,
            weight_grad=(activation if weight_grad is None else weight_grad) / parts,
            offload=offload / parts,
        )
        return cls(stages=(stage,) * placement.num_stages, comm=comm)

    def costs(self, placement: Placement) -> PipelineCosts:
        """Itself, for a placement with as many stages; so that a function can take this or a Workload."""
        if placement.num_stages != len(self.stages):
            raise ScheduleError(
                f"costs of {len(self.stages)} stages do not fit {placement.num_ranks} ranks with "
                f"{placement.num_chunks} chunks; give the costs of layers instead, or of {placement.num_stages} stages"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The content of a costs file."""
        return {"stages": [asdict(stage) for stage in self.stages], "comm": self.comm}


class HasCosts(Protocol):
    """What can say the costs of the stages of a placement: PipelineCosts (of one), Uniform and Workload (of any)."""

    def costs(self, placement: Placement) -> PipelineCosts:
        """The costs of every stage. Raises ScheduleError where the model cannot be divided so."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Equal stages, whatever the placement: values per rank and microbatch (see `PipelineCosts.uniform`)."""

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    comm: float = 0.0
    activation: float = 1.0
    weight_grad: float | None = None
    offload: float = 0.0

    def costs(self, placement: Placement) -> PipelineCosts:
        """The costs of every stage of this placement."""
        return PipelineCosts.uniform(placement, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model layer by layer: `first` (embedding) is added to the first stage, `last` (output layer, loss) to the last.

    Layers are divided evenly and in order over the stages, as Megatron-Core divides them.
    """

    layers: tuple[StageCost, ...]
    first: StageCost = _NOTHING
    last: StageCost = _NOTHING
    comm: float = 0.0

    def costs(self, placement: Placement) -> PipelineCosts:
        """The costs of every stage of this placement."""
        count, rest = divmod(len(self.layers), placement.num_stages)
        if rest or not count:
            raise ScheduleError(
                f"{len(self.layers)} layers cannot be divided by {placement.num_ranks} ranks x {placement.num_chunks} "
                f"chunks = {placement.num_stages} stages"
            )
        stages = [
            sum(self.layers[stage * count : (stage + 1) * count], _NOTHING) for stage in range(placement.num_stages)
        ]
        stages[0] += self.first
        stages[-1] += self.last
        return PipelineCosts(stages=tuple(stages), comm=self.comm)

    def to_dict(self) -> dict[str, Any]:
        """The content of a costs file."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "first": asdict(self.first),
            "last": asdict(self.last),
            "comm": self.comm,
        }


def parse_costs(content: Mapping[str, Any]) -> PipelineCosts | Workload:
    """Read the content of a costs file. Raises ScheduleError that names the entry."""
    forms: dict[str, set[str]] = {"stages": {"stages", "comm"}, "layers": {"layers", "first", "last", "comm"}}
    form = next((name for name in forms if name in content), None)
    if form is None:
        raise ScheduleError("a costs file has a list of stages, or a list of layers")
    if unknown := set(content) - forms[form]:
        raise ScheduleError(f"costs: unknown keys {', '.join(sorted(map(str, unknown)))} beside {form}")
    comm = _real(content.get("comm", 0.0), "comm")
    if form == "stages":
        return PipelineCosts(stages=_rows(content["stages"], "stages"), comm=comm)
    ends = {name: _row(content[name], name, activation=0.0) for name in ("first", "last") if name in content}
    return Workload(layers=_rows(content["layers"], "layers"), comm=comm, **ends)


def _rows(rows: Any, name: str) -> tuple[StageCost, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ScheduleError(f"{name}: a list with one entry per {name[:-1]}, not {rows!r}")
    return tuple(_row(row, f"{name}[{index}]") for index, row in enumerate(rows))


def _row(row: Any, name: str, activation: float = 1.0) -> StageCost:
    known = {item.name for item in fields(StageCost)}
    if not isinstance(row, Mapping) or not {"forward", "backward", "weight"} <= row.keys() <= known:
        raise ScheduleError(
            f"{name}: {row!r} is no mapping with forward, backward, weight (and any of {sorted(known)})"
        )
    try:
        values = {key: _real(value, key) for key, value in row.items()}
        values.setdefault("activation", activation)
        return StageCost(**{"weight_grad": values["activation"], **values})
    except ScheduleError as fault:
        raise ScheduleError(f"{name}: {fault}") from None


def _real(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ScheduleError(f"{name}: {value!r} is no number")
    try:
        return float(value)
    except ValueError:
        raise ScheduleError(f"{name}: {value!r} is no number") from None
