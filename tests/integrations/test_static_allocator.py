"""The static allocator under real Megatron-Core models: the same losses and gradients to the bit, with memory served
from the arena, whatever comes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from megamem.testing.trials import SWAP, error_of, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
STATIC: dict[str, Any] = {"allocator": {"mode": "static", "poison": True, "time_limit": "5s"}}


def compare(fields: Mapping[str, Any], sections: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Train under stock Megatron and with the arena: what differs, and what the arena did."""
    from megamem.testing.parity import train

    case = start_case(**fields)
    stock = train(case, **options)
    ours = train(case, sections=sections, **options)
    arena = ours.report.allocator.arena
    return {
        "differences": ours.differences(stock),
        "requests": arena.counters.requests,
        "bytes share": arena.served_bytes_share,
        "capacity": arena.counters.capacity,
        "peak": arena.planned_peak,
        "plans": [kind.num_plans for kind in arena.kinds],
        "stained": arena.counters.num_stained + arena.counters.num_unknown,
        "text": str(ours.report),
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {"layers": 3}, {}),
    "two stages": (2, {"pp": 2}, {}),
    "sequence parallel": (2, {"tp": 2, "sp": True}, {}),
    "two chunks a rank": (2, {"pp": 2, "vpp": 2, "layers": 4}, {}),
    "swapped activations": (1, {"layers": 3}, {"activations": SWAP}),
    "a schedule of ours": (2, {"pp": 2, "vpp": 2, "layers": 4}, {"schedule": {"name": "gis"}}),
    "experts": (1, {"experts": 4, "activation": "gelu"}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_bitwise_those_without(dist: Dist, layout: str) -> None:
    ranks, fields, sections = LAYOUTS[layout]
    for found in dist(ranks)(compare, fields, {**STATIC, **sections}, {"steps": 6, "num_microbatches": 4}):
        assert found["differences"] == []
        assert found["plans"] == [1] and found["capacity"] == found["peak"] > 0
        assert found["stained"] == 0
        # Sizes of experts change from step to step; gloo's threads free at their own time.
        assert found["bytes share"] > (0.5 if layout == "experts" else 0.8), found["text"]


# -- steps that are not alike ------------------------------------------------------------------------------------------

TRAIN, EVALUATE, SHORT = (4, False), (4, True), (2, False)
DIARY = [TRAIN, TRAIN, EVALUATE, TRAIN, TRAIN, EVALUATE, SHORT, TRAIN, TRAIN, EVALUATE, EVALUATE, TRAIN, SHORT, TRAIN]


def keep_a_diary(config: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Train, evaluate and train on shorter batches in turn."""
    from contextlib import nullcontext

    import megamem
    from megamem.testing.models import build_gpt, train_steps
    from megamem.testing.parity import seed_everything

    case = start_case(**fields)
    seed_everything()
    found: dict[str, Any] = {"losses": []}
    with nullcontext() if config is None else megamem.enable(config) as handle:
        chunks = build_gpt(case)
        for num_microbatches, forward_only in DIARY:
            losses, gradients = train_steps(
                chunks, case, num_microbatches=num_microbatches, forward_only=forward_only, lr=0.01
            )
            found["losses"].append(losses)
            found["gradients"] = gradients or found["gradients"]
        if handle is not None:
            found["report"] = handle.report().allocator.arena
            found["rows"] = str(handle.report())
    return found


@pytest.mark.parametrize(("ranks", "fields"), [(1, {"layers": 2}), (2, {"pp": 2})])
def test_each_kind_of_step_has_its_plan(dist: Dist, ranks: int, fields: dict[str, Any]) -> None:
    stock = dist(ranks)(keep_a_diary, None, fields)
    ours = dist(ranks)(keep_a_diary, STATIC, fields)
    for one, other in zip(stock, ours, strict=True):
        assert one["losses"] == other["losses"]
        assert all((one["gradients"][name] == other["gradients"][name]).all() for name in one["gradients"])
        report = other["report"]
        plans = {kind.key.partition(" microbatches")[0]: kind.num_plans for kind in report.kinds}
        assert plans == {"training, 4": 1, "evaluation, 4": 1, "training, 2": 0}
        assert report.counters.num_stained == report.counters.num_unknown == 0
        assert report.counters.capacity == report.planned_peak > 0
        assert report.served_bytes_share > 0.8, other["rows"]


def test_off_and_on_again(dist: Dist) -> None:
    (found,) = dist(1)(off_and_on)
    assert found["off"] == found["on"] == found["off again"]
    assert found["restored"]
    assert found["served after"] == 0


def off_and_on() -> dict[str, Any]:
    import torch

    import megamem
    from megamem.testing.models import build_gpt, train_steps

    case = start_case()
    found: dict[str, Any] = {}
    kept = None
    for word, config in (("off", None), ("on", STATIC), ("off again", None)):
        torch.manual_seed(1)
        handle = megamem.enable(config or {})
        chunks = build_gpt(case)
        found[word] = train_steps(chunks, case, num_microbatches=2, steps=5)[0]
        if config:
            allocator = handle.allocator
            kept = torch.ones(1 << 12)  # may lie in the arena, and must outlive it
            handle.disable()
            found["restored"] = handle.allocator is not None
            before = allocator.report().counters.requests["served"]
    found["served after"] = allocator.report().counters.requests["served"] - before
    assert kept is not None and bool((kept == 1).all())
    return found


def fail_in_a_step() -> dict[str, Any]:
    import megamem
    from megamem.testing.models import build_gpt, train_steps

    case = start_case()
    found: dict[str, Any] = {}
    with megamem.enable(STATIC) as handle:
        chunks = build_gpt(case)
        train_steps(chunks, case, num_microbatches=2, steps=4)
        layer = chunks[0].module.decoder.layers[1]
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        found["error"] = error_of(lambda: train_steps(chunks, case, num_microbatches=2))
        hook.remove()
        found["active"] = handle.allocator.front_end.core.malloc(4096)
        before = handle.allocator.report().counters.requests["served"]
        train_steps(chunks, case, num_microbatches=2, steps=2)
        found["served"] = handle.allocator.report().counters.requests["served"] - before
    return found


def test_a_step_that_fails_leaves_the_native_allocator_in_charge(dist: Dist) -> None:
    (found,) = dist(1)(fail_in_a_step)
    assert found["error"].startswith("ZeroDivisionError") and found["active"] is None
    assert found["served"] > 100


def restart(folder: str) -> dict[str, Any]:
    """A job that finds the plans of an earlier one."""
    import megamem
    from megamem.testing.models import build_gpt, train_steps

    case = start_case()
    config = {"allocator": {**STATIC["allocator"], "plans": folder}}
    found: dict[str, Any] = {}
    for word in ("first", "second"):
        with megamem.enable(config) as handle:
            train_steps(build_gpt(case), case, num_microbatches=2, steps=4)
            found[word] = handle.allocator.report()
    return found


def test_a_restarted_job_serves_from_its_first_step_on(dist: Dist, tmp_path: Any) -> None:
    (tmp_path / "rank0of1-damaged.json.gz").write_bytes(b"no plan")
    (found,) = dist(1)(restart, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    first, second = found["first"], found["second"]
    assert first.kinds[0].plan == second.kinds[0].plan
    assert second.num_requests > 2 * first.num_requests, "all four steps were served, not the last one alone"
    assert second.served_bytes_share > 0.8
