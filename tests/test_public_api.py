"""The public door: a dozen names at most, exactly those of `__all__`, and open in no time."""

import subprocess
import sys
import time
from importlib.metadata import version
from types import ModuleType

import megamem

EMPTY, IMPORT = "pass", "import megamem"


def seconds(code: str) -> float:
    """The best of five starts of a fresh interpreter; the best, because other work on the machine only adds."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        best = min(best, time.perf_counter() - start)
    return best


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


def test_importing_starts_fast() -> None:
    """0.2 s is promised for all of it; what the interpreter takes by itself is not ours."""
    assert seconds(IMPORT) - seconds(EMPTY) < 0.2


def test_enable_is_the_only_door_to_torch() -> None:
    code = (
        "import sys, megamem; megamem.load_config({'activations': {'policy': 'memo'}})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
