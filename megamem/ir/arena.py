"""What passes between the runtime of the static allocator and its planner.

    StepRequests       what one recorded step asked for, and when it gave it back
    ArenaPlan          where each request of a step lies in the arena, if it does

Time is the number of requests that a step has made: what is freed after request i and before request i + 1 can have its
place taken by request i + 1, and says nothing about the clock.

**File form** of a plan: gzip of one JSON object of columns, `{"format": "megamem.arena", "version": 1, ...}`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamem.errors import AllocationError

FORMAT = "megamem.arena"
VERSION = 1
ALIGNMENT = 512  # bytes; the CUDA caching allocator rounds every request up to it
NATIVE = -1
"""In place of an offset: the native allocator serves the request."""
OPTIONAL = -2
"""The same, and the request may also not come."""
_LEAST, _MOST = -2, 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class Freed:
    """The end of a request: in the step `steps` after its own, when `position` requests of that step had come."""

    steps: int
    position: int


@dataclass(frozen=True, kw_only=True)
class StepRequests:
    """The requests of one step in order: bytes as asked for, and their ends, None where none was seen.

    `shared` are the indices of those that a second stream used. Steps of another kind do not count: what is freed
    during one is freed when the next step of this kind begins.
    """

    sizes: Sequence[int]
    ends: Sequence[Freed | None]
    shared: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True, kw_only=True)
class ArenaPlan:
    """Request i of a step of kind `key` has sizes[i] bytes and lies at offsets[i] in the arena, or is NATIVE or
    OPTIONAL. A size of 0, only of those that the arena does not serve, is any size.

    Requests below `min_size` bytes are not in the plan. No plan for the same requests needs less than `lower_bound`.
    Raises AllocationError where the columns are not what this says.
    """

    key: str
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    min_size: int
    lower_bound: int
    solver: str = ""

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.offsets):
            raise AllocationError(f"{len(self.offsets)} offsets for {len(self.sizes)} requests; give one to each")
        for index, (size, offset) in enumerate(zip(self.sizes, self.offsets, strict=True)):
            is_planned = offset >= 0
            if not is_planned <= size < _MOST or not _LEAST <= offset < _MOST or (is_planned and offset % ALIGNMENT):
                raise AllocationError(f"request {index} of {size} bytes cannot lie at {offset}")
        if self.min_size < 0 or self.lower_bound < 0:
            raise AllocationError("min_size and lower_bound cannot be negative")

    @cached_property
    def peak(self) -> int:
        """Bytes of the arena that the plan needs."""
        ends = (offset + size for offset, size in zip(self.offsets, self.sizes, strict=True) if offset >= 0)
        return -(-max(ends, default=0) // ALIGNMENT) * ALIGNMENT

    @cached_property
    def num_planned(self) -> int:
        """Requests of a step that the arena serves."""
        return sum(offset >= 0 for offset in self.offsets)

    @cached_property
    def planned_nbytes(self) -> int:
        """The sum of their bytes."""
        return sum(size for offset, size in zip(self.offsets, self.sizes, strict=True) if offset >= 0)

    @property
    def gap(self) -> float:
        """How far the peak is above the lower bound, as a share of it."""
        return self.peak / self.lower_bound - 1 if self.lower_bound else 0.0

    def to_bytes(self) -> bytes:
        """The file form; equal plans have equal bytes."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "key": self.key,
            "min_size": self.min_size,
            "lower_bound": self.lower_bound,
            "solver": self.solver,
            "sizes": self.sizes,
            "offsets": self.offsets,
        }
        return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def parse_plan(data: bytes, *, name: str = "plan") -> ArenaPlan:
    """A plan from its file form. Raises AllocationError, naming the file, for one that is no plan of this version."""
    try:
        content = json.loads(gzip.decompress(data))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise AllocationError("this is no plan of megamem's arena")
        if content.get("version") != VERSION:
            raise AllocationError(f"version {content.get('version')!r}, and {VERSION} can be read; plan again")
        return ArenaPlan(
            key=str(content["key"]),
            sizes=tuple(map(_whole, content["sizes"])),
            offsets=tuple(map(_whole, content["offsets"])),
            min_size=_whole(content["min_size"]),
            lower_bound=_whole(content["lower_bound"]),
            solver=str(content["solver"]),
        )
    except AllocationError as fault:
        raise AllocationError(f"{name}: {fault}") from None
    except (EOFError, OSError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as fault:
        raise AllocationError(f"{name}: cannot be read ({type(fault).__name__}: {fault})") from fault


def read_plan(path: str | Path) -> ArenaPlan:
    """Read the file form. Raises AllocationError, naming the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as fault:
        raise AllocationError(f"{path}: cannot be read ({fault.strerror or fault})") from fault
    return parse_plan(data, name=str(path))


def write_plan(path: str | Path, plan: ArenaPlan) -> None:
    """Write the file form, at once or not at all. Raises AllocationError when the file cannot be written."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(plan.to_bytes())
        part.replace(path)
    except OSError as fault:
        raise AllocationError(f"{path}: cannot be written ({fault.strerror or fault})") from fault


def _whole(cell: Any) -> int:
    if type(cell) is not int or abs(cell) >= _MOST:
        raise AllocationError(f"{cell!r} where a whole number below 2^62 is expected")
    return cell
