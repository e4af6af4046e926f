"""What is to be decided on one pipeline rank: for each group of alike layers, where each tensor's tokens go.

A layer's tensors form a chain. Layer input and attention output are stored, always: without them attention would run
again. The outputs of its linear layers (anchors) may be stored, token range by token range, each saving its product in
the replay. Where everything that the layer saved is stored (`saved`) there is no replay, and no anchor is needed.

    tokens 0 |------ saved ------|------- anchor fc1 -------|........ recomputed ........| s

Every share may lie in device memory or in host memory. Recomputing costs time; device memory and host memory are
limited; copies are free as far as computing covers them, and cost time beyond:

    minimise    sum over layers of   recomputation + waits for copies out + waits for copies in
    such that   copied bytes <= rate x (computing that covers them + waits)          for each layer, out and in
                kept, staged and the layer at work <= device memory                  at each moment of the schedule
                swapped <= host memory                                               at each moment of the schedule

The cover of a layer's copy out is the forward pass of the next `lag` layers, that of its copy in the backward pass of
the layer after it. The engine lets copies lag one layer behind (MEMO's two rounding buffers, arXiv 2407.12117, 4.2).
With a longer lag the constraint holds for every prefix of the pass; of alike layers that is the one over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megamem.ir.activation import ANCHORS, BASE, SAVED

TENSORS: tuple[str, ...] = (*BASE, *ANCHORS, SAVED)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers of one chunk of the rank that are alike.

    layers:     how many
    nbytes:     bytes of each tensor of one layer and microbatch; `saved` is all that autograd saves besides the base.
                A tensor that is missing cannot be decided on
    seconds:    what recomputing each costs: anchors their product, `saved` the element-wise rest of a replay
    storage:    bytes that a tensor takes where it is kept, if more than its own (a view keeps all of its storage)
    sent:       bytes that of a tensor travel and lie in host memory, if less than its own (`activations.compress`)
    coding:     seconds to compress all of a tensor and to get it back, for those that travel so
    tiers:      tensors that may only be `kept`, or only be `swapped`
    of:         layers of the group that this one is a part of; 0: it is whole
    beside:     bytes of a tensor that are never all back while the layer is at work: of an MLP in tiles
    held:       bytes that stay in device memory whatever is decided
    moved:      bytes that go to host memory and come back whatever is decided
    again:      bytes that are made again for the backward pass, and in no memory before
    again_seconds:  what making them takes; `backward` has it
    forward, backward:  seconds of one layer's passes, recomputation not counted
    """

    layers: int
    nbytes: Mapping[str, float]
    seconds: Mapping[str, float]
    forward: float
    backward: float
    held: float = 0.0
    moved: float = 0.0
    again: float = 0.0
    again_seconds: float = 0.0
    storage: Mapping[str, float] = field(default_factory=dict)
    sent: Mapping[str, float] = field(default_factory=dict)
    coding: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)
    tiers: Mapping[str, str] = field(default_factory=dict)
    of: int = 0

    def cover(self, lag: int) -> float:
        """Layers that cover the copies of one: those of a pass, the first one's left out, `lag` more at its end."""
        return ((self.of or self.layers) - 1 + lag) / (self.of or self.layers)

    def allows(self, name: str, tier: str) -> bool:
        """Whether a tensor may be `kept`, or `swapped`."""
        return self.tiers.get(name, tier) == tier

    def resident(self, name: str) -> float:
        """Bytes of a tensor that is kept."""
        return self.storage.get(name, self.nbytes[name])

    def away(self, name: str) -> float:
        """Bytes of a tensor that travel, and that host memory holds."""
        return self.sent.get(name, self.nbytes[name])

    def staged(self, name: str) -> float:
        """Bytes of a tensor that are in device memory at once on its way."""
        share = 1.0 - self.beside.get(name, 0.0) / self.nbytes[name] if self.nbytes[name] else 0.0
        return self.away(name) * share

    def together(self, name: str) -> float:
        """Bytes of a tensor that are there at once when it is back."""
        return self.nbytes[name] - self.beside.get(name, 0.0)

    @property
    def anchors(self) -> tuple[str, ...]:
        """The anchors that these layers have."""
        return tuple(name for name in ANCHORS if name in self.nbytes)

    @property
    def replay(self) -> float:
        """Seconds of recomputing everything."""
        return sum(self.seconds.get(name, 0.0) for name in (*self.anchors, SAVED))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a rank has.

    device:     bytes for what layers hold for their backward passes
    host:       bytes of pinned memory
    to_host, from_host:  bytes per second, in the situation at hand (both directions at once in a pipeline)
    lag:        layers by which a copy out may lag behind
    """

    device: float
    host: float
    to_host: float
    from_host: float
    lag: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A rank: its groups, its limits, and how many microbatches of each group are held at the moments that matter.

    moments:  each has one number per group; a moment that another one exceeds everywhere can be left out
    """

    groups: tuple[Group, ...]
    limits: Limits
    moments: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """One group: the share of the tokens of each tensor that is kept, and that is swapped; the rest is recomputed.

    An anchor's shares are of the tokens beyond those of `saved`.
    """

    kept: Mapping[str, float] = field(default_factory=dict)
    swapped: Mapping[str, float] = field(default_factory=dict)

    def stored(self, name: str) -> float:
        """Kept or swapped."""
        return self.kept.get(name, 0.0) + self.swapped.get(name, 0.0)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A decision: shares per group, and the seconds per microbatch that it costs the rank.

    method:  `linear programme` or `greedy`
    """

    shares: tuple[Shares, ...]
    seconds: float
    method: str


def recomputation(group: Group, shares: Shares) -> float:
    """Seconds of recomputation of one layer."""
    saved = shares.stored(SAVED)
    seconds = (1.0 - saved) * group.seconds.get(SAVED, 0.0)
    return seconds + sum(max(0.0, 1.0 - saved - shares.stored(name)) * group.seconds[name] for name in group.anchors)


def kept_bytes(group: Group, shares: Shares) -> float:
    """Bytes of one layer and microbatch in device memory."""
    return group.held + sum(group.resident(name) * share for name, share in shares.kept.items())


def swapped_bytes(group: Group, shares: Shares) -> float:
    """Bytes of one layer and microbatch in host memory."""
    return group.moved + sum(group.away(name) * share for name, share in shares.swapped.items())


def coding(group: Group, shares: Shares) -> float:
    """Seconds that one layer takes to compress what travels, and to get it back."""
    return sum(seconds * shares.swapped.get(name, 0.0) for name, seconds in group.coding.items())


def waits(group: Group, limits: Limits, shares: Shares) -> float:
    """Seconds that one layer's copies out and in are not covered."""
    nbytes = swapped_bytes(group, shares)
    cover = group.cover(limits.lag)
    out = nbytes / limits.to_host - cover * group.forward
    back = nbytes / limits.from_host - cover * (group.backward + recomputation(group, shares))
    return max(0.0, out) + max(0.0, back)


def experts_again(problem: Problem) -> float:
    """Seconds per microbatch of what is recomputed whatever is decided."""
    return sum(group.layers * group.again_seconds for group in problem.groups)


def cost(problem: Problem, shares: tuple[Shares, ...]) -> float:
    """Seconds per microbatch: recomputation, codecs and waits of all layers."""
    return sum(
        group.layers * (recomputation(group, one) + coding(group, one) + waits(group, problem.limits, one))
        for group, one in zip(problem.groups, shares, strict=True)
    )


def whole_bytes(group: Group) -> float:
    """Everything of one layer and microbatch, as it is when its backward pass runs."""
    return (
        group.held
        + group.moved
        + group.again
        + sum(group.together(name) for name in (*BASE, SAVED) if name in group.nbytes)
    )


def at_work_bytes(group: Group, shares: Shares) -> float:
    """Bytes of the layer at work beyond those that it has kept."""
    there = sum((group.resident(name) - group.beside.get(name, 0.0)) * share for name, share in shares.kept.items())
    return whole_bytes(group) - group.held - there


def device_bytes(problem: Problem, shares: tuple[Shares, ...]) -> float:
    """The most that is in device memory at any moment: kept, staged, and the layer at work."""
    pairs = list(zip(problem.groups, shares, strict=True))
    lag = problem.limits.lag
    most = 0.0
    for moment in problem.moments:
        kept = sum(count * g.layers * kept_bytes(g, s) for count, (g, s) in zip(moment, pairs, strict=True))
        for group, one in pairs:
            copied = group.moved + sum(group.staged(name) * share for name, share in one.swapped.items())
            most = max(most, kept + (1 + lag) * copied, kept + at_work_bytes(group, one) + copied)
    return most


def host_bytes(problem: Problem, shares: tuple[Shares, ...]) -> float:
    """The most that is in host memory at any moment."""
    pairs = list(zip(problem.groups, shares, strict=True))
    return max(
        sum(count * g.layers * swapped_bytes(g, s) for count, (g, s) in zip(moment, pairs, strict=True))
        for moment in problem.moments
    )


def fits(problem: Problem, shares: tuple[Shares, ...], tolerance: float = 1e-6) -> bool:
    """Whether both memories suffice."""
    return device_bytes(problem, shares) <= problem.limits.device * (1 + tolerance) and host_bytes(
        problem, shares
    ) <= problem.limits.host * (1 + tolerance)


def all_kept(problem: Problem) -> tuple[Shares, ...]:
    """Everything in device memory: what autograd alone would do."""
    names = (*BASE, SAVED)
    return tuple(Shares(kept={name: 1.0 for name in names if name in group.nbytes}) for group in problem.groups)
