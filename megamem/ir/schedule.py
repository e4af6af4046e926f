"""A pipeline schedule as data: per rank a list of actions, in the order in which the rank runs them.

    Schedule           name, placement, number of microbatches, and one tuple of actions per pipeline rank
    Placement          which stage of the model each chunk of each rank is
    Action             one thing a rank does: kind, chunk, microbatch
    TimedAction        an action with its start and end

A stage is a position in the model, 0 .. p*v-1 for p ranks with v chunks each; a chunk is the index of a stage on its
rank. Two placements: `round-robin` is Megatron-Core's own (stage = chunk * p + rank); in `v` every second chunk runs
backwards through the ranks, so that with two chunks rank 0 holds the first and the last stage (arXiv 2405.15362,
section 3).

Kinds of actions, for chunk c and microbatch m:

    F                  forward pass
    B, W               gradient of the input; gradient of the parameters (arXiv 2401.10241, section 2)
    BW                 both at once, as autograd does it
    S, T               vocabulary parallelism: output layer with softmax statistics; its weight gradient (2411.05288)
    IF, IB             vocabulary parallelism: input embedding of the rank's words; the gradient of their rows
    SEND_F, RECV_F     send the output of F(c, m) to the next stage; post the receive for the input of F(c, m)
    SEND_B, RECV_B     send the input gradient of chunk c to the stage before; post the receive for its output gradient
    OFFLOAD, RELOAD    begin to copy what F(c, m) saved to host memory; begin to copy it back (arXiv 2503.01328)

Generators make F, B, W, BW (and OFFLOAD, RELOAD); vocabulary passes, sends and receives are added by passes. Posting
never waits: the action that needs a message waits for it.

**Vocabulary parallelism** (arXiv 2411.05288, section 4). Both embeddings lie in shards on all ranks (`ir.vocabulary`),
and every rank runs IF, S, T and IB once per microbatch; their chunk is written as 0 and means nothing. Between them
are collectives of all pipeline ranks, each kind of them on a communicator of its own, posted without waiting as here:

    tokens         on the rank of the first stage before IF(m - 2), on the others before IF(m): a broadcast, for IF(m)
    embedding      after IF(m) on every rank: the sum over the shards, for F(m) of the first stage
    hidden state   after F(m) of the last stage, on the other ranks before S(m): a broadcast, for S(m) on every rank
    statistics     after S(m) on every rank: an all-reduce, for T(m) on every rank
    gradient       to the rank of the last stage, for its B(m): the sum of the shards' gradients of the hidden state
    embedding's    after B(m) of the first stage, on the other ranks before IB(m): a broadcast of the gradient of the
                   embedding, for IB(m) on every rank

Trainers give tokens to the first stage and labels to the last only, hence the broadcasts: labels come with the hidden
state, tokens `TOKENS_AHEAD` microbatches before they are needed, so that no rank waits for the first one's IF.

`Schedule.barriers` says where the gradient is made. With 2 (algorithm 1) T makes it along with the weight gradient, so
B(m) of the last stage waits for T(m) of every rank. With 1 (algorithm 2) S makes it but for a factor of each token, it
travels with the statistics, B(m) waits for S(m) of every rank only, and T may run at any later time.

A communicator needs one order on all ranks. So IF, S, IB, and T where there are 2 barriers, come in the same order of
microbatches on every rank, S in that of F of the last stage, and IB in that of B of the first.

**Text form**, both ways, to paste in a bug report (`Schedule.to_text`, `parse_schedule`). An action is
`<chunk><KIND><microbatch>` as in torch.distributed.pipelining, `0F3`, `1SEND_B0`; a part of a W is `0W3:1/4`, the
second quarter of it. Lines that begin with # are comments. `group: 4` and `barriers: 2` are there where they are set.

    megamem-schedule 1
    name: zb-h1
    placement: round-robin
    ranks: 2
    chunks: 1
    microbatches: 2
    rank 0: 0F0 0F1 0B0 0W0 0B1 0W1
    rank 1: 0F0 0B0 0F1 0B1 0W0 0W1
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, get_args

from megamem.errors import ScheduleError

Kind = Literal[
    "F", "B", "W", "BW", "S", "T", "IF", "IB", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "OFFLOAD", "RELOAD"
]  # fmt: skip
Direction = Literal["F", "B"]  # of messages: activations forward, gradients backward
Shape = Literal["round-robin", "v"]
Barriers = Literal[1, 2]

KINDS: tuple[Kind, ...] = get_args(Kind)
VOCABULARY: frozenset[Kind] = frozenset({"S", "T", "IF", "IB"})
COMPUTE: frozenset[Kind] = frozenset({"F", "B", "W", "BW", *VOCABULARY})
COMMUNICATION: frozenset[Kind] = frozenset({"SEND_F", "RECV_F", "SEND_B", "RECV_B"})
SHAPES: tuple[Shape, ...] = get_args(Shape)

TOKENS_AHEAD: Final = 2
"""Microbatches by which the rank of the first stage is ahead with tokens, and IF at most with embeddings."""

_ACTION = re.compile(r"^(\d+)(" + "|".join(sorted(KINDS, key=len, reverse=True)) + r")(\d+)(?::(\d+)/(\d+))?$")
_HEADER = "megamem-schedule 1"


class Channel(NamedTuple):
    """A first-in-first-out line of messages: activations (F) or gradients (B) from rank to rank."""

    direction: Direction
    source: int
    destination: int


class Action(NamedTuple):
    """One action of a rank. `part` of `parts` divides a W (by linear layer); every other action is whole."""

    kind: Kind
    chunk: int
    microbatch: int
    part: int = 0
    parts: int = 1

    @property
    def is_compute(self) -> bool:
        """Whether the action occupies the rank's compute stream."""
        return self.kind in COMPUTE

    def __str__(self) -> str:
        piece = f":{self.part}/{self.parts}" if self.parts > 1 else ""
        return f"{self.chunk}{self.kind}{self.microbatch}{piece}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read the text form. Raises ScheduleError, naming the text, when it is none."""
        match = _ACTION.match(text.strip())
        if match is None:
            raise ScheduleError(
                f"{text!r} is no action; write <chunk><kind><microbatch>, e.g. 0F3; kinds: {' '.join(KINDS)}"
            )
        chunk, kind, microbatch, part, parts = match.groups()
        action = cls(kind, int(chunk), int(microbatch), int(part or 0), int(parts or 1))  # type: ignore[arg-type]
        if (action.parts > 1 and action.kind != "W") or action.part >= action.parts:
            raise ScheduleError(f"{text!r}: only a W has parts, numbered from 0")
        return action


class TimedAction(NamedTuple):
    """An action of a rank with its start and end, predicted or measured; what the views draw."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which stage each chunk of each rank holds, for `num_ranks` ranks with `num_chunks` chunks each."""

    shape: Shape
    num_ranks: int
    num_chunks: int

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ScheduleError(f"a placement is {' or '.join(SHAPES)}, not {self.shape!r}")
        if self.num_ranks < 1 or self.num_chunks < 1:
            raise ScheduleError(f"{self.num_ranks} ranks with {self.num_chunks} chunks each: both must be at least 1")

    @property
    def num_stages(self) -> int:
        """Ranks times chunks."""
        return self.num_ranks * self.num_chunks

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that `chunk` of `rank` is."""
        if self.shape == "v" and chunk % 2:
            return (chunk + 1) * self.num_ranks - 1 - rank
        return chunk * self.num_ranks + rank

    def rank_of(self, stage: int) -> int:
        """The rank that holds `stage`."""
        chunk, offset = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - offset if self.shape == "v" and chunk % 2 else offset

    def chunk_of(self, stage: int) -> int:
        """The index of `stage` among the chunks of its rank."""
        return stage // self.num_ranks


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every pipeline rank does in one training step, in order.

    name:              the family it comes from, or a name of the user's
    placement:         which stage each chunk of each rank is
    num_microbatches:  microbatches in the step, numbered from 0
    ranks:             one tuple of actions per rank
    group:             microbatches that go through a chunk before the next chunk's turn; None where there are no groups
    barriers:          of vocabulary parallelism; None where there are no S and T (or in a file: then 1 is meant)

    Chunks, microbatches and the number of ranks are checked here; whether the actions are complete and can run is for
    `megamem.planner.schedules.checker`.
    """

    name: str
    placement: Placement
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    group: int | None = None
    barriers: Barriers | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name != " ".join(self.name.split()):
            raise ScheduleError(f"{self.name!r} is no name of a schedule: words on one line, with single spaces")
        if len(self.ranks) != self.placement.num_ranks:
            raise ScheduleError(f"{self.name}: {len(self.ranks)} lists of actions for {self.placement.num_ranks} ranks")
        if self.num_microbatches < 1:
            raise ScheduleError(f"{self.name}: a step has at least one microbatch, not {self.num_microbatches}")
        if self.barriers not in (None, 1, 2):
            raise ScheduleError(f"{self.name}: vocabulary parallelism has 1 or 2 barriers, not {self.barriers}")
        chunks, microbatches = self.placement.num_chunks, self.num_microbatches
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                if not (0 <= action.chunk < chunks and 0 <= action.microbatch < microbatches):
                    raise ScheduleError(
                        f"{self.name}: rank {rank} has {action}, with {chunks} chunks and {microbatches} microbatches"
                    )

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        """Every action with its rank, rank by rank."""
        return ((rank, action) for rank, actions in enumerate(self.ranks) for action in actions)

    @property
    def splits_backward(self) -> bool:
        """Whether any input gradient is computed apart from its weight gradient."""
        return any(action.kind == "B" for _, action in self)

    @property
    def shards_vocabulary(self) -> bool:
        """Whether the ranks share the output layer, or the input embedding."""
        return any(action.kind in VOCABULARY for _, action in self)

    def with_ranks(self, ranks: Iterable[Iterable[Action]]) -> Schedule:
        """The same schedule with other actions; what a pass returns."""
        return replace(self, ranks=tuple(tuple(actions) for actions in ranks))

    def to_text(self) -> str:
        """The text form; `parse_schedule` reads it back."""
        lines = [
            _HEADER,
            f"name: {self.name}",
            f"placement: {self.placement.shape}",
            f"ranks: {self.placement.num_ranks}",
            f"chunks: {self.placement.num_chunks}",
            f"microbatches: {self.num_microbatches}",
        ]
        if self.group is not None:
            lines.append(f"group: {self.group}")
        if self.barriers is not None:
            lines.append(f"barriers: {self.barriers}")
        lines += [f"rank {rank}: {order_text(actions)}" for rank, actions in enumerate(self.ranks)]
        return "\n".join(lines) + "\n"


def order_text(actions: Iterable[Action]) -> str:
    """A rank's actions on one line."""
    return " ".join(map(str, actions))


def parse_schedule(text: str) -> Schedule:
    """Read the text form of a schedule. Raises ScheduleError that names the line."""
    head: dict[str, str] = {}
    ranks: dict[int, tuple[Action, ...]] = {}
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines or lines[0][1] != _HEADER:
        raise ScheduleError(f"a schedule begins with the line {_HEADER!r}")
    for number, line in lines[1:]:
        key, colon, value = line.partition(":")
        if not colon:
            raise ScheduleError(f"line {number}: {line!r} is neither 'key: value' nor 'rank N: actions'")
        try:
            if key.startswith("rank "):
                rank = _number(key[5:], "rank")
                if rank in ranks:
                    raise ScheduleError(f"rank {rank} is there twice")
                ranks[rank] = tuple(map(Action.parse, value.split()))
            elif key in head:
                raise ScheduleError(f"{key} is there twice")
            else:
                head[key] = value.strip()
        except ScheduleError as fault:
            raise ScheduleError(f"line {number}: {fault}") from None
    return _assemble(head, ranks)


def _assemble(head: dict[str, str], ranks: dict[int, tuple[Action, ...]]) -> Schedule:
    required = ("name", "placement", "ranks", "chunks", "microbatches")
    if missing := [key for key in required if key not in head]:
        raise ScheduleError(f"the schedule lacks {', '.join(missing)}")
    if unknown := head.keys() - {*required, "group", "barriers"}:
        raise ScheduleError(f"the schedule has unknown keys: {', '.join(sorted(unknown))}")
    num_ranks = _number(head["ranks"], "ranks")
    if len(ranks) != num_ranks or max(ranks, default=-1) != num_ranks - 1:
        raise ScheduleError(f"ranks: {num_ranks}, and there are lines for ranks {sorted(ranks)}")
    placement = Placement(
        shape=head["placement"],  # type: ignore[arg-type]  # checked there
        num_ranks=num_ranks,
        num_chunks=_number(head["chunks"], "chunks"),
    )
    return Schedule(
        name=head["name"],
        placement=placement,
        num_microbatches=_number(head["microbatches"], "microbatches"),
        ranks=tuple(ranks[rank] for rank in range(num_ranks)),
        group=_number(head["group"], "group") if "group" in head else None,
        barriers=_number(head["barriers"], "barriers") if "barriers" in head else None,  # type: ignore[arg-type]  # checked there
    )


def _number(text: str, what: str) -> int:
    if not text.strip().isdecimal():
        raise ScheduleError(f"{what}: {text.strip()!r} is no number")
    return int(text)
