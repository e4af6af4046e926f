"""What `gpus(n)` means to the runner: selected with `gpu`, and skipped with the number that is missing."""

from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture
def rules(request: pytest.FixtureRequest) -> ModuleType:
    """The conftest.py of this run."""
    return next(
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(Path(__file__).with_name("conftest.py"))
    )


def test_many_gpus_imply_one(request: pytest.FixtureRequest, rules: Any) -> None:
    request.node.add_marker(pytest.mark.gpus(2))
    rules.pytest_collection_modifyitems([request.node])
    assert request.node.get_closest_marker("gpu")


@pytest.mark.parametrize("there", [1, 2, 8])
def test_fewer_gpus_than_needed_skip_with_the_numbers(there: int, request: pytest.FixtureRequest, rules: Any) -> None:
    for marker in (pytest.mark.gpu, pytest.mark.gpus(2)):
        request.node.add_marker(marker)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=there),
    ):
        if there >= 2:
            rules.pytest_runtest_setup(request.node)
        else:
            with pytest.raises(pytest.skip.Exception, match="needs 2 CUDA devices, this machine has 1"):
                rules.pytest_runtest_setup(request.node)
