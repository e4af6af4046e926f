"""Checkpoints of models whose embeddings all ranks share, and what the optimizer sees of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from megamem.testing.trials import start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

PARALLEL: Fields = {"vocabulary": {"parallel": True}}
SMALL: Fields = {"layers": 2, "hidden": 16, "vocab": 72, "pp": 2}

LAYOUTS: dict[str, tuple[Fields, Fields]] = {
    "stock, tp2 pp2": ({"tp": 2, "sp": True, "pp": 2}, {}),
    "stock, pp4": ({"pp": 4}, {}),
    "shared, tp2 pp2": ({"tp": 2, "sp": True, "pp": 2}, PARALLEL),
    "shared, pp4 gis-h": ({"pp": 4, "vpp": 2}, {**PARALLEL, "schedule": {"name": "gis-h"}}),
    "shared, tp2 pp2 v-half": ({"tp": 2, "sp": True, "pp": 2, "vpp": 2}, {**PARALLEL, "schedule": {"name": "v-half"}}),
}


def across_layouts(fields: Fields, folder: str, source: str, targets: list[str]) -> dict[str, Any]:
    """Two steps on one layout, and a third on it and on each of the others: parameters of the whole model."""
    from megatron.core import parallel_state

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import build_optimizer, global_names
    from megamem.testing.parity import seed_everything
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step, whole_model

    def train(name: str, steps: range, load: str | None, save: str | None) -> Any:
        layout, config = LAYOUTS[name]
        parallel_state.destroy_model_parallel()
        gpt = start_case(**{**fields, **layout})
        case = PipelineCase(gpt=gpt)
        seed_everything()
        with enable(config):
            chunks = build_pipeline(case)
            optimizer = build_optimizer(chunks, gpt, clip_grad=0.5)
            if load is not None:
                checkpoints.load(chunks, optimizer, load)
            for step in steps:
                for chunk in chunks:
                    chunk.zero_grad_buffer()  # type: ignore[operator]
                optimizer.zero_grad()
                run_step(case, chunks, 4, seed=step)
                optimizer.step()
                if save is not None and step == 1:
                    checkpoints.save(chunks, optimizer, save)
            parameters = {key: value.detach().clone() for chunk in chunks for key, value in global_names(chunk)}
            return whole_model(parameters)

    found = {source: train(source, range(3), None, folder)}
    return found | {target: train(target, range(2, 3), folder, None) for target in targets}


CHECKPOINTED: dict[str, tuple[Fields, str, list[str]]] = {
    "from stock": ({"vocab": 72}, "stock, tp2 pp2", ["shared, tp2 pp2", "shared, pp4 gis-h"]),
    "from shared, tied, odd shards": (
        {"vocab": 70, "tied": True},
        "shared, pp4 gis-h",
        ["stock, tp2 pp2", "stock, pp4", "shared, tp2 pp2 v-half"],
    ),
    "distributed optimizer": (
        {"vocab": 72, "distributed_optimizer": True},
        "shared, tp2 pp2",
        ["stock, pp4", "shared, pp4 gis-h"],
    ),
}


@pytest.mark.parametrize(("fields", "source", "targets"), CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpoints_switch_it_on_and_off_at_any_layout(
    dist: Dist, tmp_path: Path, fields: Fields, source: str, targets: list[str]
) -> None:
    """The third step, with clipped gradients and Adam, is that of an unbroken run to the rounding that Adam makes."""
    fields = {"layers": 8, "hidden": 16, **fields}
    for found in dist(4)(across_layouts, fields, str(tmp_path / "saved"), source, targets):
        expected = found.pop(source)
        assert len(found) == len(targets)
        for name, parameters in found.items():
            whole = {key.rsplit(" ", 1)[0] for key in expected}
            assert {key.rsplit(" ", 1)[0] for key in parameters} == whole
            for key in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight 0"):
                if key in expected:
                    assert float((parameters[key] - expected[key]).norm() / expected[key].norm()) < 1e-4, (name, key)


def norms() -> list[list[float]]:
    """The gradient norm that Megatron clips by, of stock and of shared embeddings, tied and untied."""
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import build_optimizer
    from megamem.testing.parity import seed_everything
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    found = []
    gpt = start_case(**{**SMALL, "tp": 2, "sp": True})
    for tied in (False, True):
        case = PipelineCase(gpt=dataclasses.replace(gpt, tied=tied))
        row = []
        for config in ({}, PARALLEL):
            seed_everything()
            with enable(config):
                chunks = build_pipeline(case)
                optimizer = build_optimizer(chunks, case.gpt)
                run_step(case, chunks, 4, seed=0)
                row.append(float(optimizer.step()[1]))
        found.append(row)
    return found


def test_the_gradient_norm_counts_every_row_once(dist: Dist) -> None:
    for rows in dist(4)(norms):
        assert all(stock > 0 and ours == pytest.approx(stock, rel=1e-5) for stock, ours in rows)
