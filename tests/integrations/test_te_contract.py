"""Whatever the adapter takes from Transformer Engine is in the Python sources of every release that is supported.

What is looked for is read out of the adapter, so a new call is held against them as soon as it is written.
"""

from __future__ import annotations

import ast
from functools import cache

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

pytest.importorskip("megatron.core", reason="pip install 'megamem[train]'")

from te_contract import Sources, Uses
from te_sources import FETCHER, ROOT, sources

from megamem.integrations.transformer_engine import FP8_ATTENTION_BACKWARD, NOT_TO_OFFLOAD

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


@pytest.mark.parametrize("version", FETCHER.VERSIONS)
def test_its_mark_and_its_environment_variable_are_still_called_so(version: str) -> None:
    package = sources(version) / "transformer_engine" / "pytorch"
    marking = ast.parse((package / "cpu_offload.py").read_text(encoding="utf-8"))
    (function,) = (node for node in ast.walk(marking) if getattr(node, "name", "") == "mark_not_offload")
    assert NOT_TO_OFFLOAD in {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
    backends = (package / "attention" / "dot_product_attention" / "backends.py").read_text(encoding="utf-8")
    assert f'os.getenv("{FP8_ATTENTION_BACKWARD}", "1")' in backends


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
