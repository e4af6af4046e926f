"""Schedules that send chunks to host memory between F and B: the numbers stay those of stock, the memory does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]


def train_all(schedules: dict[str, Fields], sections: Fields, seed: int | None = None) -> dict[str, Any]:
    """By schedule: what differs from stock, what was stored on the host, and the most that was held on the device."""
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, train_pipeline
    from megamem.testing.streams import SimulatedDevice

    case = PipelineCase(gpt=GptCase(layers=8, pp=2, vpp=2), num_microbatches=8, steps=3)
    init_parallel(case.gpt)
    stock = train_pipeline(case)
    found = {}
    for name, section in schedules.items():
        device = None if seed is None else SimulatedDevice(seed, "latest")
        with enable({"schedule": section, **sections}, device=device) as handle:
            meter = handle.meter()
            ours = train_pipeline(case)
            report = handle.report()
        activations = report.activations
        found[name] = {
            "differences": ours.differences(stock),
            "swapped": 0 if activations is None else activations.swapped_nbytes,
            "recomputed": 0 if activations is None else activations.recomputed_nbytes,
            "spared": 0 if activations is None else activations.untouched_nbytes,
            "peak": meter.peak_bytes,
        }
    return found


FAMILIES: dict[str, Fields] = {"gis": {"name": "gis"}, "po-h": {"name": "po-h"}, "po-f": {"name": "po-f"}}


def test_offloaded_chunks_come_back_bitwise_and_hold_less(dist: Dist) -> None:
    for rank, found in enumerate(dist(2)(train_all, FAMILIES, {})):
        assert {name: results["differences"] for name, results in found.items()} == {name: [] for name in FAMILIES}
        assert found["gis"]["swapped"] == 0 < found["po-h"]["swapped"] <= found["po-f"]["swapped"]
        assert found["po-h"]["spared"] > 0
        assert found["po-h"]["peak"] < found["gis"]["peak"]
        if rank == 0:  # the last stage, on rank 1, has nothing to offload: its B follows at once
            assert found["po-h"]["swapped"] < found["po-f"]["swapped"]
            assert found["po-f"]["peak"] < found["po-h"]["peak"]


def test_copies_at_the_worst_moment_change_nothing(dist: Dist) -> None:
    memory = {"policy": "memo", "keep_last_layers": 0, "host_memory": "4MiB"}  # the simulator writes to all of it
    for found in dist(2)(train_all, {"po-f": {"name": "po-f"}}, {"activations": memory}, 7):
        assert found["po-f"]["differences"] == []
        assert found["po-f"]["swapped"] > 0


def test_the_activations_section_says_how(dist: Dist) -> None:
    policy = {"policy": "memo", "swap_fraction": 0.0, "keep_last_layers": 0}
    (found, _) = dist(2)(train_all, {"po-h": {"name": "po-h"}}, {"activations": policy})
    results = found["po-h"]
    assert results["differences"] == []
    assert results["recomputed"] > 0 and results["swapped"] > 0 and results["spared"] > 0
