"""Traces of models of many layers, from a trace of few: a layer in the middle is repeated.

    trace = replicate(traced_with_4_layers, layers=(1, 2), copies=76)      an iteration with 80

All layers of a transformer run one program. What is recorded of layer 1, in its forward pass, its backward pass and up
to the next layer's, is inserted again between layers 1 and 2, in the order of the layers forward and against it
backward, for every microbatch; a buffer that layer 1 takes over from a neighbour, or hands on to one, its copy takes
and hands on likewise. That this is what the deeper model does is checked as far as the trace can tell: layers 1 and 2
must have the same program, request by request, and neither may free what is not its own or a neighbour's. A test traces
models of 4 and of 7 layers and compares.

What depends on the number of layers outside of them (the optimizer's step, say) stays that of the traced model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megamem.errors import AllocationError
from megamem.ir.allocation_trace import AllocationTrace, Phase, Place


@dataclass(frozen=True, slots=True)
class _Key:
    """A stretch of the iteration, from the beginning of a layer's pass to that of the next; `turn` counts repeats."""

    layer: int | None
    part: str
    microbatch: int | None
    turn: int

    def moved(self, distance: int) -> _Key:
        layer = None if self.layer is None else self.layer + distance
        return _Key(layer, self.part, self.microbatch, self.turn)


@dataclass(slots=True)
class _Stretch:
    key: _Key
    # Of a malloc (True, request); of a free (False, request); the request carries size and stream.
    events: list[tuple[bool, int]] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)  # from which event of the stretch


def replicate(trace: AllocationTrace, *, layers: tuple[int, int], copies: int, persistent: int = 0) -> AllocationTrace:
    """The trace with `copies` more layers between two neighbours, each with `persistent` bytes of weights and the like.

    Later layers get higher numbers. Raises AllocationError where the trace does not tell what more layers would do.
    """
    one, two = layers
    if two != one + 1 or copies < 0:
        raise AllocationError(f"{copies} copies between layers {one} and {two}; they must be neighbours")
    stretches = _cut(trace)
    home = {request: stretch.key for stretch in stretches for is_malloc, request in stretch.events if is_malloc}
    _check(trace, stretches, home, one)
    return _Builder(trace, stretches, home, one, copies).build(trace.persistent + copies * persistent)


def renumbered(label: str, numbers: Mapping[int, int]) -> str:
    """A phase's label with another number of its layer."""
    layer = Place.of(label).layer
    return label if layer is None else label.replace(f"layer {layer}", f"layer {numbers[layer]}", 1)


def _cut(trace: AllocationTrace) -> list[_Stretch]:
    events: list[tuple[bool, int]] = [(False, -1)] * trace.num_events
    for index, request in enumerate(trace.requests):
        if request.birth is not None:
            events[request.birth] = (True, index)
        if request.death is not None:
            events[request.death] = (False, index)
    stretches = [_Stretch(_Key(None, "", None, 0))]
    begins = [0]
    turns: Counter[tuple[int | None, str, int | None]] = Counter()
    for phase in trace.phases:
        place = Place.of(phase.label)
        if place.layer is not None:
            what = place.layer, place.part, place.microbatch
            stretches.append(_Stretch(_Key(*what, turns[what])))
            turns[what] += 1
            begins.append(phase.begin)
        stretches[-1].phases.append((phase.begin - begins[-1], phase.label))
    for stretch, begin, end in zip(stretches, begins, [*begins[1:], trace.num_events], strict=True):
        stretch.events = events[begin:end]
    return stretches


def _check(trace: AllocationTrace, stretches: list[_Stretch], home: dict[int, _Key], one: int) -> None:
    """Equal programs in both layers, with all they free their own or a neighbour's."""
    programs: list[dict[_Key, list[object]]] = []
    position = _positions(stretches)
    for layer in (one, one + 1):
        programs.append(
            {
                stretch.key.moved(-layer): [
                    _token(trace, position, home, layer, is_malloc, request) for is_malloc, request in stretch.events
                ]
                for stretch in stretches
                if stretch.key.layer == layer
            }
        )
    if not programs[0]:
        raise AllocationError(f"layer {one} is in no phase of the trace")
    for key, program in programs[0].items():
        if programs[1].get(key) != program:
            where = f"{key.part} of microbatch {key.microbatch}"
            raise AllocationError(
                f"layers {one} and {one + 1} do not ask for the same memory ({where}), so neither stands for more "
                "layers; trace the whole model"
            )


def _positions(stretches: list[_Stretch]) -> dict[int, int]:
    return {request: at for stretch in stretches for at, (is_malloc, request) in enumerate(stretch.events) if is_malloc}


def _token(
    trace: AllocationTrace, position: dict[int, int], home: dict[int, _Key], layer: int, is_malloc: bool, request: int
) -> object:
    if is_malloc:
        given = trace.requests[request]
        return given.size, given.stream, given.is_shared, given.death is None
    key = home.get(request)
    if key is None or key.layer is None or abs(key.layer - layer) > 1:
        whose = "from before the iteration" if key is None else f"of {key.part or 'no layer'}"
        if key is not None and key.layer is not None:
            whose = f"of layer {key.layer}"
        raise AllocationError(f"layer {layer} frees a buffer {whose}, so it stands for no other; trace all")
    return key.moved(-layer), position[request]


class _Builder:
    """Writes the events anew. A request's copy is named by where it is born: stretch and position."""

    def __init__(
        self, trace: AllocationTrace, stretches: list[_Stretch], home: dict[int, _Key], one: int, copies: int
    ) -> None:
        self._trace, self._stretches, self._home = trace, stretches, home
        self._one, self._copies = one, copies
        self._position = _positions(stretches)
        self._births: dict[tuple[_Key, int], tuple[int, int]] = {}  # to (event, request)
        self._deaths: dict[tuple[_Key, int], int] = {}
        self._old_deaths: list[tuple[int, int]] = []  # requests from before the iteration: (event, request)
        self._phases: list[Phase] = []
        self._now = 0

    def build(self, persistent: int) -> AllocationTrace:
        one, two = self._one, self._one + 1
        for at, stretch in enumerate(self._stretches):
            before = self._stretches[at - 1].key if at else None
            follows = before is not None and {before.layer, stretch.key.layer} == {one, two}
            if follows and before is not None and self._copies:
                if (before.part, before.microbatch) != (stretch.key.part, stretch.key.microbatch):
                    raise AllocationError("passes of two layers follow one another that do not belong together")
                middle = stretch if stretch.key.layer == one else self._stretches[at - 1]
                numbers = range(two, two + self._copies)
                for layer in numbers if stretch.key.layer == two else reversed(numbers):
                    self._emit(middle, layer - one)
            self._emit(stretch, self._copies if (stretch.key.layer or 0) >= two else 0)
        return self._finish(persistent)

    def _emit(self, stretch: _Stretch, distance: int) -> None:
        key, begin = stretch.key.moved(distance), self._now
        for offset, label in stretch.phases:
            layer = Place.of(label).layer
            moved = label if layer is None else renumbered(label, {layer: layer + distance})
            self._phases.append(Phase(begin=begin + offset, label=moved))
        for at, (is_malloc, request) in enumerate(stretch.events):
            if is_malloc:
                self._births[key, at] = self._now, request
            elif request not in self._home:
                self._old_deaths.append((self._now, request))
            else:
                self._deaths[self._born(stretch, distance, request), self._position[request]] = self._now
            self._now += 1

    def _born(self, stretch: _Stretch, distance: int, request: int) -> _Key:
        """Where the request was born that a stretch frees which is put at a distance from where it was."""
        born, two = self._home[request], self._one + 1
        if stretch.key.layer in (self._one, two):
            return born.moved(distance)
        return born.moved(self._copies if (born.layer or 0) >= two else 0)

    def _finish(self, persistent: int) -> AllocationTrace:
        old = self._trace.requests
        requests = [replace(old[request], birth=None, death=event) for event, request in self._old_deaths]
        for name, (event, request) in self._births.items():
            death = self._deaths.pop(name, None)
            if (death is None) != (old[request].death is None):
                raise AllocationError("a copied buffer is freed by no layer of its own; trace all layers")
            requests.append(replace(old[request], birth=event, death=death))
        if self._deaths:
            raise AllocationError("a copied layer frees what no layer has made; trace all layers")
        requests.sort(key=lambda request: (-1 if request.birth is None else request.birth, request.death or 0))
        return replace(
            self._trace,
            requests=tuple(requests),
            phases=tuple(self._phases),
            num_events=self._now,
            persistent=persistent,
            source=f"{self._trace.source}, layer {self._one} replicated {self._copies} times".lstrip(", "),
        )
