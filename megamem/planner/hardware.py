"""What a GPU can do: a row of the table in `data/hardware.yaml`, or a profile that was measured on the machine.

Every number has its source beside it. There are no other numbers about hardware in megamem.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megamem.errors import ConfigError
from megamem.options import suggestion
from megamem.yamlfile import read_mapping

TABLE = Path(__file__).with_name("data") / "hardware.yaml"


@dataclass(frozen=True)
class Rates:
    """A rate that depends on a size: FLOP/s by sequence length. Between two lengths it changes with their logarithm."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The rate at a size; beyond the measured ones the nearest of them."""
        sizes = [point[0] for point in self.points]
        place = bisect.bisect_left(sizes, size)
        if place == 0 or place == len(sizes):
            return self.points[min(place, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.points[place - 1], self.points[place]
        share = (math.log(size) - math.log(low)) / (math.log(high) - math.log(low))
        return slow + share * (fast - slow)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU, the machine around it, and the network between machines. Units and meaning: the table's head.

    name:     of the row, or the path of the profile
    sources:  where each number comes from
    """

    name: str
    memory: int
    hbm: float
    peak_flops: float
    gemm: float
    attention_forward: Rates
    attention_backward: Rates
    backward_flops: float
    link_out: float
    link_in: float
    link_out_both: float
    link_in_both: float
    link_sharers: int
    nvlink: float
    network: float
    latency: float
    node: int
    host_memory: int
    pin: float
    disk_write: float
    disk_read: float
    context: int
    headroom: float
    fragmentation_caching: float
    fragmentation_arena: float
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def for_training(self) -> int:
        """Bytes of device memory that a plan may fill."""
        return int(self.memory * (1.0 - self.headroom))

    @property
    def to_host(self) -> float:
        """Bytes per second out of device memory, while nothing comes in and all GPUs of the uplink do the same."""
        return self.link_out / self.link_sharers

    @property
    def from_host(self) -> float:
        """Bytes per second into device memory, while nothing goes out."""
        return self.link_in / self.link_sharers

    @property
    def to_host_both(self) -> float:
        """Bytes per second out of device memory while as much comes in: what a pipeline has in its steady state."""
        return self.link_out_both / self.link_sharers

    @property
    def from_host_both(self) -> float:
        """Bytes per second into device memory while as much goes out."""
        return self.link_in_both / self.link_sharers

    def bandwidth(self, ranks: int, stride: int = 1) -> float:
        """Bytes per second and GPU of a collective over `ranks` ranks that are `stride` apart."""
        return self.nvlink if ranks * stride <= self.node else self.network

    def source_text(self) -> str:
        """Where the numbers come from, one line each source."""
        table = _table()["sources"]
        used = dict.fromkeys(self.sources.values())
        return "; ".join(f"{name}: {table.get(name, name)}" for name in used)


_RATES = ("attention_forward", "attention_backward")
_SHARES = ("headroom", "fragmentation_caching", "fragmentation_arena")
_COUNTS = ("memory", "link_sharers", "node", "host_memory", "context")


def load_hardware(name: str) -> Hardware:
    """A row of the table by its name, or a profile by its path. Raises ConfigError with what is wrong or missing."""
    table = _table()
    word = name.strip().lower()
    if word in table["gpus"]:
        return _made(word, _row(table, word), "the table")
    path = Path(name)
    if path.suffix in (".json", ".yaml", ".yml") or path.is_file():
        content = read_mapping(path)
        measured = content.get("hardware", content)
        if not isinstance(measured, Mapping):
            raise ConfigError(
                f"{path}: hardware: must be a mapping of numbers, as megamem profile --hardware writes it"
            )
        return _made(name, {**table["defaults"], **measured}, str(path))
    raise ConfigError(f"--gpu {name}: neither a GPU of the table nor a profile; {suggestion(word, table['gpus'])}")


def names() -> list[str]:
    """The rows of the table."""
    return list(_table()["gpus"])


def plain_row(name: str) -> dict[str, dict[str, Any]]:
    """A row as the table has it: what a profile falls back on for what it cannot measure."""
    row = _row(_table(), name)
    return {item.name: dict(row[item.name]) for item in fields(Hardware) if item.name not in ("name", "sources")}


def row_of_device(device: str) -> str | None:
    """The row for the name by which CUDA calls a device, such as `NVIDIA H100 80GB HBM3`; None where there is none."""
    fitting = [
        (len(word), name) for name, row in _table()["gpus"].items() for word in row.get("names", ()) if word in device
    ]
    return max(fitting)[1] if fitting else None


def _table() -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(
        TABLE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return content


def _row(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    row = table["gpus"][name]
    base = _row(table, row["like"]) if "like" in row else table["defaults"]
    return {**base, **row}


def _made(name: str, row: Mapping[str, Any], where: str) -> Hardware:
    """The record of a row; ConfigError names every number that is missing or none."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for item in fields(Hardware):
        if item.name in ("name", "sources"):
            continue
        entry = row.get(item.name)
        if not isinstance(entry, Mapping):
            problems.append(f"{where}: {item.name}: missing; megamem profile --hardware measures it")
            continue
        sources[item.name] = str(entry.get("source", where))
        try:
            values[item.name] = _value(item.name, entry)
        except (TypeError, ValueError, KeyError):
            problems.append(f"{where}: {item.name}: {entry!r} holds no positive number")
    if problems:
        raise ConfigError(problems)
    return Hardware(name=name, sources=sources, **values)


def _value(name: str, entry: Mapping[str, Any]) -> Any:
    if name in _RATES:
        points = tuple(sorted((float(size), float(rate)) for size, rate in entry.items() if size != "source"))
        if not points or min(rate for _, rate in points) <= 0:
            raise ValueError(name)
        return Rates(points)
    value = float(entry["value"])
    if not (math.isfinite(value) and (value > 0 or (name in _SHARES and value == 0))):
        raise ValueError(name)
    return int(value) if name in _COUNTS else value
