"""How much memory this machine has, as seen by this process: the machine's, or that of its control group if smaller.

A container or a batch job is killed at its control group's limit however much the machine has, and pinned memory can
not be swapped out, so the limit is what counts. Standard library only; Linux files, with a clear error elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamem.errors import ConfigError
from megamem.options import Bytes

_UNLIMITED = 1 << 60  # version 1 groups say "no limit" with a number of about 2^63


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Memory of the machine or of the tightest control group around this process, whichever is smaller."""

    total_nbytes: int
    available_nbytes: int


def resolve_host_memory(value: int | Literal["auto"], local_ranks: int, root: Path = Path("/")) -> int:
    """Bytes of host memory that each of `local_ranks` processes on this machine may pin.

    `auto` is half of what is available now, shared equally; call it on all ranks before any of them pins, or they see
    each other's. A given amount is checked against what the machine has. Raises ConfigError.
    """
    if local_ranks < 1:
        raise ValueError(f"there is at least one rank on a machine, not {local_ranks}")
    memory = host_memory(root)
    if value == "auto":
        return memory.available_nbytes // 2 // local_ranks
    if value * local_ranks > memory.total_nbytes:
        ranks = "" if local_ranks == 1 else f" for each of {local_ranks} ranks on this machine"
        fits = _rounded(memory.total_nbytes // 2 // local_ranks)
        raise ConfigError(
            f"activations.host_memory: {_rounded(value)}{ranks} is more than the {_rounded(memory.total_nbytes)} that "
            f"the machine or its control group has; give {fits} or less, or auto"
        )
    return value


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The memory of this machine as this process may use it. Raises ConfigError where it cannot be read."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
        total, available = (int(_meminfo(text, name)) << 10 for name in ("MemTotal", "MemAvailable"))
    except (OSError, LookupError) as fault:
        raise ConfigError(
            f"host memory: /proc/meminfo does not tell how much this machine has ({fault}); megamem needs Linux to swap"
        ) from None
    for limit, used in _group_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return HostMemory(total_nbytes=total, available_nbytes=available)


def _meminfo(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if match is None:
        raise LookupError(f"no {name}")
    return match[1]


def _group_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) of every control group that bounds this process; a group's ancestors bound it too."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits: list[tuple[int, int]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the path may name a group that only the outside can see; the mount itself is then ours.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if (pair := _limit_of(folder, limit, used)) is not None:
                limits.append(pair)
            if folder == mount:
                break
    return limits


def _limit_of(folder: Path, limit: str, used: str) -> tuple[int, int] | None:
    try:
        nbytes = int((folder / limit).read_text(encoding="ascii"))  # version 2 says "max" for no limit
        held = int((folder / used).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    if nbytes >= _UNLIMITED:
        return None
    return nbytes, max(0, held - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """File cache that the kernel drops before it kills; a data loader fills a group's usage with it."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _rounded(nbytes: int) -> str:
    """An amount in the largest unit that leaves at least two digits, in the text form of the option."""
    for shift in (30, 20, 10):
        if nbytes >= 10 << shift:
            return Bytes().plain(nbytes >> shift << shift)
    return Bytes().plain(nbytes)


def rank_of(environment: Mapping[str, str]) -> int | None:
    """This process's rank by the variables of torchrun, Slurm and MPI launchers; None where none started it."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)
