"""What is really alive while a schedule runs, against what the simulator says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]


def live_and_predicted(name: str, fields: Fields, num_microbatches: int) -> dict[str, Any]:
    """Bytes alive after every pass of a step, without messages, beside the simulator's peak for the measured costs.

    A stage's costs are what its first F leaves alive, and what of it its first B leaves.
    """
    import torch.distributed as torch_dist
    from megatron.core import parallel_state

    from megamem.integrations.megatron_core import enable
    from megamem.ir.schedule import Action
    from megamem.ir.workload import PipelineCosts, StageCost
    from megamem.planner.schedules.simulator import simulate
    from megamem.testing.live import LiveStorages
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    case = PipelineCase(gpt=GptCase(hidden=32, **fields), num_microbatches=num_microbatches)
    init_parallel(case.gpt)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    with enable({"schedule": {"name": name}}) as handle:
        schedule = handle.schedule
        assert schedule is not None
        chunks = build_pipeline(case)
        run_step(case, chunks, num_microbatches, seed=0)  # buffers that stay
        curve: list[int] = [0]
        made: dict[int, int] = {}
        kept: dict[int, int] = {}

        def observe(action: Action) -> None:
            if not action.is_compute:
                return
            messages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in schedule.messages}
            now = live.live_bytes() - sum(messages.values())
            if action.kind == "F":
                made.setdefault(action.chunk, now - curve[-1])
            elif action.kind in ("B", "BW"):
                kept.setdefault(action.chunk, now - curve[-1])
            curve.append(now)

        schedule.observe = observe
        with LiveStorages() as live:
            run_step(case, chunks, num_microbatches, seed=0)
        assert schedule.planned is not None
        planned = schedule.planned.schedule
    mine = {
        planned.placement.stage(rank, chunk): StageCost(
            forward=1, backward=1, weight=1, activation=size, weight_grad=max(0, size + kept[chunk])
        )
        for chunk, size in made.items()
    }
    everybody: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(everybody, mine)
    stages = {stage: cost for one in everybody for stage, cost in one.items()}
    costs = PipelineCosts(stages=tuple(stages[stage] for stage in range(len(stages))))
    smallest = min(cost.activation for cost in stages.values())
    return {
        "peak": max(curve),
        "predicted": simulate(planned, costs).peak_activation[rank],
        "left": curve[-1],
        "smallest": smallest,
        "passes": len(curve) - 1,
        "kept": sum(cost.weight_grad for cost in mine.values()) / sum(cost.activation for cost in mine.values()),
    }


TWO = {"layers": 4, "pp": 2, "vpp": 2}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("1f1b", {"layers": 4, "pp": 2}),
        ("zb-h1", {"layers": 4, "pp": 2}),
        ("zb-h2", {"layers": 4, "pp": 2}),
        ("interleaved", TWO),
        ("gis-h", TWO),
        ("zb-v", TWO),
        ("v-min", TWO),
    ],
)
def test_no_more_is_alive_than_the_simulator_says(dist: Dist, name: str, fields: Fields) -> None:
    found = dist(2)(live_and_predicted, name, fields, 4)
    for one in found:
        # Tokens, labels, losses; every chunk of Megatron's refers to its last input, and so to that one's gradient.
        slack = 4096 + fields.get("vpp", 1) * 2 * 4096
        assert one["passes"] >= 8
        assert one["predicted"] >= 2 * one["smallest"] or name == "1f1b"
        assert one["peak"] <= one["predicted"] + slack, found
        assert one["peak"] >= 0.9 * one["predicted"], found
        assert one["left"] <= slack
        if name not in ("1f1b", "interleaved"):
            assert 0 < one["kept"] < 1  # what W needs, and no more
