"""The malloc and free requests of one training iteration, as they were seen.

    Request            one buffer: bytes, the events of its malloc and its free, its stream
    Phase              from which event on the program was in which part of the iteration
    AllocationTrace    the requests and phases of one iteration; a `Problem` is made of it

Time is the number of the event, malloc or free, counted from the start of the iteration: wall time says nothing about
which buffers are live together, and this order is what a steady iteration repeats.

A request whose malloc or free lies outside the iteration has None for it. It is live from the beginning, or to the
end. Buffers that are live throughout are in no request; `persistent` is their bytes, where they are known.

Where in the model a request belongs is its phase's label, taken apart by `place`: layer, pass, microbatch.

**File form**: gzip of one JSON object of columns, `{"format": "megamem.allocations", "version": 1, ...}`. Births are
written as distances from one to the next, frees as distances from the birth; 10^5 requests take about 300 kB.
`problem().to_csv()` is the form that other planners read.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamem.errors import AllocationError
from megamem.ir.allocation import Buffer, Problem

FORMAT = "megamem.allocations"
VERSION = 1
ALIGNMENT = 512  # bytes; the CUDA caching allocator rounds every request up to it
_GZIP = b"\x1f\x8b"
_LABEL = re.compile(r"(?:layer (?P<layer>\d{1,9}) )?(?P<part>[^,]+?)(?:, microbatch (?P<microbatch>\d{1,9}))?")
_COLUMNS = ("size", "birth", "life", "stream", "is_shared")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A buffer of `size` bytes as asked for, from event `birth` to event `death`; None for an event outside.

    `stream` tells streams apart and has no other meaning. `is_shared` says that another stream used the buffer too;
    `death` is then the event at which that use had ended.
    """

    size: int
    birth: int | None
    death: int | None
    stream: int = 0
    is_shared: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """From event `begin` to the next phase: "layer 3 forward, microbatch 0"; the empty label is outside of layers."""

    begin: int
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a request belongs: "forward" of layer 3, microbatch 0; "optimizer" of no layer. Empty and None: unknown."""

    part: str = ""
    layer: int | None = None
    microbatch: int | None = None

    @classmethod
    def of(cls, label: str) -> Place:
        """The place that a phase's label names; any label names one."""
        match = _LABEL.fullmatch(label)
        if match is None:
            return cls(part=label)
        numbers = [None if text is None else int(text) for text in match.group("layer", "microbatch")]
        return cls(part=match["part"], layer=numbers[0], microbatch=numbers[1])


@dataclass(frozen=True, kw_only=True)
class AllocationTrace:
    """Requests in order of birth, those from before the iteration first; `num_events` mallocs and frees in all.

    `source` says how it was made. Raises AllocationError where events are out of order or belong to two requests.
    """

    requests: tuple[Request, ...]
    phases: tuple[Phase, ...]
    num_events: int
    persistent: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        owners: set[int] = set()
        last = -1
        for index, request in enumerate(self.requests):
            birth = -1 if request.birth is None else request.birth
            death = self.num_events if request.death is None else request.death
            if request.size <= 0 or not birth < death or birth < last:
                raise AllocationError(f"request {index} is malformed or out of order: {request}")
            last = birth
            for event in (request.birth, request.death):
                if event is None:
                    continue
                if not 0 <= event < self.num_events or event in owners:
                    raise AllocationError(f"request {index}: event {event} is not of it alone, or beyond the trace")
                owners.add(event)
        begins = [phase.begin for phase in self.phases]
        if begins != sorted(begins) or any(not 0 <= begin <= self.num_events for begin in begins):
            raise AllocationError("the phases are out of order, or beyond the trace")
        if self.persistent < 0:
            raise AllocationError(f"{self.persistent} persistent bytes; there cannot be fewer than 0")

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def main_stream(self) -> int:
        """The stream with the most bytes, the lowest of them; 0 without requests."""
        nbytes: Counter[int] = Counter()
        for request in self.requests:
            nbytes[request.stream] += request.size
        return min(nbytes, key=lambda stream: (-nbytes[stream], stream), default=0)

    def places(self) -> list[Place]:
        """Per request the place it was born in; of one from before the iteration it is not known."""
        begins, places = [phase.begin for phase in self.phases], [Place.of(phase.label) for phase in self.phases]
        found = []
        for request in self.requests:
            at = -1 if request.birth is None else bisect_right(begins, request.birth) - 1
            found.append(places[at] if at >= 0 else Place())
        return found

    def events(self) -> Iterator[tuple[bool, int]]:
        """(is_malloc, index of the request) in order; requests from before the iteration come first."""
        order = sorted(
            (event, is_malloc, index)
            for index, request in enumerate(self.requests)
            for event, is_malloc in ((-1 if request.birth is None else request.birth, True), (request.death, False))
            if event is not None
        )
        return ((is_malloc, index) for _, is_malloc, index in order)

    def problem(self, *, alignment: int = ALIGNMENT, stream: int | None = None, shared: bool = True) -> Problem:
        """The requests as buffers, sizes rounded up to `alignment`: of all streams or of one.

        Without `shared`, buffers that a second stream used are left out. The group of a buffer is the phase that it
        is born and dies in. Raises AllocationError for an alignment below 1.
        """
        if alignment < 1:
            raise AllocationError(f"an alignment of {alignment} bytes; it must be at least 1")
        begins, names = [phase.begin for phase in self.phases], self._names()
        buffers = []
        for index, request in enumerate(self.requests):
            if (stream is not None and request.stream != stream) or (request.is_shared and not shared):
                continue
            at = bisect_right(begins, request.birth) - 1 if request.birth is not None else -1
            is_within = at >= 0 and request.death is not None and bisect_right(begins, request.death) - 1 == at
            buffers.append(
                Buffer(
                    id=str(index),
                    # One later, so that what came into the iteration is live before its first event.
                    lower=0 if request.birth is None else request.birth + 1,
                    upper=self.num_events + 1 if request.death is None else request.death + 1,
                    size=-(-request.size // alignment) * alignment,
                    group=names[at] if is_within else "",
                )
            )
        return Problem(buffers=tuple(buffers))

    def _names(self) -> list[str]:
        """The labels, made different where one comes again: a group is one stretch of time."""
        seen: Counter[str] = Counter()
        names = []
        for phase in self.phases:
            seen[phase.label] += 1
            again = f" ({seen[phase.label]})" if phase.label and seen[phase.label] > 1 else ""
            names.append(phase.label + again)
        return names

    def peak_live(self) -> int:
        """The most bytes that are live at one instant, as asked for, without the persistent ones."""
        live = peak = 0
        for is_malloc, index in self.events():
            live += self.requests[index].size if is_malloc else -self.requests[index].size
            peak = max(peak, live)
        return peak

    def to_bytes(self) -> bytes:
        """The file form; equal traces have equal bytes."""
        rows, before = [], 0
        for request in self.requests:
            birth = request.birth
            start = -1 if birth is None else birth
            life = None if request.death is None else request.death - start
            rows.append((request.size, None if birth is None else birth - before, life, request.stream,
                         int(request.is_shared)))  # fmt: skip
            before = before if birth is None else birth
        content = {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "num_events": self.num_events,
            "persistent": self.persistent,
            "phases": [[phase.begin, phase.label] for phase in self.phases],
            "requests": dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)) if rows else ([] for _ in _COLUMNS),
                                 strict=True)),
        }  # fmt: skip
        return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def write_trace(path: str | Path, trace: AllocationTrace) -> None:
    """Write the file form, or the CSV of the problem where the name ends in .csv or .csv.gz.

    Raises AllocationError when the file cannot be written.
    """
    path = Path(path)
    if path.name.endswith((".csv", ".csv.gz")):
        from megamem.ir.allocation import write

        write(path, trace.problem())
        return
    try:
        path.write_bytes(trace.to_bytes())
    except OSError as fault:
        raise AllocationError(f"{path}: cannot be written ({fault.strerror or fault})") from fault


def is_trace(path: str | Path) -> bool:
    """Whether a file holds a trace rather than a CSV, by its first bytes. False where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(2)
        if head != _GZIP:
            return False
        with gzip.open(path) as unpacked:
            return unpacked.read(1) == b"{"
    except (OSError, EOFError, zlib.error):
        return False


def read_trace(path: str | Path) -> AllocationTrace:
    """Read the file form. Raises AllocationError, naming the file, for one that is no trace of this version."""
    try:
        content = json.loads(gzip.decompress(Path(path).read_bytes()))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise AllocationError("this is no allocation trace of megamem; `megamem profile --allocations` makes one")
        if content.get("version") != VERSION:
            raise AllocationError(f"version {content.get('version')!r}, and {VERSION} can be read; trace again")
        return _parse(content)
    except AllocationError as fault:
        raise AllocationError(f"{path}: {fault}") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as fault:
        raise AllocationError(f"{path}: cannot be read ({type(fault).__name__}: {fault})") from fault


def _parse(content: dict[str, Any]) -> AllocationTrace:
    columns = [[_whole(cell) for cell in content["requests"][name]] for name in _COLUMNS]
    requests, before = [], 0
    for size, distance, life, stream, is_shared in zip(*columns, strict=True):
        if size is None or stream is None:
            raise AllocationError("a request without size or stream")
        birth = None if distance is None else before + distance
        before = before if birth is None else birth
        death = None if life is None else (-1 if birth is None else birth) + life
        requests.append(Request(size=size, birth=birth, death=death, stream=stream, is_shared=bool(is_shared)))
    numbers = [_whole(content[name]) for name in ("num_events", "persistent")]
    phases = tuple(Phase(begin=_whole(begin) or 0, label=str(label)) for begin, label in content["phases"])
    return AllocationTrace(
        requests=tuple(requests),
        phases=phases,
        num_events=numbers[0] or 0,
        persistent=numbers[1] or 0,
        source=str(content["source"]),
    )


def _whole(cell: Any) -> int | None:
    if cell is not None and (type(cell) is not int or abs(cell) >= 1 << 62):
        raise AllocationError(f"{cell!r} where a whole number below 2^62 is expected")
    return cell
