"""`megamem profile`: the bytes are those of the papers' formulas, and the file is one that the simulator takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamem.cli import main
from megamem.ir.schedule import Placement
from megamem.ir.workload import Workload, parse_costs

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": None,
    "seq_length": 16,
    "micro_batch_size": 2,
    "vocab_size": 300,
    "swiglu": False,
    "normalization": "LayerNorm",
    "disable_bias_linear": True,
    "bf16": True,
}


def profile(fields: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    from megamem.integrations.megatron_profile import GptShape, profile_gpt
    from megamem.testing.models import GptCase, init_parallel

    shape = GptShape(**{**SHAPE, **fields})
    init_parallel(GptCase(tp=shape.tensor_model_parallel_size))
    seen: list[tuple[str, int]] = []
    workload = profile_gpt(
        shape, repetitions=2, link_gb_per_s=1.0, progress=lambda what, done: seen.append((what, done))
    )
    return workload.to_dict(), seen


def test_what_w_needs_is_the_papers_m_w(dist: Dist) -> None:
    content, seen = dist(1)(profile, {})[0]
    layer = content["layers"][0]
    # Inputs (7 sbh) and output gradients (9 sbh) of four linear layers, 2 bytes each: arXiv 2401.10241, section 2.3.
    unit = 16 * 2 * 32
    assert layer["weight_grad"] == 32 * unit
    assert layer["activation"] > layer["weight_grad"]
    assert len(content["layers"]) == 4
    assert all(layer[name] > 0 for name in ("forward", "backward", "weight"))
    # The embedding has no W of its own; the output layer keeps its input and the gradient of its logits (384 padded).
    assert content["first"]["weight_grad"] == 0
    assert content["last"]["weight_grad"] == unit * 2 + 16 * 2 * 384 * 2
    assert content["comm"] == pytest.approx(1e3 * unit * 2 / 1e9)
    assert [done for what, done in seen if what == "layer"] == [1, 2, 3, 4]
    workload = parse_costs(content)
    assert isinstance(workload, Workload)
    stages = workload.costs(Placement(shape="v", num_ranks=2, num_chunks=2)).stages
    assert stages[0].activation >= stages[1].activation < stages[3].activation


def test_a_tensor_parallel_rank_keeps_its_share(dist: Dist) -> None:
    whole, _ = dist(1)(profile, {})[0]
    for content, _ in dist(2)(profile, {"tensor_model_parallel_size": 2, "sequence_parallel": True}):
        # Under sequence parallelism inputs of column-parallel layers are shards too, so everything is halved.
        assert content["layers"][0]["weight_grad"] < whole["layers"][0]["weight_grad"]
        assert content["layers"][0]["activation"] < whole["layers"][0]["activation"]
        assert content["comm"] == whole["comm"] / 2


MODEL = {"num-layers": 4, "hidden-size": 32, "num-attention-heads": 4, "seq-length": 16, "vocab-size": 300}
COMMAND = ["profile", *(word for name, value in MODEL.items() for word in (f"--{name}", str(value)))]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--num-attention-heads 5", "--hidden-size 32 is not divisible by 5 attention heads"),
        ("--num-query-groups 3", "4 attention heads are not divisible by 3 query groups"),
        ("--tensor-model-parallel-size 2", "start 2 ranks with torchrun: 1 are there"),
        ("--seq-length 0", "--seq-length must be at least 1"),
        ("--link-gb-per-s 0", "--link-gb-per-s must be above 0"),
        ("--output nowhere/costs.json", "there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    flags: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--output", str(tmp_path / "costs.json"), *flags.split()]) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_what_the_simulator_reads(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    path = tmp_path / "costs.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megamem", *COMMAND, "--repetitions", "1", "--output", str(path)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "output layer, loss" in done.stdout
    assert len(json.loads(path.read_text(encoding="utf-8"))["layers"]) == 4
    simulate = ["simulate", "--schedule", "zb-h1", "--stages", "2", "--microbatches", "4", "--costs", str(path)]
    assert main(simulate) == 0
