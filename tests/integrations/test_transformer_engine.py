"""What the adapter says where Transformer Engine is missing, too old, or set against expectation."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="pip install 'megamem[train]'")

from megamem.errors import MissingPackage
from megamem.integrations import transformer_engine as adapter


def package(version: str) -> Any:
    module = ModuleType("transformer_engine")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.setattr("importlib.metadata.version", raise_not_found)
    with pytest.raises(MissingPackage, match=r"not installed; pip install --no-build-isolation .megamem\[te\]"):
        adapter.installed()


def raise_not_found(name: str) -> str:
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("version", ["2.9.0", "1.13"])
def test_an_old_release_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", package(version))
    with pytest.raises(MissingPackage, match=rf"{version} is older than 2.10.*pip install"):
        adapter.installed()


@pytest.mark.parametrize("version", ["2.10.0", "2.20.2", "2.11.0+cu13"])
def test_supported_releases(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", package(version))
    assert str(adapter.installed()) == version


def test_without_it_nothing_is_imported_and_nothing_is_its() -> None:
    import torch

    if adapter.is_loaded():
        pytest.skip("this environment has Transformer Engine")
    tensor = torch.zeros(2, 2)
    assert not adapter.is_offloading()
    assert not adapter.must_stay(tensor)
    assert adapter.take_apart(tensor) is None
    assert list(adapter.weight_buffers(torch.nn.Linear(2, 2))) == []
    assert adapter.save_original_inputs([torch.nn.Linear(2, 2)]) == []
    assert "transformer_engine.pytorch" not in sys.modules


@pytest.mark.parametrize(
    ("fields", "variable", "says"),
    [
        ({"fp8": "hybrid", "fp8_dot_product_attention": True}, "0", True),
        ({"fp8": "hybrid", "fp8_multi_head_attention": True}, "0", True),
        ({"fp8": "hybrid", "fp8_dot_product_attention": True}, "1", False),
        ({"fp8": "hybrid"}, "0", False),
        ({"fp8": None, "fp8_dot_product_attention": True}, "0", False),
    ],
)
def test_fp8_attention_that_keeps_16_bits(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], variable: str, says: bool
) -> None:
    monkeypatch.setenv(adapter.FP8_ATTENTION_BACKWARD, variable)
    note = adapter.attention_note(SimpleNamespace(**fields))
    assert (note is not None) is says
    assert note is None or "unset it" in note
