"""Where tests find Transformer Engine's published sources; they skip where these cannot be had."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _load_fetcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_transformer_engine", ROOT / "ci" / "transformer_engine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FETCHER = _load_fetcher()


@cache
def sources(version: str) -> Path:
    """The unpacked wheel of a release."""
    try:
        return FETCHER.sources(version)  # type: ignore[no-any-return]
    except FETCHER.FetchError as error:
        pytest.skip(str(error))
