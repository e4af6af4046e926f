"""Fixtures of all rooms: forked gloo ranks, and skips that say what is missing."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from megamem.testing.dist import server_pool, start_server, stop_server

HAS_TORCH = find_spec("torch") is not None
HAS_MEGATRON = HAS_TORCH and find_spec("megatron") is not None and find_spec("megatron.core") is not None


def pytest_configure(config: pytest.Config) -> None:
    """Fork the rank server now, while no test has imported torch yet (see megamem/testing/dist.py)."""
    runs_tests = hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)  # of pytest-xdist
    if HAS_TORCH and runs_tests:
        start_server()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the ranks with the session."""
    stop_server()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpus(n)` implies `gpu`, before `-m` chooses: a test of many GPUs is never taken for one that needs none."""
    for item in items:
        if item.get_closest_marker("gpus"):
            item.add_marker("gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, with the reason."""
    if item.get_closest_marker("megatron") and not HAS_MEGATRON:
        missing = "megatron-core" if HAS_TORCH else "torch"
        pytest.skip(f"{missing} is not installed: pip install 'megamem[train]'")
    if item.get_closest_marker("gpu"):
        if not HAS_TORCH:
            pytest.skip("torch is not installed: pip install 'megamem[train]'")
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device (ci/gpu.sh runs these)")
        for marker in item.iter_markers("gpus"):
            (needed,) = marker.args
            if torch.cuda.device_count() < needed:
                pytest.skip(f"needs {needed} CUDA devices, this machine has {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def dist() -> Iterator[Callable[[int], Callable[..., list[Any]]]]:
    """`dist(2)(function, *args)` runs a module-level function on 2 gloo ranks under the CPU rig; values come back by
    rank.

    The ranks are kept for the whole session and reset between calls; a failing call raises `RankError` and new ones
    are forked.
    """
    if not HAS_TORCH:
        pytest.skip("torch is not installed: pip install 'megamem[train]'")
    yield server_pool
