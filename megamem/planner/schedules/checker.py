"""Whether a schedule can be run: complete, every dependency met, free of deadlock, within a memory limit.

Written from the definitions of the actions (`megamem.ir.schedule`), apart from the generators and the passes, so that a
mistake of theirs cannot hide in here. For stages s, microbatches m, and the last stage z:

    F(s) needs F(s-1)      B(s) needs F(s) and B(s+1); B(z) needs F(z)       W(s) needs B(s); its parts cover it once
    a BW counts as B and W    S(m) on every rank needs F(z); T(m) and B(z) need S(m) of every rank (2411.05288, 4.3)
    with two barriers B(z) needs T(m) of every rank    F(0) needs IF(m) of every rank; IB(m) on every rank needs B(0)
    IF on every rank needs the tokens, which the rank of the first stage sends before the IF `TOKENS_AHEAD` before it
    OFFLOAD stands after F, RELOAD after its OFFLOAD, and B after the RELOAD

Sends and receives, where there are any, are there for every pair of neighbouring stages on two ranks: the send after
what makes the message, the receive before what needs it, both sides of a channel (direction, sender, receiver) in the
same order. A message arrives when both sides are posted and all before it on the channel have arrived.

Collectives of vocabulary passes are posted where `ir.schedule` says, without waiting, one communicator per kind. If all
ranks post a kind in one order, a collective is done when all have posted it: those before it are then done, too. So the
order is checked, and S, T, IF and IB are awaited like messages.

Deadlocks are found by running the lists, without times: what can run does not depend on how long anything takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from megamem.errors import InfeasibleError, ScheduleError
from megamem.ir.schedule import COMMUNICATION, TOKENS_AHEAD, VOCABULARY, Action, Kind, Placement, Schedule
from megamem.ir.workload import HasCosts, PipelineCosts, Uniform
from megamem.planner.schedules.problems import Problem, report
from megamem.planner.schedules.simulator import price

_HOPELESS = 1000  # times fewer actions than there must be: a typing mistake in a file, not worth a list
_TOLERANCE = 1e-9  # of a memory limit: sums of shares of an activation


def check_schedule(schedule: Schedule, *, costs: HasCosts | None = None, memory_limit: float | None = None) -> None:
    """Raise one ScheduleError with everything that is wrong with `schedule`, or return.

    It is an InfeasibleError when the schedule is in order and only needs too much memory.

    memory_limit: activation memory that no rank may exceed, in the unit of the costs' activations; without `costs`, in
                  activations of one microbatch on one rank. Memory is counted as in the simulator; where activations
                  are offloaded it depends on time, and the simulator is asked.
    """
    if problems := find_problems(schedule):
        raise ScheduleError(report(schedule, problems))
    if memory_limit is not None:
        fitting = (costs or Uniform()).costs(schedule.placement, sharded=schedule.shards_vocabulary)
        if problems := _over_limit(schedule, fitting, memory_limit):
            raise InfeasibleError(report(schedule, problems))


def find_problems(schedule: Schedule) -> list[Problem]:
    """Everything that is wrong but memory. Deadlocks are looked for in schedules that are otherwise in order."""
    places: list[dict[Action, int]] = []
    problems: list[Problem] = []
    for rank in range(schedule.placement.num_ranks):
        place: dict[Action, int] = {}
        for position, action in enumerate(schedule.ranks[rank]):
            if place.setdefault(action, position) != position:
                problems.append(Problem(rank, position, f"{action} is there twice"))
        places.append(place)
        problems += _compute_problems(schedule, rank, place)
        problems += _offload_problems(rank, place)
    problems += _vocabulary_problems(schedule, places)
    if any(action.kind in COMMUNICATION for place in places for action in place):
        problems += _message_problems(schedule, places)
    return problems or _Run(schedule).deadlock()


def accumulates_in_order(schedule: Schedule) -> bool:
    """Whether every parameter takes its gradients in the order of the microbatches, as in 1F1B.

    That is what gradients need in order to be bitwise equal to those of 1F1B. Both passes count: B makes the gradients
    of what is no linear layer (norms, biases), W those of the linear layers. Parts of a W count for their share. T and
    IB make those of the embeddings' shards.
    """
    for actions in schedule.ranks:
        for kind in ("T", "IB"):
            whole = [action.microbatch for action in actions if action.kind == kind]
            if whole != sorted(whole):
                return False
        for chunk in range(schedule.placement.num_chunks):
            whole = [a.microbatch for a in actions if a.chunk == chunk and a.kind in ("B", "BW")]
            if whole != sorted(whole) or not _parts_in_order([a for a in actions if a.chunk == chunk]):
                return False
    return True


def _parts_in_order(actions: Iterable[Action]) -> bool:
    weights = [action for action in actions if action.kind in ("W", "BW")]
    shares = math.lcm(*{action.parts for action in weights})
    last = [-1] * shares
    for action in weights:
        size = shares // action.parts
        for share in range(action.part * size, (action.part + 1) * size):
            if action.microbatch < last[share]:
                return False
            last[share] = action.microbatch
    return True


def _compute_problems(schedule: Schedule, rank: int, place: dict[Action, int]) -> Iterable[Problem]:
    """F once, B and W or BW once, in this order, for every chunk and microbatch of one rank."""
    weights: dict[tuple[int, int], list[Action]] = {}
    for action in place:
        if action.kind == "W":
            weights.setdefault((action.chunk, action.microbatch), []).append(action)
    end, pairs = len(schedule.ranks[rank]), schedule.placement.num_chunks * schedule.num_microbatches
    if pairs > _HOPELESS * (end + 1):
        yield Problem(rank, end, f"{end} actions are too few for {pairs} pairs of chunk and microbatch")
        return
    for chunk in range(schedule.placement.num_chunks):
        for microbatch in range(schedule.num_microbatches):
            forward = place.get(Action("F", chunk, microbatch))
            split = place.get(Action("B", chunk, microbatch))
            fused = place.get(Action("BW", chunk, microbatch))
            backward = fused if split is None else split
            parts = weights.get((chunk, microbatch), [])
            if forward is None:
                yield Problem(rank, end, f"{chunk}F{microbatch} is missing")
            elif backward is not None and backward < forward:
                yield Problem(rank, backward, f"{schedule.ranks[rank][backward]} is before {chunk}F{microbatch}")
            if backward is None:
                yield Problem(rank, end, f"{chunk}B{microbatch} (or {chunk}BW{microbatch}) is missing")
            elif split is not None and fused is not None:
                yield Problem(rank, max(split, fused), f"{chunk}B{microbatch} and {chunk}BW{microbatch} are both there")
            if fused is not None and parts:
                yield Problem(rank, place[parts[0]], f"{parts[0]} is there beside {chunk}BW{microbatch}")
            elif split is not None:
                if fault := _cover_fault(parts):
                    yield Problem(rank, place[parts[-1]] if parts else end, f"{chunk}W{microbatch}: {fault}")
                for part in parts:
                    if place[part] < split:
                        yield Problem(rank, place[part], f"{part} is before {chunk}B{microbatch}")


def _cover_fault(parts: list[Action]) -> str | None:
    """Why these are not all parts of one W, each once."""
    if not parts:
        return "is missing"
    numbers = sorted(action.part for action in parts)
    count = parts[0].parts
    if any(action.parts != count for action in parts):
        return f"is divided in different ways: {' '.join(map(str, parts))}"
    if numbers != list(range(count)):
        missing = sorted(set(range(count)) - set(numbers))
        return f"of {count} parts, {', '.join(map(str, missing))} missing"
    return None


def _offload_problems(rank: int, place: dict[Action, int]) -> Iterable[Problem]:
    for action, position in place.items():
        if action.kind not in ("OFFLOAD", "RELOAD"):
            continue
        key = (action.chunk, action.microbatch)
        if action.kind == "OFFLOAD":
            before, after = place.get(Action("F", *key)), place.get(Action("RELOAD", *key))
            if after is None:
                yield Problem(rank, position, f"{action} without its RELOAD")
            if before is not None and before > position:
                yield Problem(rank, position, f"{action} is before {Action('F', *key)}")
        else:
            before = place.get(Action("OFFLOAD", *key))
            after = place.get(Action("B", *key), place.get(Action("BW", *key)))
            if before is None:
                yield Problem(rank, position, f"{action} without its OFFLOAD")
            elif before > position:
                yield Problem(rank, position, f"{action} is before its OFFLOAD")
            if after is not None and after < position:
                yield Problem(rank, position, f"{action} is after the backward pass that needs it")


_PAIRS: tuple[tuple[Kind, Kind], ...] = (("S", "T"), ("IF", "IB"))


def _vocabulary_problems(schedule: Schedule, places: list[dict[Action, int]]) -> Iterable[Problem]:
    """Where vocabulary passes appear, one of each kind on every rank for every microbatch, in one order."""
    kinds = {action.kind for place in places for action in place}
    for pair in _PAIRS:
        if not kinds & {*pair}:
            continue
        for rank, place in enumerate(places):
            yield from _pair_problems(schedule, rank, place, *pair)
        last = schedule.placement.num_stages - 1
        first_of: tuple[Kind, int] | None = ("F", last) if pair[0] == "S" else None
        yield from _order_problems(schedule, pair[0], first_of)
        if pair[1] == "IB":
            yield from _order_problems(schedule, "IB", ("B", 0))
        elif schedule.barriers == 2:
            yield from _order_problems(schedule, "T", None)


def _pair_problems(
    schedule: Schedule, rank: int, place: dict[Action, int], early: Kind, late: Kind
) -> Iterable[Problem]:
    """One `early` and then one `late` for every microbatch."""
    found: dict[tuple[Kind, int], int] = {}
    for action, position in place.items():
        if action.kind not in (early, late):
            continue
        if action.chunk:
            yield Problem(rank, position, f"{action}: the chunk of an {action.kind} is 0, for it belongs to none")
        if found.setdefault((action.kind, action.microbatch), position) != position:
            yield Problem(rank, position, f"{action}: a rank has one {action.kind} per microbatch")
    end = len(schedule.ranks[rank])
    if schedule.num_microbatches > _HOPELESS * (end + 1):
        return
    for microbatch in range(schedule.num_microbatches):
        first, second = found.get((early, microbatch)), found.get((late, microbatch))
        for kind, position_of in ((early, first), (late, second)):
            if position_of is None:
                yield Problem(rank, end, f"{kind} of microbatch {microbatch} is missing")
        if first is not None and second is not None and second < first:
            yield Problem(rank, second, f"{late} of microbatch {microbatch} is before its {early}")


def _order_problems(schedule: Schedule, kind: Kind, source: tuple[Kind, int] | None) -> Iterable[Problem]:
    """`kind` in one order on all ranks: that of rank 0 or, where given, of the F or B of the stage that feeds it."""
    rank, of, wanted = 0, "it is on rank 0", _order(schedule.ranks[0], (kind,), None)
    if source is not None:
        stage = source[1]
        rank, chunk = schedule.placement.rank_of(stage), schedule.placement.chunk_of(stage)
        kinds: tuple[Kind, ...] = ("F",) if source[0] == "F" else ("B", "BW")
        of, wanted = f"{chunk}{source[0]} is on rank {rank}", _order(schedule.ranks[rank], kinds, chunk)
    for other, actions in enumerate(schedule.ranks):
        found = _order(actions, (kind,), None)
        if list(found) != list(wanted) and found.keys() == wanted.keys():
            here, there = next(pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
            text = f"{kind} is not in the order in which {of}: microbatch {here} where {there} is next"
            yield Problem(other, found[here], text)


def _order(actions: tuple[Action, ...], kinds: tuple[Kind, ...], chunk: int | None) -> dict[int, int]:
    """The microbatches of these actions in their order, with their places."""
    return {
        action.microbatch: position
        for position, action in enumerate(actions)
        if action.kind in kinds and chunk in (None, action.chunk)
    }


class _End(NamedTuple):
    """One side of a message: its channel (direction, sender, receiver), and the receiving stage and microbatch."""

    channel: tuple[str, int, int]
    message: tuple[int, int]


def _end(placement: Placement, rank: int, action: Action) -> _End | None:
    """The end of a message that a SEND or RECV is; None where its neighbour is on the same rank or there is none."""
    verb, _, direction = action.kind.partition("_")
    stage = placement.stage(rank, action.chunk)
    # An activation goes up the stages, a gradient down; a receive looks the other way.
    other = stage + (1 if (direction == "F") == (verb == "SEND") else -1)
    if not 0 <= other < placement.num_stages or placement.rank_of(other) == rank:
        return None
    if verb == "SEND":
        return _End((direction, rank, placement.rank_of(other)), (other, action.microbatch))
    return _End((direction, placement.rank_of(other), rank), (stage, action.microbatch))


def _message_problems(schedule: Schedule, places: list[dict[Action, int]]) -> Iterable[Problem]:
    """Every message sent and received once, after it is made and before it is needed, in one order per channel."""
    lines: dict[tuple[str, int, int], dict[str, list[tuple[int, int]]]] = {}
    for rank, place in enumerate(places):
        for action, position in place.items():
            if action.kind not in COMMUNICATION:
                continue
            end = _end(schedule.placement, rank, action)
            if end is None:
                yield Problem(rank, position, f"{action} has no other rank at its end")
                continue
            verb, _, direction = action.kind.partition("_")
            sides = lines.setdefault(end.channel, {"SEND": [], "RECV": []})
            sides[verb].append(end.message)
            work = place.get(Action("F", *action[1:3])) if direction == "F" else _backward(place, action)
            if work is not None and verb == "SEND" and work > position:
                yield Problem(rank, position, f"{action} is before the action that makes the message")
            if work is not None and verb == "RECV" and work < position:
                yield Problem(rank, position, f"{action} is after the action that needs the message")
        yield from _missing_messages(schedule, rank, place)
    for (direction, source, target), sides in lines.items():
        sent, received = sides["SEND"], sides["RECV"]
        if sent != received and sorted(sent) == sorted(received):
            index = next(i for i, pair in enumerate(zip(sent, received, strict=True)) if pair[0] != pair[1])
            asked = Action("RECV_F" if direction == "F" else "RECV_B", 0, received[index][1])
            asked = asked._replace(chunk=schedule.placement.chunk_of(received[index][0]))
            text = (
                f"the {direction} channel from rank {source} to rank {target} is not in one order: message {index} is "
                f"sent for stage {sent[index][0]}, microbatch {sent[index][1]}, and received for stage "
                f"{received[index][0]}, microbatch {received[index][1]}"
            )
            yield Problem(target, places[target][asked], text)


def _backward(place: dict[Action, int], action: Action) -> int | None:
    return place.get(Action("B", *action[1:3]), place.get(Action("BW", *action[1:3])))


def _missing_messages(schedule: Schedule, rank: int, place: dict[Action, int]) -> Iterable[Problem]:
    for action, position in place.items():
        if action.kind not in ("F", "B", "BW"):
            continue
        direction = "F" if action.kind == "F" else "B"
        for verb in ("SEND", "RECV"):
            post = Action(f"{verb}_{direction}", *action[1:3])  # type: ignore[arg-type]
            if post not in place and _end(schedule.placement, rank, post) is not None:
                yield Problem(rank, position, f"{action} without its {post}")


# What an action waits for: a finished F or B of (stage, microbatch), a message on its way to one, a vocabulary pass of
# (0, microbatch) on all ranks, or the tokens that the first stage sends as it comes to an IF (`_TOKENS`).
_Event = tuple[str, int, int]
_TOKENS: Final = "tokens"


class _Run:
    """The lists, run without times until all are done or none can go on."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.placement = schedule, schedule.placement
        self.posts = any(action.kind in COMMUNICATION for _, action in schedule)
        self.kinds = {action.kind for _, action in schedule}
        self.first_rank = self.placement.rank_of(0)
        inputs = [action.microbatch for action in schedule.ranks[self.first_rank] if action.kind == "IF"]
        self.sent_at = dict(zip(inputs[TOKENS_AHEAD:], inputs, strict=False))  # microbatch -> that of the IF before
        self.happened: set[_Event] = set()
        self.waiting: dict[_Event, list[int]] = {}
        self.parts: dict[_Event, int] = {}  # of what every rank must do -> ranks that have done it
        self.lines: dict[tuple[str, int, int], tuple[list[_Event], list[_Event]]] = {}
        self.position = [0] * self.placement.num_ranks
        self.runnable = list(range(self.placement.num_ranks))

    def deadlock(self) -> list[Problem]:
        """Every rank that never reaches the end of its list."""
        while self.runnable:
            self._advance(self.runnable.pop())
        problems = []
        for rank, actions in enumerate(self.schedule.ranks):
            if self.position[rank] < len(actions):
                action = actions[self.position[rank]]
                missing = [event for event in self._needs(rank, action) if event not in self.happened]
                wants = " and ".join(map(self._describe, missing))
                problems.append(Problem(rank, self.position[rank], f"deadlock: {action} waits for {wants}"))
        return problems

    def _advance(self, rank: int) -> None:
        actions, happened = self.schedule.ranks[rank], self.happened
        position = self.position[rank]
        while position < len(actions):
            action = actions[position]
            if action.kind in COMMUNICATION:
                self._post(rank, action)
            elif action.kind in ("F", "B", "BW") or action.kind in VOCABULARY:
                missing = next((event for event in self._needs(rank, action) if event not in happened), None)
                if missing is not None:
                    self.waiting.setdefault(missing, []).append(rank)
                    break
                self._finish(rank, action)
            position += 1
        self.position[rank] = position

    def _needs(self, rank: int, action: Action) -> list[_Event]:
        stage, microbatch, last = self.placement.stage(rank, action.chunk), action.microbatch, self._last
        if action.kind == "F":
            if stage:
                return [self._arrival("F", stage - 1, stage, microbatch)]
            return [("IF", 0, microbatch)] if "IF" in self.kinds else []
        if action.kind in VOCABULARY:
            tokens = [(_TOKENS, 0, self.sent_at[microbatch])] if microbatch in self.sent_at else []
            sources: dict[str, list[_Event]] = {
                "IF": tokens, "S": [("F", last, microbatch)], "T": [("S", 0, microbatch)], "IB": [("B", 0, microbatch)]
            }  # fmt: skip
            return sources[action.kind]
        if stage < last:
            return [("F", stage, microbatch), self._arrival("B", stage + 1, stage, microbatch)]
        after = "T" if self.schedule.barriers == 2 else "S"
        return [("F", stage, microbatch), *([(after, 0, microbatch)] if after in self.kinds else [])]

    @property
    def _last(self) -> int:
        return self.placement.num_stages - 1

    def _arrival(self, kind: str, source: int, stage: int, microbatch: int) -> _Event:
        if self.posts and self.placement.rank_of(source) != self.placement.rank_of(stage):
            return (f"message {kind}", stage, microbatch)
        return (kind, source, microbatch)

    def _finish(self, rank: int, action: Action) -> None:
        if action.kind == "IF" and rank == self.first_rank:
            self._happen((_TOKENS, 0, action.microbatch))
        if action.kind in VOCABULARY:
            event = (action.kind, 0, action.microbatch)
            self.parts[event] = self.parts.get(event, 0) + 1
            if self.parts[event] == self.placement.num_ranks:
                self._happen(event)
        else:
            kind = "F" if action.kind == "F" else "B"
            self._happen((kind, self.placement.stage(rank, action.chunk), action.microbatch))

    def _post(self, rank: int, action: Action) -> None:
        end = _end(self.placement, rank, action)
        if end is None:
            return
        sides = self.lines.setdefault(end.channel, ([], []))
        own, other = sides if action.kind.startswith("SEND") else sides[::-1]
        own.append((f"message {end.channel[0]}", *end.message))
        if len(own) <= len(other):
            self._happen(own[-1])

    def _happen(self, event: _Event) -> None:
        self.happened.add(event)
        if event in self.waiting:
            self.runnable += self.waiting.pop(event)

    def _describe(self, event: _Event) -> str:
        kind, stage, microbatch = event
        if kind == _TOKENS:
            return f"tokens that rank {self.first_rank} sends as it comes to 0IF{microbatch}"
        if kind in VOCABULARY:
            return f"{kind} of microbatch {microbatch} on every rank"
        letter = kind[-1]
        rank, chunk = self.placement.rank_of(stage), self.placement.chunk_of(stage)
        if len(kind) == 1:
            return f"{chunk}{letter}{microbatch} of rank {rank}"
        source = stage - 1 if letter == "F" else stage + 1
        sender = self.placement.rank_of(source)
        send = f"{self.placement.chunk_of(source)}SEND_{letter}{microbatch}"
        return f"the message of {send} of rank {sender}"


def _over_limit(schedule: Schedule, costs: PipelineCosts, limit: float) -> list[Problem]:
    allowed = limit * (1 + _TOLERANCE)
    if any(action.kind == "OFFLOAD" for _, action in schedule):
        peaks = enumerate(price(schedule, costs).peak_activation)
        return [Problem(rank, 0, _over(peak, limit)) for rank, peak in peaks if peak > allowed]
    problems = []
    kept = costs.vocabulary.kept if costs.vocabulary is not None else 0.0
    for rank, actions in enumerate(schedule.ranks):
        held, peak, first = 0.0, 0.0, -1
        parts: dict[tuple[int, int], int] = {}
        for position, (kind, chunk, microbatch, _, count) in enumerate(actions):
            cost = costs.stages[schedule.placement.stage(rank, chunk)]
            if kind == "F":
                held += cost.activation
            elif kind == "B":
                held -= cost.activation - cost.weight_grad
            elif kind == "BW":
                held -= cost.activation
            elif kind == "W":
                parts[chunk, microbatch] = parts.get((chunk, microbatch), 0) + 1
                held -= cost.weight_grad if parts[chunk, microbatch] == count else 0.0
            elif kind in ("S", "T"):
                held += kept if kind == "S" else -kept
            peak = max(peak, held)
            if held > allowed and first < 0:
                first = position
        if first >= 0:
            problems.append(Problem(rank, first, f"{actions[first]} exceeds the memory limit; {_over(peak, limit)}"))
    return problems


def _over(peak: float, limit: float) -> str:
    return f"the rank needs {peak:.14g} of activation memory, the limit is {limit:.14g}; nearest: {peak:.14g}"
