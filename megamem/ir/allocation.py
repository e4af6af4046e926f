"""Static memory allocation as data: which bytes are wanted when, and where they are put.

    Buffer             `size` bytes that are live at the instants lower, lower + 1, ..., upper - 1
    Problem            the buffers of one program, such as one training iteration
    Solution           one offset per buffer: it lies in the bytes offset .. offset + size - 1 while it lives

Lifetimes are half-open, [lower, upper): a buffer whose upper is another's lower may have the same bytes. Time has no
unit; a trace counts allocations. This is dynamic storage allocation (Garey and Johnson, SR2), called the Offline-DSA
problem in MEMO (arXiv 2407.12117, section 4.2).

There is no alignment in a problem: round the sizes up to it. Every solver here puts buffers at sums of sizes, or at
multiples of their greatest common divisor, so offsets are then aligned as well.

**File form**, both ways: the CSV columns of MiniMalloc (ASPLOS 2023), `id,lower,upper,size[,offset]`, in any order, and
compressed where the file's name ends in .gz. One more column is megamem's: `group` names the pass of a layer in which a
transient buffer is born and dies ("layer 3 forward, microbatch 0"), empty elsewhere; the bi-level solver uses it.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megamem.errors import AllocationError

COLUMNS = ("id", "lower", "upper", "size")
OPTIONAL_COLUMNS = ("offset", "group")
_MAX_TOTAL = 1 << 62  # sums of sizes stay within a signed 64-bit integer


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """`size` bytes, live in the half-open interval [lower, upper).

    `group` names the pass of a layer that the buffer is born and dies in, or is empty.
    Raises AllocationError for a lifetime or size that is not positive.
    """

    id: str
    lower: int
    upper: int
    size: int
    group: str = ""

    def __post_init__(self) -> None:
        if self.lower >= self.upper:
            raise AllocationError(
                f"buffer {self.id!r} lives from {self.lower} to {self.upper}, which is no instant; lifetimes are "
                "half-open, so upper must be above lower"
            )
        if self.size <= 0:
            raise AllocationError(
                f"buffer {self.id!r} has {self.size} bytes; leave out buffers without bytes, they need no place"
            )

    def overlaps(self, other: Buffer) -> bool:
        """Whether there is an instant at which both are live."""
        return self.lower < other.upper and other.lower < self.upper


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Buffers to be placed. Raises AllocationError when two have one id, or when the sum of sizes is beyond 2^62."""

    buffers: tuple[Buffer, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for buffer in self.buffers:
            if buffer.id in seen:
                raise AllocationError(f"two buffers have the id {buffer.id!r}; give each its own")
            seen.add(buffer.id)
        if self.total_size > _MAX_TOTAL:
            raise AllocationError(f"the sizes add up to {self.total_size} bytes; 2^62 is the most that can be planned")

    def __len__(self) -> int:
        return len(self.buffers)

    @cached_property
    def total_size(self) -> int:
        """Bytes of all buffers, whenever they live; no solution needs more."""
        return sum(buffer.size for buffer in self.buffers)

    def subset(self, indices: Sequence[int]) -> Problem:
        """The problem of some of the buffers, in the order of `indices`."""
        return Problem(buffers=tuple(self.buffers[index] for index in indices))

    def to_csv(self) -> str:
        """The file form, with `group` only where a buffer has one."""
        return _to_csv(self, None)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """`offsets[i]` is where `problem.buffers[i]` begins, in bytes from the start of the arena.

    That no two buffers overlap is for `megamem.planner.allocation.validator` to say.
    Raises AllocationError when there is not one offset per buffer.
    """

    problem: Problem
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.problem):
            raise AllocationError(f"{len(self.offsets)} offsets for {len(self.problem)} buffers; give one to each")

    @cached_property
    def peak(self) -> int:
        """Bytes of the arena that the solution needs: the highest end of a buffer, 0 without buffers."""
        return max((offset + buffer.size for offset, buffer in self), default=0)

    def __iter__(self) -> Iterator[tuple[int, Buffer]]:
        return zip(self.offsets, self.problem.buffers, strict=True)

    def to_csv(self) -> str:
        """The file form, with offsets."""
        return _to_csv(self.problem, self.offsets)


def read_problem(path: str | Path) -> Problem:
    """Read a problem; offsets in the file are left aside. Raises AllocationError, naming the line, for a bad file."""
    return _read(Path(path))[0]


def read_solution(path: str | Path) -> Solution:
    """Read a problem with its offsets. Raises AllocationError, naming the line, for a bad file."""
    problem, offsets = _read(Path(path))
    if offsets is None:
        raise AllocationError(f"{path}: no column `offset`, so it holds a problem and no solution")
    return Solution(problem=problem, offsets=offsets)


def parse_problem(text: str, *, name: str = "problem") -> Problem:
    """A problem from the text of a CSV file; `name` is what errors call it."""
    return _parse(text, name)[0]


def parse_solution(text: str, *, name: str = "solution") -> Solution:
    """A solution from the text of a CSV file; `name` is what errors call it."""
    problem, offsets = _parse(text, name)
    if offsets is None:
        raise AllocationError(f"{name}: no column `offset`, so it holds a problem and no solution")
    return Solution(problem=problem, offsets=offsets)


def write(path: str | Path, content: Problem | Solution) -> None:
    """Write the file form, compressed where the name ends in .gz. Raises AllocationError when it cannot be written."""
    path = Path(path)
    data = content.to_csv().encode("utf-8")
    try:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as fault:
        raise AllocationError(f"{path}: cannot be written ({fault.strerror or fault})") from fault


def _to_csv(problem: Problem, offsets: Sequence[int] | None) -> str:
    with_groups = any(buffer.group for buffer in problem.buffers)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(["offset"] if offsets is not None else []), *(["group"] if with_groups else [])])
    for index, buffer in enumerate(problem.buffers):
        row: list[object] = [buffer.id, buffer.lower, buffer.upper, buffer.size]
        if offsets is not None:
            row.append(offsets[index])
        if with_groups:
            row.append(buffer.group)
        writer.writerow(row)
    return out.getvalue()


def _read(path: Path) -> tuple[Problem, tuple[int, ...] | None]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as fault:
        reason = (fault.strerror if isinstance(fault, OSError) else None) or fault
        raise AllocationError(f"{path}: cannot be read ({reason})") from fault
    return _parse(text, str(path))


def _parse(text: str, name: str) -> tuple[Problem, tuple[int, ...] | None]:
    """Buffers and, where the file has them, offsets; every error names the file and, where it is in a row, the line."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    buffers: list[Buffer] = []
    offsets: list[int] = []
    lines: dict[str, int] = {}
    try:
        header = [cell.strip() for cell in next(rows, [])]
        _check_header(header)
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(header):
                raise AllocationError(f"{len(cells)} cells, but the header has {len(header)} columns")
            row = dict(zip(header, cells, strict=True))
            buffer = _buffer(row)
            if lines.setdefault(buffer.id, rows.line_num) != rows.line_num:
                raise AllocationError(f"the id {buffer.id!r} is that of line {lines[buffer.id]} too; give each its own")
            buffers.append(buffer)
            if "offset" in row:
                offsets.append(_integer(row, "offset"))
    except (AllocationError, csv.Error) as fault:
        raise AllocationError(f"{name}:{max(rows.line_num, 1)}: {fault}") from None
    try:
        problem = Problem(buffers=tuple(buffers))
    except AllocationError as fault:
        raise AllocationError(f"{name}: {fault}") from None
    return problem, tuple(offsets) if "offset" in header else None


def _check_header(header: Sequence[str]) -> None:
    known = (*COLUMNS, *OPTIONAL_COLUMNS)
    expected = f"a header of the columns {','.join(COLUMNS)} is expected, and {' and '.join(OPTIONAL_COLUMNS)} at will"
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise AllocationError(f"no column {', '.join(missing)}; {expected}")
    unknown = [column for column in header if column not in known]
    if unknown:
        raise AllocationError(f"unknown column {', '.join(map(repr, unknown))}; {expected}")
    twice = [column for column in known if header.count(column) > 1]
    if twice:
        raise AllocationError(f"column {', '.join(twice)} is there twice")


def _buffer(row: Mapping[str, str]) -> Buffer:
    name = row["id"].strip()
    if not name:
        raise AllocationError("the id is empty")
    lower, upper, size = (_integer(row, column) for column in ("lower", "upper", "size"))
    return Buffer(id=name, lower=lower, upper=upper, size=size, group=row.get("group", "").strip())


def _integer(row: Mapping[str, str], column: str) -> int:
    text = row[column].strip()
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise AllocationError(f"{column} is {text!r}, which is no whole number of at most 19 digits")
    return int(text)
