"""What a pipeline stage costs: time and memory of one microbatch, measured, computed or assumed.

    StageCost        F, B, W times and the activation memory of one microbatch on one stage
    VocabularyCost   times of a rank's share in the embeddings, where all ranks share them
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
    collective: 0.05                        # vocabulary parallelism: latency of one collective; default: comm
    kept: 0.01                              # and memory of one microbatch that a rank keeps from S to T; default: 0
    split: [15, 16, 16, 14]                 # layers of each stage; default: evenly

With vocabulary parallelism `first` and `last` are divided over the ranks instead. Costs of stages have, besides, what a
rank's share takes then, `vocabulary: {logits: 1, ...}` (`VocabularyCost`); the embeddings are in no stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

from megamem.errors import ScheduleError
from megamem.ir.pipeline_split import Split
from megamem.ir.schedule import Barriers, Kind, Placement


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
class VocabularyCost:
    """One microbatch in the embeddings, of which every rank holds a shard. All ranks work equally long.

    logits:         time of the shard's logits, with their statistics
    input_grad:     of the shard's part of the gradient of the hidden state
    weight_grad:    of the gradient of the shard
    embed, embed_grad:  of IF and IB
    collective:     from when the last rank has posted a collective to when its result is there
    kept:           memory that a rank keeps from the start of S to the end of T: 12 bytes a token of statistics, the
                    hidden state, and where S makes the gradient its numerator
    recompute:      time in which T makes the logits again; None: `logits`. Where the softmax is kept from S to T
                    (arXiv 2411.05288) it is 0

    S makes the logits, T the logits again and the weight gradient; the input gradient is part of T where there are two
    barriers, and of S where there is one.
    """

    logits: float = 0.0
    input_grad: float = 0.0
    weight_grad: float = 0.0
    embed: float = 0.0
    embed_grad: float = 0.0
    collective: float = 0.0
    kept: float = 0.0
    recompute: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and (not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0):
                raise ScheduleError(f"{item.name}: a cost is a number, zero or more, not {value!r}")

    def given(self) -> dict[str, float]:
        """The fields that are set, as in a costs file."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def seconds(self, kind: Kind, barriers: Barriers) -> float:
        """Time of an S, T, IF or IB."""
        if kind == "S":
            return self.logits + (self.input_grad if barriers == 1 else 0.0)
        if kind == "T":
            again = self.logits if self.recompute is None else self.recompute
            return again + self.weight_grad + (self.input_grad if barriers == 2 else 0.0)
        return self.embed if kind == "IF" else self.embed_grad


@dataclass(frozen=True, kw_only=True)
class PipelineCosts:
    """The costs of every stage of a placement, in order of stage, and `comm`: the latency of one hop between ranks.

    A hop inside a rank (the turning points of a V placement) costs nothing. `vocabulary` is for schedules in which all
    ranks share the embeddings, which are not part of the stages then.
    """

    stages: tuple[StageCost, ...]
    comm: float = 0.0
    vocabulary: VocabularyCost | None = None

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

    def costs(self, placement: Placement, *, sharded: bool = False) -> PipelineCosts:
        """Itself, for a placement with as many stages; so that a function can take this or a Workload."""
        if sharded and self.vocabulary is None:
            raise ScheduleError(
                "vocabulary parallelism needs the costs of a rank's share of the embeddings: add `vocabulary` to the "
                "costs of the stages (and take the embeddings out of them), or give the costs of layers instead"
            )
        if placement.num_stages != len(self.stages):
            raise ScheduleError(
                f"costs of {len(self.stages)} stages do not fit {placement.num_ranks} ranks with "
                f"{placement.num_chunks} chunks; give the costs of layers instead, or of {placement.num_stages} stages"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The content of a costs file."""
        content = {"stages": [asdict(stage) for stage in self.stages], "comm": self.comm}
        if self.vocabulary is not None:
            content["vocabulary"] = self.vocabulary.given()
        return content


class HasCosts(Protocol):
    """What can say the costs of the stages of a placement: PipelineCosts (of one), Uniform and Workload (of any)."""

    def costs(self, placement: Placement, *, sharded: bool = False) -> PipelineCosts:
        """The costs of every stage, with or without the embeddings that all ranks share.

        Raises ScheduleError where the model cannot be divided so.
        """


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Equal stages, whatever the placement: values per rank and microbatch (see `PipelineCosts.uniform`).

    first, last, collective, kept: as in `Workload`
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    comm: float = 0.0
    activation: float = 1.0
    weight_grad: float | None = None
    offload: float = 0.0
    first: StageCost = _NOTHING
    last: StageCost = _NOTHING
    collective: float | None = None
    kept: float = 0.0

    def costs(self, placement: Placement, *, sharded: bool = False) -> PipelineCosts:
        """The costs of every stage of this placement."""
        ends = ("first", "last", "collective", "kept")
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ends}
        return _with_embeddings(PipelineCosts.uniform(placement, **values), self, placement, sharded)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model layer by layer: `first` (embedding) is added to the first stage, `last` (output layer, loss) to the last.

    Layers are divided in order over the stages: evenly, or by `split`, the layers of each. With vocabulary parallelism
    the times of `first` and `last` are divided by the ranks, and their activations are none: what is left of them is
    `kept`, per rank, from S to T. `collective` is the latency of one collective of all ranks; None: `comm`.
    """

    layers: tuple[StageCost, ...]
    first: StageCost = _NOTHING
    last: StageCost = _NOTHING
    comm: float = 0.0
    collective: float | None = None
    kept: float = 0.0
    split: Split = ()

    def costs(self, placement: Placement, *, sharded: bool = False) -> PipelineCosts:
        """The costs of every stage of this placement."""
        ends = [0, *accumulate(self._split(placement))]
        stages = (sum(self.layers[start:end], _NOTHING) for start, end in pairwise(ends))
        return _with_embeddings(PipelineCosts(stages=tuple(stages), comm=self.comm), self, placement, sharded)

    def _split(self, placement: Placement) -> Split:
        """Layers of every stage. Raises ScheduleError where they are not those of the placement."""
        shape = f"{placement.num_ranks} ranks x {placement.num_chunks} chunks = {placement.num_stages} stages"
        if self.split:
            if len(self.split) != placement.num_stages or sum(self.split) != len(self.layers):
                raise ScheduleError(
                    f"a split of {sum(self.split)} layers into {len(self.split)} stages does not fit "
                    f"{len(self.layers)} layers on {shape}"
                )
            return self.split
        count, rest = divmod(len(self.layers), placement.num_stages)
        if rest or not count:
            raise ScheduleError(
                f"{len(self.layers)} layers cannot be divided by {shape}; give the layers of each stage as split"
            )
        return (count,) * placement.num_stages

    def to_dict(self) -> dict[str, Any]:
        """The content of a costs file."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "first": asdict(self.first),
            "last": asdict(self.last),
            "comm": self.comm,
            **({} if self.collective is None else {"collective": self.collective}),
            **({"kept": self.kept} if self.kept else {}),
            **({"split": list(self.split)} if self.split else {}),
        }


def _with_embeddings(
    bare: PipelineCosts, model: Uniform | Workload, placement: Placement, sharded: bool
) -> PipelineCosts:
    """The costs with `first` and `last` of the model on the end stages, or divided over the ranks."""
    first, last, ranks = model.first, model.last, placement.num_ranks
    if sharded:
        share = VocabularyCost(
            logits=last.forward / ranks,
            input_grad=last.backward / ranks,
            weight_grad=last.weight / ranks,
            embed=first.forward / ranks,
            embed_grad=(first.backward + first.weight) / ranks,
            collective=bare.comm if model.collective is None else model.collective,
            kept=model.kept,
        )
        return replace(bare, vocabulary=share)
    stages = list(bare.stages)
    stages[0] += first
    stages[-1] += last
    return replace(bare, stages=tuple(stages))


def parse_costs(content: Mapping[str, Any]) -> PipelineCosts | Workload:
    """Read the content of a costs file. Raises ScheduleError that names the entry."""
    forms: dict[str, set[str]] = {
        "stages": {"stages", "comm", "vocabulary"},
        "layers": {"layers", "first", "last", "comm", "collective", "kept", "split"},
    }
    form = next((name for name in forms if name in content), None)
    if form is None:
        raise ScheduleError("a costs file has a list of stages, or a list of layers")
    if unknown := set(content) - forms[form]:
        raise ScheduleError(f"costs: unknown keys {', '.join(sorted(map(str, unknown)))} beside {form}")
    comm = _real(content.get("comm", 0.0), "comm")
    if form == "stages":
        share = _share(content["vocabulary"]) if "vocabulary" in content else None
        return PipelineCosts(stages=_rows(content["stages"], "stages"), comm=comm, vocabulary=share)
    ends: dict[str, Any] = {
        name: _row(content[name], name, activation=0.0) for name in ("first", "last") if name in content
    }
    ends |= {name: _real(content[name], name) for name in ("collective", "kept") if name in content}
    if "split" in content:
        ends["split"] = _counts(content["split"])
    return Workload(layers=_rows(content["layers"], "layers"), comm=comm, **ends)


def _counts(values: Any) -> Split:
    if not isinstance(values, Sequence) or not all(type(count) is int and count >= 0 for count in values):
        raise ScheduleError(f"split: {values!r} is no list with the number of layers of each stage")
    return tuple(values)


def _share(row: Any) -> VocabularyCost:
    known = {item.name for item in fields(VocabularyCost)}
    if not isinstance(row, Mapping) or not row.keys() <= known:
        raise ScheduleError(f"vocabulary: {row!r} is no mapping with any of {sorted(known)}")
    try:
        return VocabularyCost(**{key: _real(value, key) for key, value in row.items()})
    except ScheduleError as fault:
        raise ScheduleError(f"vocabulary: {fault}") from None


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
