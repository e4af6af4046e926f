"""The records that ship: importable without torch, in the ledger, and right for the installed Megatron-Core."""

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import megamem.patches
from megamem.config import Config
from megamem.doctor import patches_ledger
from megamem.patches import GROUPS, RECORDS
from megamem.patches.registry import Patch, apply, inspect_patch, installed_version, source_sha, undeclared_bindings

Dist = Callable[[int], Callable[..., list[Any]]]
ALL = [pytest.param(patch, id=patch.target) for patches in RECORDS.values() for patch in patches]


def test_the_readme_is_not_stale() -> None:
    readme = Path(megamem.patches.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert readme == patches_ledger(), "run: megamem doctor --markdown > patches/README.md"


def test_groups_are_named_after_sections_of_the_configuration() -> None:
    assert {name.partition(".")[0] for name in GROUPS} <= set(Config().to_dict())


def test_importing_the_records_needs_no_torch_and_no_megatron() -> None:
    check = "import sys, megamem.patches; sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.megatron
@pytest.mark.parametrize("patch", [record for record in ALL if record.values[0].module.startswith("megatron.core.")])
def test_every_record_applies_to_what_is_installed_and_is_undone(patch: Patch) -> None:
    pytest.importorskip("megatron.core")
    check_record(patch)


@pytest.mark.megatron
def test_the_records_of_megatron_lm_apply_where_it_is_installed(dist: Dist) -> None:
    """Since 0.17 the wheel has it. Those of Megatron-Bridge are applied in tests/integrations/test_bridge.py."""
    if find_spec("megatron") is None or find_spec("megatron.training") is None:
        pytest.skip("megatron.training is not installed")
    (applied,) = dist(1)(check_trainer, "megatron.training")
    assert applied > 0


def check_trainer(trainer: str) -> int:
    """On a rank of its own, because trainers warn and want a GPU when they are imported; how many fit the version."""
    from megamem.testing.trainers import unblock_trainers

    mine = [patch for patches in RECORDS.values() for patch in patches if patch.module.startswith(f"{trainer}.")]
    with warnings.catch_warnings(action="ignore"), unblock_trainers():
        fitting = [patch for patch in mine if inspect_patch(patch).state != "wrong version"]
        for patch in fitting:
            check_record(patch)
    return len(fitting)


def check_record(patch: Patch) -> None:
    found = inspect_patch(patch)
    assert found.state == "applicable", found.detail
    before = source_sha_of(patch)
    context = [object()] * (len(inspect.signature(patch.build).parameters) - 1)  # what an integration would bind
    with apply([patch.bound(*context)]):
        assert inspect_patch(patch).state == "applied"
    assert inspect_patch(patch).state == "applicable"
    assert source_sha_of(patch) == before


def source_sha_of(patch: Patch) -> str:
    module, _, path = patch.target.partition(":")
    found: Any = sys.modules[module]
    for name in path.split("."):
        found = getattr(found, name)
    return source_sha(found)


@pytest.mark.megatron
def test_real_modules_are_patched_and_restored() -> None:
    """Real Megatron-Core: a function with a re-export, and a method, in one set."""
    pytest.importorskip("megatron.core")
    import megatron.core.pipeline_parallel as package
    import megatron.core.pipeline_parallel.schedules as schedules
    from megatron.core.transformer.transformer_layer import TransformerLayer

    common: dict[str, Any] = {"why": "w", "supports": "megatron-core>=0.15.3,<0.20", "remove_when": "r"}
    chooser = Patch(
        target="megatron.core.pipeline_parallel.schedules:get_forward_backward_func",
        also=("megatron.core.pipeline_parallel:get_forward_backward_func",),
        build=lambda original: lambda *args, **kwargs: "planned",
        **common,
    )
    forward = Patch(
        target="megatron.core.transformer.transformer_layer:TransformerLayer.forward",
        build=lambda original: lambda *args, **kwargs: "wrapped",
        **common,
    )
    bare = Patch(target=chooser.target, build=chooser.build, **common)
    assert "megatron.core.pipeline_parallel:get_forward_backward_func" in undeclared_bindings(bare)
    before = (schedules.get_forward_backward_func, vars(TransformerLayer)["forward"])
    with apply([chooser, forward]):
        assert package.get_forward_backward_func() == "planned"
        assert TransformerLayer.forward(None) == "wrapped"
    assert (schedules.get_forward_backward_func, vars(TransformerLayer)["forward"]) == before
    assert package.get_forward_backward_func is before[0]


@pytest.mark.megatron
def test_megatron_is_versioned_without_importing_it() -> None:
    pytest.importorskip("megatron.core")
    check = (
        "import sys; from megamem.patches.registry import installed_version; v = installed_version('megatron-core');"
        "assert 'megatron.core' not in sys.modules and 'torch' not in sys.modules; print(v)"
    )
    found = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout.strip()
    assert found == installed_version("megatron-core")
