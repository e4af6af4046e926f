"""The public door: a dozen names at most, exactly those of `__all__`, and open in no time."""

import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

import megamem


def test_all_is_exactly_the_public_members() -> None:
    """Submodules aside, which become attributes when somebody imports them."""
    own = {"annotations", "Mapping", "Path", "TYPE_CHECKING"}  # what the door itself needs
    public = {
        name
        for name, value in vars(megamem).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name not in own
    }
    assert public | {"__version__"} == set(megamem.__all__)
    assert list(megamem.__all__) == sorted(megamem.__all__)
    assert len(megamem.__all__) <= 12


def test_the_version_is_that_of_the_package() -> None:
    assert megamem.__version__ == version("megamem")


def test_every_public_name_is_documented() -> None:
    for name in set(megamem.__all__) - {"__version__"}:
        assert getattr(megamem, name).__doc__, name


@pytest.mark.parametrize("module", ["megamem", "megamem.cli"])
def test_importing_stays_small(module: str) -> None:
    """0.2 s is promised. A clock in a test lies on a busy machine, so what is counted is what takes the time: modules.

    `import megamem` takes about 0.07 s for some 60 modules (twice as many where site loads none of them).
    """
    code = f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert len(loaded) < 160, sorted(loaded)
    slow_to_load = {
        "torch",
        "megatron",
        "numpy",
        "asyncio",
        "http",
        "importlib.metadata",
        "unittest",
        "multiprocessing",
    }
    assert not slow_to_load & set(loaded)


def test_enable_is_the_only_door_to_torch() -> None:
    code = (
        "import sys, megamem; megamem.load_config({'activations': {'policy': 'memo'}})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_enable_without_torch_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nimport megamem\n"
        "try:\n    megamem.enable({})\n"
        "except megamem.MegamemError as fault:\n    print(type(fault).__name__, fault)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == 'MissingPackage megamem.enable needs torch; pip install "megamem[train]"\n'
