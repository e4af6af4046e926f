"""What megamem did, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megamem.config import Config
from megamem.integrations.capability import CapabilityReport
from megamem.runtime.activations.engine import ActivationEngine


@dataclass(frozen=True, kw_only=True)
class ActivationReport:
    """Totals of one rank. Bytes are per step, over all its microbatches, where steps have run."""

    policy: str
    num_steps: int = 0
    kept_nbytes: int = 0
    swapped_nbytes: int = 0
    link_nbytes: int = 0
    recomputed_nbytes: int = 0
    replayed_tokens: int = 0
    untouched_nbytes: int = 0
    peak_held_nbytes: int = 0
    peak_staging_nbytes: int = 0
    host_nbytes: int = 0
    host_capacity_nbytes: int = 0
    stall_ms: float = 0.0
    num_without_room: int = 0
    num_unplanned: int = 0

    @classmethod
    def of(cls, config: Config, engine: ActivationEngine | None) -> ActivationReport:
        """The report of an engine; all zero where none has run."""
        policy = config.activations.policy
        if engine is None:
            return cls(policy=policy)
        stats, ledger, arena = engine.stats, engine.courier.ledger, engine.courier.arena
        steps = max(stats.num_steps, 1)
        return cls(
            policy=policy,
            num_steps=stats.num_steps,
            kept_nbytes=stats.kept_nbytes // steps,
            swapped_nbytes=stats.swapped_nbytes // steps,
            link_nbytes=stats.link_nbytes // steps,
            recomputed_nbytes=stats.recomputed_nbytes // steps,
            replayed_tokens=stats.replayed_tokens // steps,
            untouched_nbytes=stats.untouched_nbytes // steps,
            peak_held_nbytes=stats.peak_held_nbytes,
            peak_staging_nbytes=ledger.peak_staging_nbytes,
            host_nbytes=arena.peak,
            host_capacity_nbytes=arena.capacity,
            stall_ms=engine.device.stall_ms() / steps,
            num_without_room=stats.num_without_room,
            num_unplanned=stats.num_unplanned,
        )

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        rows = [
            ("policy", self.policy),
            ("kept in device memory, per step", mib(self.kept_nbytes)),
            ("swapped to host memory, per step", _swapped(self.swapped_nbytes, self.link_nbytes)),
            ("recomputed, per step", f"{mib(self.recomputed_nbytes)} ({self.replayed_tokens} layer tokens)"),
            ("left alone in the last layers, per step", mib(self.untouched_nbytes)),
            ("peak held at once, staging included", mib(self.peak_held_nbytes)),
            ("peak in staging buffers", mib(self.peak_staging_nbytes)),
            ("host memory, peak of budget", f"{mib(self.host_nbytes)} of {mib(self.host_capacity_nbytes)}"),
            ("compute stalled on copies, per step", f"{self.stall_ms:.1f} ms"),
        ]
        if self.num_without_room:
            rows.append(("layer runs without room on the host", str(self.num_without_room)))
        if self.num_unplanned:
            rows.append(("layer runs left alone (shapes changed)", str(self.num_unplanned)))
        return rows


def _swapped(tensors_nbytes: int, link_nbytes: int) -> str:
    return mib(tensors_nbytes) + ("" if link_nbytes == tensors_nbytes else f", compressed to {mib(link_nbytes)}")


class Report:
    """What the capabilities did on this rank, by section; None for those that are off. Prints as a table."""

    def __init__(self, **parts: CapabilityReport) -> None:
        self.parts = parts

    def __getattr__(self, section: str) -> Any:
        if section.startswith("_"):
            raise AttributeError(section)
        return self.parts.get(section)

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        return [row for part in self.parts.values() for row in part.rows()]

    def __str__(self) -> str:
        rows = self.rows()
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def mib(nbytes: int) -> str:
    """Bytes as MiB, to one decimal."""
    return f"{nbytes / 2**20:,.1f} MiB"
