"""Models with Transformer Engine's own layers train bitwise as stock Megatron trains them.

Its published Python runs here, modules, autograd functions, FP8 storages and weight-gradient stores, on kernels written
in PyTorch; see te_cases.py. What its compiled kernels do is for tests on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from te_sources import FETCHER, sources

pytestmark = pytest.mark.megatron

OLDEST, NEWEST = FETCHER.VERSIONS[0], FETCHER.VERSIONS[-1]
SPLIT = ["overlapped reduction", "experts", "fp8 tensorwise", "fused accumulation"]
CASES = {
    NEWEST: [*SPLIT, "llama", "chunks", "fp8 delayed", "whole backward passes", "tp_comm_overlap"],
    OLDEST: SPLIT,
}
NEVER_SPLIT = ("word_embeddings", "router")  # looked up, or multiplied by Megatron itself


def run(version: str, names: list[str]) -> dict[str, Any]:
    """What te_cases.py found with a release: by case, a list by rank."""
    if missing := [name for name in ("pydantic", "einops") if find_spec(name) is None]:
        pytest.skip(f"Transformer Engine needs {' and '.join(missing)}: pip install 'megamem[dev]'")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("te_cases.py")), str(sources(version))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *names], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """All cases of a release run in one process, which imports PyTorch, Megatron and Transformer Engine once."""
    return {}


def look(found: dict[str, dict[str, Any]], version: str, name: str) -> list[dict[str, Any]]:
    if version not in found:
        found[version] = run(version, CASES[version])
    result = found[version][name]
    assert isinstance(result, list), result
    return result


def check_split(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["differences"] == []
        assert rank["waiting"] == 0
        assert all(any(word in name for word in NEVER_SPLIT) for name in rank["unsplit"])
        assert rank["split"] >= rank["matrices"] - len(rank["unsplit"])
        assert (rank["stores"], rank["hidden"]) == (["WeightGradStore"], 0)  # as if we had not been there
        assert rank["layers"] == 8


@pytest.mark.parametrize(
    ("version", "name"), [(v, n) for v, names in CASES.items() for n in names if n not in ("tp_comm_overlap",)]
)
def test_losses_and_gradients_are_bitwise_those_of_stock(
    found: dict[str, dict[str, Any]], version: str, name: str
) -> None:
    ranks = look(found, version, name)
    if name == "whole backward passes":
        assert [(rank["differences"], rank["split"]) for rank in ranks] == [([], 0)] * 2
    else:
        check_split(ranks)


def test_layers_that_cannot_be_split_are_named(found: dict[str, dict[str, Any]]) -> None:
    for rank in look(found, NEWEST, "tp_comm_overlap"):
        assert "of Transformer Engine's, tp_comm_overlap hides communication" in rank["error"]
        assert "Use 1f1b or interleaved" in rank["error"]


@pytest.mark.slow
@pytest.mark.parametrize("version", FETCHER.VERSIONS)
def test_every_release(version: str) -> None:
    for name, ranks in run(version, [*SPLIT, "sequence parallel"]).items():
        assert isinstance(ranks, list), f"{name}: {ranks}"
        check_split(ranks)
