"""From a configuration to a checked schedule: `auto` is settled, and what cannot be had is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamem.config import Scheduling
from megamem.errors import ConfigError, InfeasibleError, ScheduleError
from megamem.ir.schedule import Placement
from megamem.ir.workload import Uniform
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.plan import PlannedSchedule, plan_schedule


def plan(num_microbatches: int = 8, **options: Any) -> PlannedSchedule:
    known = {name: options.pop(name) for name in ("num_chunks", "num_layers", "shapes") if name in options}
    return plan_schedule(Scheduling(**options), num_ranks=4, num_microbatches=num_microbatches, **known)


def test_a_named_schedule_is_that_of_its_family() -> None:
    planned = plan(name="gis", group=2, chunks=3)
    assert planned.schedule == build_schedule("gis", Request(num_ranks=4, num_microbatches=8, num_chunks=3, group=2))
    assert planned.simulation.makespan > 24
    assert plan(name="v-half").schedule.placement == Placement(shape="v", num_ranks=4, num_chunks=2)
    assert plan(name="gis", num_chunks=4).schedule.placement.num_chunks == 4  # what the model has


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "gis", "chunks": 2, "num_chunks": 3}, "schedule.chunks is 2, and the model has 3"),
        (
            {"name": "gis", "chunks": 3, "num_layers": 8},
            "8 layers cannot be divided by .* = 12 stages; nearest: 12 layers",
        ),
        ({"name": "v-half", "memory_limit": 2.0}, "exceeds the memory limit.*nearest: 3"),
        ({"name": "v-half", "shapes": ("round-robin",)}, "has the placement v, the model has not"),
        ({"name": "zb-h1", "num_chunks": 2}, "zb-h1 works with 1 chunk"),
        ({"name": "auto", "memory_limit": 0.1}, "nearest: memory limit"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InfeasibleError, match=f"(?s){text}"):
        plan(**options)


def test_auto_keeps_to_the_model_and_the_limit() -> None:
    best = plan(name="auto", memory_limit=3.0, num_layers=8)
    assert max(best.simulation.peak_activation) <= 3
    assert best.schedule.placement.num_chunks in (1, 2)
    built = plan(name="auto", memory_limit=3.0, num_chunks=2, shapes=("round-robin",))
    assert built.schedule.placement == Placement(shape="round-robin", num_ranks=4, num_chunks=2)
    assert not any(action.kind == "OFFLOAD" for _, action in built.schedule)


def test_costs_come_from_a_file_and_give_bytes_a_meaning(tmp_path: Path) -> None:
    layer = {"forward": 1, "backward": 2, "weight": 1, "activation": 2 << 20, "weight_grad": 1 << 20}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"layers": [layer] * 8, "last": {**layer, "activation": 0, "weight_grad": 0}}))
    planned = plan(name="1f1b", costs=str(path), memory_limit=64 << 20)
    assert max(planned.simulation.peak_activation) == 4 * 2 * (2 << 20)
    with pytest.raises(InfeasibleError, match="memory limit"):
        plan(name="1f1b", costs=str(path), memory_limit=8 << 20)
    with pytest.raises(ConfigError, match=r"schedule.memory_limit: .* bytes cannot be compared"):
        plan(name="1f1b", memory_limit=8 << 20)
    path.write_text('{"layers": [{"forward": 1}]}')
    with pytest.raises(ConfigError, match=r"costs.json: layers\[0\]"):
        plan(name="1f1b", costs=str(path))
    with pytest.raises(ConfigError, match="no such file"):
        plan(name="1f1b", costs=str(tmp_path / "absent"))


def test_a_schedule_of_ones_own_is_checked(tmp_path: Path) -> None:
    text = build_schedule("zb-h2", Request(num_ranks=4, num_microbatches=8, workload=Uniform())).to_text()
    path = tmp_path / "mine.txt"
    path.write_text(text)
    assert plan(name="file", file=str(path)).schedule.to_text() == text
    with pytest.raises(InfeasibleError, match="written for 4 ranks and 8 microbatches, this run has 4 and 9"):
        plan(9, name="file", file=str(path))
    path.write_text(text.replace("0B3 ", "", 1))
    with pytest.raises(ScheduleError, match="0B3"):
        plan(name="file", file=str(path))
    path.write_text(text.replace("rank 1:", "rank 7:"))
    with pytest.raises(ConfigError, match=r"mine.txt: .*ranks"):
        plan(name="file", file=str(path))
