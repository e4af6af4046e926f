"""A configuration that leaves something to the planner, in a job that trains."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
SIZES = {"hidden": 64, "heads": 4, "sequence": 64, "vocab": 128, "ffn": 256, "layers": 4, "bias": True, "tp": 2}
FLAGS = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 256 --num-attention-heads 4 --seq-length 64 --vocab-size 128 "
    "--tensor-model-parallel-size 2 --micro-batch-size 2 --transformer-impl local --hidden-dropout 0 "
    "--attention-dropout 0 --position-embedding-type rope"
)


def trained(config: dict[str, Any], flags: str | None) -> tuple[str, str, str, list[float]]:
    """What was decided, what was printed, what was refused, and the losses of two steps."""
    import megamem
    from megamem.errors import MegamemError
    from megamem.testing.models import GptCase, build_gpt, init_parallel, train_steps

    case = GptCase(**SIZES)  # type: ignore[arg-type]
    init_parallel(case)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), megamem.enable(config, job=flags) as handle:
            losses, _ = train_steps(build_gpt(case), case, num_microbatches=1, steps=2)
            report = f"{handle.report()}"
            return handle.config.activations.policy, printed.getvalue() + report, "", losses
    except MegamemError as fault:
        return "", printed.getvalue(), str(fault), []


def auto(device_memory: str | None, hardware: str = "h100") -> dict[str, Any]:
    planner = {"hardware": hardware} | ({} if device_memory is None else {"device_memory": device_memory})
    return {"activations": {"policy": "auto"}, "planner": planner}


def test_the_planner_decides_before_the_model_is_built(dist: Dist) -> None:
    run = dist(2)
    stock = run(trained, {}, None)
    roomy = run(trained, auto(None), FLAGS)
    assert [found[0] for found in roomy] == ["off", "off"]
    assert "activations  off" in roomy[0][1] and "everything that layers save fits" in roomy[0][1]
    tight = run(trained, auto("2100452KiB"), FLAGS)  # 2 GiB of them are the context's
    assert tight[0][0] == tight[1][0] != "off", tight
    assert "left alone they need" in tight[0][1] and "The plan predicts" in tight[0][1]
    assert "planned for h100, ran on a CPU" in tight[0][1]
    assert stock[0][3] == roomy[0][3] == tight[0][3]


def test_what_is_not_known_or_contradicts_is_refused_on_every_rank(dist: Dist) -> None:
    run = dist(2)
    unknown = run(trained, auto(None), None)
    assert all("pass it: megamem.enable(config, job=" in found[2] for found in unknown)
    machine = run(trained, {"activations": {"policy": "auto"}}, FLAGS)
    assert all("'cpu' is no GPU of the table" in found[2] and "planner.hardware" in found[2] for found in machine)
    nothing = run(trained, auto("2040MiB"), FLAGS)
    assert all("nothing fits" in found[2] and "megamem plan finds" in found[2] for found in nothing)
    other = run(trained, auto("2102652KiB"), FLAGS.replace("parallel-size 2", "parallel-size 1"))
    assert all("made_for.layout: tensor is 2, the plan is for 1" in found[2] for found in other), other
