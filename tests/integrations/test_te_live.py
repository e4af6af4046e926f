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
TILES = ["tiles", "tiles, swapped", "tiles, recomputed", "tiles, fused accumulation", "tiles, split"]
SPLIT = ["overlapped reduction", "experts", "fp8 tensorwise", "fused accumulation"]
SWAPPED = ["swapped fp8 tensorwise", "fp8 out of attention", "fp8 weights", "a marked buffer"]
REFUSED = {
    "tp_comm_overlap": "of Transformer Engine's, tp_comm_overlap hides communication behind the weight gradients",
    "fp8 weights apart": "of Transformer Engine's, their weights are Float8Tensor, not plain parameters",
    "inside the other offload": "Transformer Engine's get_cpu_offload_context moves what layers save too; leave it out",
}
WHOLE = "whole backward passes"
NEW_SPLIT = [*SPLIT, "llama", "chunks", "fp8 delayed"]
NEW_SWAPPED = [*SWAPPED, "swapped", "half rebuilt", "rebuilt", "swapped fp8 delayed"]
SHARED = ["fp8 outputs rebuilt", "fp8 outputs rebuilt, delayed"]
CASES = {NEWEST: [*NEW_SPLIT, *TILES, WHOLE, *NEW_SWAPPED, *SHARED, *REFUSED], OLDEST: [*SPLIT, *SWAPPED, *SHARED]}
# Of those between, each takes a process that imports everything anew; test_te_contract.py reads the sources of all.
RELEASES = FETCHER.VERSIONS if os.environ.get("MEGAMEM_EVERY_TE") else FETCHER.VERSIONS[3:-1:4]
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


Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    """All cases of a release run in one process, which imports PyTorch, Megatron and Transformer Engine once."""
    return {}


def look(found: Found, version: str, name: str) -> list[dict[str, Any]]:
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


def cases(new: list[str], old: list[str]) -> list[tuple[str, str]]:
    return [*((NEWEST, name) for name in new), *((OLDEST, name) for name in old)]


@pytest.mark.parametrize(("version", "name"), cases(NEW_SPLIT, SPLIT))
def test_weight_gradients_apart_are_bitwise_those_of_stock(found: Found, version: str, name: str) -> None:
    check_split(look(found, version, name))


def test_whole_backward_passes_leave_layers_alone(found: Found) -> None:
    assert [(rank["differences"], rank["split"]) for rank in look(found, NEWEST, WHOLE)] == [([], 0)] * 2


@pytest.mark.parametrize(("version", "name"), cases(NEW_SWAPPED, SWAPPED))
def test_what_layers_save_comes_back_bitwise(found: Found, version: str, name: str) -> None:
    (rank,) = look(found, version, name)
    assert rank["differences"] == []
    assert rank["swapped"] > 0 or name == "rebuilt"
    moved, left = rank["moved"], rank["left"]
    # 48 tokens, which are in no dimension of a weight: weights, and their copies in FP8, stay, with all single scales.
    assert all({24, 48} & set(shape) for shape, _ in moved)
    assert not any({24, 48} & set(shape) for shape, _ in left)
    if "fp8" in name:
        assert any(dtype == "uint8" for _, dtype in moved)
        assert [[1], "float32"] in left
    if name == "fp8 out of attention":
        assert [[24, 2, 32], "uint8"] in moved
    if name == "a marked buffer":
        assert [[5, 7], "float32"] in left


@pytest.mark.parametrize(("version", "name"), cases(SHARED, SHARED))
def test_outputs_that_are_made_again_are_not_kept_in_fp8_instead(found: Found, version: str, name: str) -> None:
    """fc2 would save what the activation function gives it as codes [f, s, b]. Its input, made again, is as good."""
    (rank,) = look(found, version, name)
    codes = [[64, 24, 2], "uint8"]
    assert rank["differences"] == []
    assert codes in rank["without"]
    assert (codes in rank["moved"]) is ("delayed" in name)  # scales have moved on by then


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_named(found: Found, name: str) -> None:
    for rank in look(found, NEWEST, name):
        assert REFUSED[name] in rank["error"]


@pytest.mark.parametrize("name", TILES)
def test_mlps_in_tiles(found: Found, name: str) -> None:
    for rank in look(found, NEWEST, name):
        assert rank["1"]["differences"] == []
        assert rank["3"]["error"] < 2e-6  # matrix products over fewer rows


@pytest.mark.slow
@pytest.mark.parametrize("version", RELEASES)
def test_releases_between(version: str) -> None:
    for name, ranks in run(version, [*SPLIT, "sequence parallel", *SWAPPED]).items():
        assert isinstance(ranks, list), f"{name}: {ranks}"
        if name in SWAPPED:
            assert [rank["differences"] for rank in ranks] == [[]]
        else:
            check_split(ranks)
