"""What a schedule takes: time, idle time and activation memory, by replaying its lists of actions.

    simulate   everything, with the start and end of every action
    price      makespan, stage span and peaks only, for a search that asks thousands of times

The rules, from the definitions (arXiv 2401.10241, section 2; arXiv 2405.15362, section 4):

* A rank runs its list strictly in order, one compute action at a time, as soon as what the action needs is there.
* F needs F of the stage before; B needs B (or BW) of the stage after, on the last stage its own F; W needs its B.
* A BW takes B + W and gives its gradient away at its end. A part of a W takes weight / parts.
* Between ranks a message takes `PipelineCosts.comm`, inside a rank nothing. It occupies no compute.
* Without SEND and RECV in the schedule a message leaves when it is made. With them, posting takes no time; there is one
  first-in-first-out channel per direction (F or B), sender and receiver; message i arrives `comm` after both its sides
  are posted, and never before message i - 1.
* OFFLOAD and RELOAD run on two copy streams of the rank, one per direction, in order, `StageCost.offload` each.
* Vocabulary passes (`ir.schedule`) take the times of `VocabularyCost`. What a collective makes is there `collective`
  after the last rank has posted its part; a hidden state, or the gradient of an embedding, so long after it is made.
* Memory is taken when F starts. The end of B gives back activation - weight_grad, the end of W the rest; where W has
  parts, the last one gives all of it, because the linear layers of a chunk are not equally large. An activation that is
  offloaded is given back when the copy has ended, and taken again when the copy back starts. What S leaves for T is
  held from the start of S to the end of T.

**What is ignored**: bandwidth and contention of links, copy engines and memory; what communication kernels take from
compute; the host's launch time; the allocator; receive buffers (`passes.receive_buffers`) and those of collectives;
buffers of a running W; weights, gradients and optimizer states; everything outside the schedule (embedding and loss
unless they are in the costs, data loading, collectives of data parallelism, the optimizer step). A schedule is expected
to have passed `checker.check_schedule`; the simulator itself notices only what cannot run to its end.

The figures: `makespan` and `bubble_rate` are those of a synchronous optimizer step, where all ranks begin and end
together. `stage_span` and `stage_bubble_rate` are those of the zero-bubble papers, in which every rank goes into the
next step on its own; they hold only without a barrier at the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megamem.errors import ScheduleError
from megamem.ir.schedule import COMMUNICATION, VOCABULARY, Action, Kind, Placement, Schedule, TimedAction
from megamem.ir.workload import HasCosts, PipelineCosts, VocabularyCost

Span = tuple[float, float]

_NOT_YET = -1.0


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A schedule in time. Units of time and memory are those of the costs.

    makespan:           from 0 to the end of the last compute action of any rank
    stage_span:         the longest time any rank has between the start of its first and the end of its last action
    bubble_rate:        1 - busy time of all ranks / (ranks x makespan)
    stage_bubble_rate:  1 - busy time of all ranks / (ranks x stage_span)
    peak_activation:    per rank, the most activation memory held at any moment
    times:              per rank and action of its list: start and end. A post has start = end; a copy has its own time
    """

    schedule: Schedule
    costs: PipelineCosts
    makespan: float
    stage_span: float
    bubble_rate: float
    stage_bubble_rate: float
    peak_activation: tuple[float, ...]
    times: tuple[tuple[Span, ...], ...]

    def timeline(self) -> list[TimedAction]:
        """Every action in time, rank by rank in the order of the lists."""
        return [
            TimedAction(rank, action, *span)
            for rank, (actions, spans) in enumerate(zip(self.schedule.ranks, self.times, strict=True))
            for action, span in zip(actions, spans, strict=True)
        ]

    def memory_curve(self, rank: int) -> list[tuple[float, float]]:
        """Activation memory of `rank` over time: (time, memory from then on), beginning at (0, 0)."""
        curve = [(0.0, 0.0)]
        held = 0.0
        for time, change in _memory_changes(self.schedule, self.costs, rank, self.times[rank]):
            held += change
            curve.append((time, held))
        return curve


class Price(NamedTuple):
    """The figures a search compares; see `Simulation`."""

    makespan: float
    stage_span: float
    peak_activation: tuple[float, ...]


def simulate(schedule: Schedule, costs: HasCosts) -> Simulation:
    """Replay `schedule` with `costs`.

    Raises ScheduleError, with every waiting rank and what it waits for, when the schedule cannot run to its end, and
    when the costs do not fit its placement.
    """
    replay = _replay(schedule, costs)
    makespan, stage_span, peaks = replay.price()
    busy = sum(replay.busy)
    ranks = schedule.placement.num_ranks
    return Simulation(
        schedule=schedule,
        costs=replay.costs,
        makespan=makespan,
        stage_span=stage_span,
        bubble_rate=1.0 - busy / (ranks * makespan) if makespan else 0.0,
        stage_bubble_rate=1.0 - busy / (ranks * stage_span) if stage_span else 0.0,
        peak_activation=peaks,
        times=tuple(tuple(spans) for spans in replay.spans),
    )


def price(schedule: Schedule, costs: HasCosts) -> Price:
    """The figures of `simulate` that a search needs, without the times. Raises ScheduleError as `simulate` does."""
    return _replay(schedule, costs).price()


def _replay(schedule: Schedule, costs: HasCosts) -> _Replay:
    replay = _Replay(schedule, costs.costs(schedule.placement, sharded=schedule.shards_vocabulary))
    replay.run()
    return replay


class _Row(NamedTuple):
    """A kind of compute action of one chunk: every index is that of microbatch 0."""

    wait: int  # the slot whose time it waits for
    latency: float  # added to that time
    duration: float
    own: int  # the slot that takes its end
    take: float  # memory at its start
    give: float  # memory at its end


class _Channel:
    """Messages from one rank to another in one direction: the i-th send meets the i-th receive."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.posts: dict[bool, list[tuple[float, int]]] = {True: [], False: []}  # by "is a send": (time, slot)

    def post(self, is_send: bool, time: float, slot: int) -> tuple[int, int, float] | None:
        """Post one side; the two sides' slots and the arrival when this completes a pair."""
        own, other = self.posts[is_send], self.posts[not is_send]
        own.append((time, slot))
        if len(other) < len(own):
            return None
        other_time, other_slot = other[len(own) - 1]
        # Both sides post in order of time, so a message is never there before the one ahead of it.
        return slot, other_slot, max(time, other_time) + self.latency


class _Share(NamedTuple):
    """A vocabulary pass; the same on every rank. Every index is that of microbatch 0."""

    wait: int  # the slot whose time it waits for
    latency: float  # added to that time
    duration: float
    all_done: int  # the slot that takes the end of the collective after it; -1 for none
    take: float  # memory at its start
    give: float  # memory at its end


class _Replay:
    """One run. Slots hold times: F and B (or BW) of every stage and microbatch, then the arrivals of their inputs, the
    start of the step, and what collectives after IF, S and T make."""

    def __init__(self, schedule: Schedule, costs: PipelineCosts) -> None:
        self.schedule, self.costs = schedule, costs
        placement, self.microbatches = schedule.placement, schedule.num_microbatches
        ranks = placement.num_ranks
        region = placement.num_stages * self.microbatches
        self.forward, self.backward, self.input, self.gradient, self.start = (index * region for index in range(5))
        self.embedded, self.combined, self.reduced = (self.start + index * self.microbatches for index in (1, 2, 3))
        self.slots = [_NOT_YET] * (self.start + 4 * self.microbatches)
        self.slots[self.start : self.embedded] = [0.0] * self.microbatches
        self.waiter = [-1] * len(self.slots)
        self.crowds: dict[int, list[int]] = {}  # slot -> the ranks whose vocabulary pass waits for it
        self.posted: dict[int, list[float]] = {}  # slot of a collective -> when ranks posted their parts
        self.shares = _shares(self) if schedule.shards_vocabulary else {}
        self.posts = any(action.kind in COMMUNICATION for _, action in schedule)
        self.channels: dict[tuple[str, int, int], _Channel] = {}
        self.rows = [self._rows(placement, rank) for rank in range(ranks)]
        self.position = [0] * ranks
        self.clock = [0.0] * ranks
        self.held = [0.0] * ranks
        self.peak = [0.0] * ranks
        self.busy = [0.0] * ranks
        self.spans: list[list[Span]] = [[] for _ in range(ranks)]
        self.parts: list[dict[int, int]] = [{} for _ in range(ranks)]  # slot of B -> parts of W that have run
        self.copied: list[dict[int, float]] = [{} for _ in range(ranks)]  # slot of F, or B -> end of copy out, or back
        self.copies: list[dict[Kind, float]] = [{} for _ in range(ranks)]  # direction -> when its stream is free
        self.runnable = list(range(ranks))

    def _rows(self, placement: Placement, rank: int) -> Mapping[Kind, list[_Row]]:
        rows: dict[Kind, list[_Row]] = {"F": [], "B": [], "W": [], "BW": []}
        last, count = placement.num_stages - 1, self.microbatches
        for chunk in range(placement.num_chunks):
            stage = placement.stage(rank, chunk)
            cost = self.costs.stages[stage]
            own_f, own_b = self.forward + stage * count, self.backward + stage * count
            wait_f, late_f = self.embedded if "IF" in self.shares else self.start, 0.0
            if stage > 0:
                wait_f, late_f = self._edge(own_f - count, self.input + stage * count, rank, stage - 1)
            wait_b, late_b = own_f, 0.0
            if "S" in self.shares:
                wait_b = self.reduced if self.schedule.barriers == 2 else self.combined
            if stage < last:
                wait_b, late_b = self._edge(own_b + count, self.gradient + stage * count, rank, stage + 1)
            kept = cost.weight_grad
            rows["F"].append(_Row(wait_f, late_f, cost.forward, own_f, cost.activation, 0.0))
            rows["B"].append(_Row(wait_b, late_b, cost.backward, own_b, 0.0, cost.activation - kept))
            rows["W"].append(_Row(own_b, 0.0, cost.weight, own_b, 0.0, kept))
            rows["BW"].append(_Row(wait_b, late_b, cost.backward + cost.weight, own_b, 0.0, cost.activation))
        return rows

    def _edge(self, produced: int, arrived: int, rank: int, neighbour: int) -> tuple[int, float]:
        """The slot to wait for, and the latency to add: what `neighbour` produces, or the message's arrival."""
        if self.schedule.placement.rank_of(neighbour) == rank:
            return produced, 0.0
        return (arrived, 0.0) if self.posts else (produced, self.costs.comm)

    def run(self) -> None:
        """Run every rank as far as it gets, until all are done. Raises ScheduleError for those that never are."""
        while self.runnable:
            self._advance(self.runnable.pop())
        stuck = [rank for rank, actions in enumerate(self.schedule.ranks) if self.position[rank] < len(actions)]
        if stuck:
            lines = [f"rank {rank} waits at {self._waits(rank)}" for rank in stuck]
            raise ScheduleError(f"{self.schedule.name} cannot run to its end:\n  " + "\n  ".join(lines))

    def _advance(self, rank: int) -> None:
        """Run `rank` until it has to wait or is done."""
        actions, rows, slots, waiter = self.schedule.ranks[rank], self.rows[rank], self.slots, self.waiter
        position, clock = self.position[rank], self.clock[rank]
        held, peak, busy = self.held[rank], self.peak[rank], self.busy[rank]
        spans, copied, crowds = self.spans[rank], self.copied[rank], self.crowds
        while position < len(actions):
            kind, chunk, microbatch, _, parts = action = actions[position]
            if kind not in rows:
                if kind in VOCABULARY:
                    share = self.shares[kind]
                    start = slots[share.wait + microbatch]
                    if start < 0:
                        self.crowds.setdefault(share.wait + microbatch, []).append(rank)
                        break
                    start = max(start + share.latency, clock)
                    clock = start + share.duration
                    self._meet(share, microbatch, clock)
                    held += share.take
                    peak = max(peak, held)
                    held -= share.give
                    busy += share.duration
                    spans.append((start, clock))
                else:
                    spans.append(self._post(rank, action, clock))
                position += 1
                continue
            wait, latency, duration, own, take, give = rows[kind][chunk]
            start = slots[wait + microbatch]
            if start < 0:
                waiter[wait + microbatch] = rank
                break
            start += latency
            if start < clock:
                start = clock
            own += microbatch
            if kind == "W":
                if parts > 1:
                    duration /= parts
                    done = self.parts[rank][own] = self.parts[rank].get(own, 0) + 1
                    give = give if done == parts else 0.0
            elif copied and kind != "F":
                start = max(start, copied.get(own, 0.0))
            clock = start + duration
            if kind != "W":
                slots[own] = clock
                if waiter[own] >= 0 or crowds:
                    self._wake(own)
            held += take
            if held > peak:
                peak = held
            held -= give
            busy += duration
            spans.append((start, clock))
            position += 1
        self.position[rank], self.clock[rank] = position, clock
        self.held[rank], self.peak[rank], self.busy[rank] = held, peak, busy

    def _meet(self, share: _Share, microbatch: int, end: float) -> None:
        """One rank's part of the collective after a vocabulary pass."""
        if share.all_done < 0:
            return
        slot = share.all_done + microbatch
        ends = self.posted.setdefault(slot, [])
        ends.append(end)
        if len(ends) == self.schedule.placement.num_ranks:
            assert self.costs.vocabulary is not None  # or there would be no shares
            self.slots[slot] = max(ends) + self.costs.vocabulary.collective
            self._wake(slot)

    def _wake(self, slot: int) -> None:
        if self.waiter[slot] >= 0:
            self.runnable.append(self.waiter[slot])
        self.runnable += self.crowds.pop(slot, ())

    def _post(self, rank: int, action: Action, clock: float) -> Span:
        """Begin what is not compute: a message, or a copy."""
        if action.kind in COMMUNICATION:
            self._post_message(rank, action, clock)
            return clock, clock
        return self._post_copy(rank, action, clock)

    def _post_message(self, rank: int, action: Action, clock: float) -> None:
        placement, is_send = self.schedule.placement, action.kind.startswith("SEND")
        forward = action.kind.endswith("F")
        stage = placement.stage(rank, action.chunk)
        neighbour = stage + (1 if forward == is_send else -1)
        if not 0 <= neighbour < placement.num_stages or placement.rank_of(neighbour) == rank:
            raise ScheduleError(f"{self.schedule.name}: rank {rank} has {action}, and no other rank at its end")
        ends = (rank, placement.rank_of(neighbour))
        receiver = neighbour if is_send else stage
        slot = (self.input if forward else self.gradient) + receiver * self.microbatches + action.microbatch
        key = ("F" if forward else "B", *(ends if is_send else ends[::-1]))
        channel = self.channels.setdefault(key, _Channel(self.costs.comm))
        made = (self.forward if forward else self.backward) + stage * self.microbatches + action.microbatch
        if is_send and self.slots[made] < 0:
            raise ScheduleError(f"{self.schedule.name}: rank {rank} posts {action} before it has made the message")
        pair = channel.post(is_send, clock, slot)
        if pair is None:
            return
        own, other, arrival = pair
        if own != other:
            sent, received = (own, other) if is_send else (other, own)
            raise ScheduleError(
                f"{self.schedule.name}: on the {key[0]} channel from rank {key[1]} to rank {key[2]}, the message for "
                f"{self._name(sent)} meets the receive for {self._name(received)}"
            )
        self.slots[slot] = arrival
        self._wake(slot)

    def _post_copy(self, rank: int, action: Action, clock: float) -> Span:
        stage = self.schedule.placement.stage(rank, action.chunk)
        index = stage * self.microbatches + action.microbatch
        source, copied = self.forward + index, self.copied[rank]
        ready = self.slots[source] if action.kind == "OFFLOAD" else copied.get(source, _NOT_YET)
        if ready < 0:
            missing = "F" if action.kind == "OFFLOAD" else "OFFLOAD"
            raise ScheduleError(
                f"{self.schedule.name}: rank {rank} has {action} before the {missing} of its activation"
            )
        start = max(clock, ready, self.copies[rank].get(action.kind, 0.0))
        end = start + self.costs.stages[stage].offload
        self.copies[rank][action.kind] = end
        copied[source if action.kind == "OFFLOAD" else self.backward + index] = end
        return start, end

    def price(self) -> Price:
        """The figures after the run."""
        peaks = (self._peak(rank) if copied else self.peak[rank] for rank, copied in enumerate(self.copied))
        spans = (end - self._first_start(rank) for rank, end in enumerate(self.clock))
        return Price(max(self.clock), max(spans), tuple(peaks))

    def _first_start(self, rank: int) -> float:
        pairs = zip(self.schedule.ranks[rank], self.spans[rank], strict=True)
        return next((start for action, (start, _) in pairs if action.is_compute), 0.0)

    def _peak(self, rank: int) -> float:
        held = peak = 0.0
        for _, change in _memory_changes(self.schedule, self.costs, rank, self.spans[rank]):
            held += change
            peak = max(peak, held)
        return peak

    def _waits(self, rank: int) -> str:
        action = self.schedule.ranks[rank][self.position[rank]]
        row = self.shares[action.kind] if action.kind in VOCABULARY else self.rows[rank][action.kind][action.chunk]
        slot = row.wait + action.microbatch
        if slot >= self.start:
            kind = ("F", "IF", "S", "T")[(slot - self.start) // self.microbatches]
            return f"{action} for {kind} of microbatch {action.microbatch} on every rank"
        if slot < self.input:
            return f"{action} for {self._name(slot)}"
        return f"{action} for the message to {self._name(slot)}; it is not sent, or its receive is not posted"

    def _name(self, slot: int) -> str:
        region, index = divmod(slot, self.backward)
        stage, microbatch = divmod(index, self.microbatches)
        placement = self.schedule.placement
        kind: Kind = "F" if region % 2 == 0 else "B"
        return f"{Action(kind, placement.chunk_of(stage), microbatch)} of rank {placement.rank_of(stage)}"


def _shares(replay: _Replay) -> Mapping[Kind, _Share]:
    """What the vocabulary passes wait for, take and give; those that the schedule has."""
    schedule, cost = replay.schedule, replay.costs.vocabulary or VocabularyCost()
    barriers, late = schedule.barriers or 1, cost.collective
    last_f = replay.forward + (schedule.placement.num_stages - 1) * schedule.num_microbatches
    found: dict[Kind, _Share] = {}
    kinds = {action.kind for _, action in schedule}
    if kinds & {"IF", "IB"}:
        found["IF"] = _Share(replay.start, 0.0, cost.embed, replay.embedded, 0.0, 0.0)
        found["IB"] = _Share(replay.backward, late, cost.embed_grad, -1, 0.0, 0.0)
    if kinds & {"S", "T"}:
        reduced = replay.reduced if barriers == 2 else -1
        found["S"] = _Share(last_f, late, cost.seconds("S", barriers), replay.combined, cost.kept, 0.0)
        found["T"] = _Share(replay.combined, 0.0, cost.seconds("T", barriers), reduced, 0.0, cost.kept)
    return found


def _memory_changes(
    schedule: Schedule, costs: PipelineCosts, rank: int, spans: list[Span] | tuple[Span, ...]
) -> list[tuple[float, float]]:
    """Every change of the activation memory of a rank: (time, change), in order of time.

    At the same moment, what a copy gives back comes first; everything else keeps the order of the list.
    """
    changes: list[tuple[float, int, float]] = []
    parts: dict[tuple[int, int], int] = {}
    kept = costs.vocabulary.kept if costs.vocabulary is not None else 0.0
    for action, (start, end) in zip(schedule.ranks[rank], spans, strict=True):
        cost = costs.stages[schedule.placement.stage(rank, action.chunk)]
        if action.kind in ("F", "RELOAD"):
            changes.append((start, 1, cost.activation))
        elif action.kind == "OFFLOAD":
            changes.append((end, 0, -cost.activation))
        elif action.kind == "BW":
            changes.append((end, 1, -cost.activation))
        elif action.kind == "B":
            changes.append((end, 1, cost.weight_grad - cost.activation))
        elif action.kind == "S":
            changes.append((start, 1, kept))
        elif action.kind == "T":
            changes.append((end, 1, -kept))
        elif action.kind == "W":
            key = (action.chunk, action.microbatch)
            parts[key] = parts.get(key, 0) + 1
            if parts[key] == action.parts:
                changes.append((end, 1, -cost.weight_grad))
    changes.sort(key=lambda change: change[:2])
    return [(time, change) for time, _, change in changes]
