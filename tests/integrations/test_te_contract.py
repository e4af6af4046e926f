"""Whatever the adapter takes from Transformer Engine is in the Python sources of every release that is supported.

What is looked for is read out of the adapter, so a new call is held against them as soon as it is written.
"""

from __future__ import annotations

from functools import cache

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from te_contract import Sources, Uses
from te_sources import FETCHER, ROOT, sources

ADAPTER = ROOT / "megamem" / "integrations" / "transformer_engine.py"


MEGATRONS = {"main_grad"}  # attributes of Megatron-Core's parameters


@cache
def parsed(version: str) -> Sources:
    return Sources(sources(version))


@pytest.fixture(scope="module")
def uses() -> Uses:
    return Uses.of(ADAPTER.read_text(encoding="utf-8"), "transformer_engine")


@pytest.mark.parametrize("version", FETCHER.VERSIONS)
def test_every_name_call_and_attribute_is_there(uses: Uses, version: str) -> None:
    assert uses.complaints(parsed(version)) == []


def test_nothing_is_read_from_something_unannotated(uses: Uses) -> None:
    assert uses.unannotated == MEGATRONS
    assert uses.methods and uses.attributes and uses.overrides


WRONG = {
    "a name": ("import GroupedLinear, LayerNormLinear, LayerNormMLP, Linear", "import GroupedLine"),
    "an attribute": ("gemm_bias_unfused_add", "gemm_bias_add"),
    "an attribute of a union": ("module.num_gemms", "module.num_products"),
    "an argument too many": ("super().put(tensors, function)", "super().put(tensors, function, 1)"),
    "an argument too few": ("super().put(tensors, function)", "super().put(tensors)"),
    "an override of nothing": ("def delay_wgrad_compute(self)", "def delays_wgrad_compute(self)"),
    "other arguments of an override": ("def put(self, tensor_list:", "def put(self, tensors:"),
    "an unannotated variable": ("bool(module.fuse_wgrad_accumulation)", "bool(nothing.fuses_wgrads)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_check_notices(what: str) -> None:
    right, wrong = WRONG[what]
    text = ADAPTER.read_text(encoding="utf-8")
    assert right in text
    found = Uses.of(text.replace(right, wrong), "transformer_engine")
    assert found.complaints(parsed(FETCHER.VERSIONS[-1])) or found.unannotated > MEGATRONS
