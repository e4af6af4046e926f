"""Who may import whom. The rooms of megamem (design, section 2), read from the source by `ast`.

    cli, doctor, simulate ---> config ---> ir <--- runtime ---> kernels
                                 ^         ^          ^
        planner, report ---------+---------+       patches
                                                      ^
                              integrations -----------+---> everything

An import inside a function, or for type checking only, obeys the same arrows between rooms; what it may do is name a
heavy package (torch, Megatron) in a module that must start without it.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Single modules that every room may use: what the user asked for, and what goes wrong.
CONFIG = {"config", "sections", "deciding", "options", "table", "yamlfile", "host", "planfile", "flags"}
LEAVES = {"errors", *CONFIG}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "ir": {"errors"},
    **{module: LEAVES | {"ir"} for module in CONFIG},
    "native": {"errors"},
    "planner": LEAVES | {"ir", "native"},
    "profiler": LEAVES | {"ir"},
    "kernels": set(),
    "runtime": {"errors", "ir", "kernels", "native"},  # native: the arena's core
    "patches": {"errors", "runtime"},
    "report": LEAVES | {"ir"},
    "testing": LEAVES | {"ir", "runtime", "patches", "integrations"},  # a rig around everything; nothing imports it
    "integrations": LEAVES
    | {"__init__", "ir", "native", "planner", "profiler", "kernels", "runtime", "patches", "report"},
    "doctor": LEAVES | {"__init__", "native", "patches", "integrations"},
    "simulate": LEAVES | {"ir", "planner", "report"},
    "solve": LEAVES | {"ir", "planner", "report"},
    "profile": LEAVES | {"ir", "profiler", "integrations", "testing", "profile_script"},  # testing: the rig
    "profile_script": LEAVES | {"ir", "integrations", "run"},
    "plan": LEAVES | {"ir", "planner", "report", "plan_text", "plan_profile", "plan_ways"},
    "plan_profile": LEAVES | {"ir", "planner"},
    "plan_text": LEAVES | {"ir"},
    "plan_ways": LEAVES | {"planner"},
    "plan_report": LEAVES | {"ir", "planner", "profiler", "report"},
    "run": LEAVES | {"integrations", "testing"},  # testing: the rig, for --cpu
    "cli": LEAVES
    | {"__init__", "ir", "planner", "profiler", "report", "integrations"}
    | {"doctor", "simulate", "solve", "profile", "plan", "plan_report", "run"},
    "__main__": {"cli"},
    "__init__": LEAVES | {"integrations", "runtime"},  # runtime: the type of one argument of `enable`
}

HEAVY = {"torch", "megatron", "transformer_engine", "triton", "apex", "numpy"}
TRAINERS = {"megatron", "nemo"}
TORCH_FREE = {"ir", "planner", "native", "errors", *CONFIG}  # not even inside a function
# Heavy packages inside functions only.
STARTS_FAST = {
    *TORCH_FREE,
    "patches",
    "report",
    "doctor",
    "simulate",
    "solve",
    "profile",
    "profile_script",
    "plan",
    "plan_profile",
    "plan_report",
    "plan_text",
    "plan_ways",
    "run",
    "cli",
    "__main__",
    "__init__",
}
LIGHT = {"yaml", "packaging"}  # the base dependencies of setup.py


@dataclass(frozen=True)
class Import:
    """One import statement: by which room, of what, and whether it runs when the module is imported."""

    file: str
    line: int
    room: str
    name: str  # dotted name of what is imported
    runs_at_import: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.room} imports {self.name}"

    @property
    def target_room(self) -> str | None:
        """The room of megamem that is imported, if it is one."""
        package, _, rest = self.name.partition(".")
        return (rest.partition(".")[0] or "__init__") if package == "megamem" else None


def room_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    inner = parts[1:] if parts[0] == "megamem" else parts
    return inner[0].removesuffix(".py")


def imports_of(source: str, file: str, room: str, package: str = "megamem") -> Iterator[Import]:
    """Every import in a module; `package` is the one that holds it, for relative imports."""

    def walk(node: ast.AST, runs: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = runs and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = False
            if isinstance(child, ast.Import):
                yield from (Import(file, child.lineno, room, alias.name, runs) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    up = package.split(".")
                    base = ".".join([*up[: len(up) - child.level + 1], base]).rstrip(".")
                for alias in child.names:
                    # `from megamem import planner` names a room; `from megamem import Config` names the door.
                    is_room = base == "megamem" and alias.name in ALLOWED
                    yield Import(file, child.lineno, room, f"{base}.{alias.name}" if is_room else base, runs)
            yield from walk(child, inner)

    yield from walk(ast.parse(source), True)


def all_imports(root: Path = ROOT) -> list[Import]:
    found: list[Import] = []
    for folder in ("megamem", "kernels", "patches"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).parent.parts
            package = ".".join(parts if parts[0] == "megamem" else ("megamem", *parts))
            file = path.relative_to(root).as_posix()
            found += imports_of(path.read_text(encoding="utf-8"), file, room_of(path, root), package)
    return found


def violations(imports: list[Import]) -> list[str]:
    wrong = []
    for item in imports:
        top = item.name.partition(".")[0]
        target = item.target_room
        if target is not None and target != item.room and target not in ALLOWED[item.room]:
            wrong.append(f"{item}: this arrow does not exist")
        elif top in HEAVY and item.room in TORCH_FREE:
            wrong.append(f"{item}: this room never needs it")
        elif top in HEAVY and item.room in STARTS_FAST and item.runs_at_import:
            wrong.append(f"{item}: import it inside the function that needs it")
        elif top in TRAINERS and item.room in ("runtime", "kernels", "profiler"):
            wrong.append(f"{item}: only integrations and patches know a trainer")
        elif item.room == "kernels" and top not in {"torch", "triton", "megamem", *sys.stdlib_module_names}:
            wrong.append(f"{item}: kernels need torch and triton only")
        elif item.room in STARTS_FAST and item.runs_at_import and not _is_light(top):
            wrong.append(f"{item}: not a base dependency of setup.py")
    return wrong


def _is_light(top: str) -> bool:
    return top in LIGHT or top == "megamem" or top in sys.stdlib_module_names


def test_every_room_keeps_to_its_arrows() -> None:
    assert violations(all_imports()) == []


def test_every_module_belongs_to_a_room() -> None:
    assert {item.room for item in all_imports()} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ir", "import torch"),
        ("ir", "def f():\n    import torch.nn"),
        ("ir", "from megamem.config import Config"),
        ("planner", "from megamem.runtime.activations import layer"),
        ("planner", "from ..runtime import activations"),
        ("runtime", "from megamem import planner"),
        ("runtime", "def f():\n    from megamem.planner import costs"),
        ("runtime", "import megatron.core"),
        ("kernels", "from megamem.errors import MegamemError"),
        ("kernels", "import numpy"),
        ("patches", "import torch"),
        ("patches", "from megatron.core import tensor_parallel"),
        ("cli", "import torch"),
        ("cli", "import tqdm"),
        ("errors", "from megamem import Config"),
    ],
)
def test_a_wrong_import_is_noticed(room: str, source: str) -> None:
    assert len(violations(list(imports_of(source, "f.py", room, f"megamem.{room}")))) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("patches", "def f(original):\n    from megatron.core import x\n    from megamem.runtime import y"),
        ("__init__", "if TYPE_CHECKING:\n    import torch"),
        ("runtime", "import torch\nfrom megamem.kernels import x\nfrom .activations import y"),
        ("planner", "import math\nfrom megamem.ir import activation\nfrom . import costs"),
        ("integrations", "import megatron.core\nfrom megamem import runtime, planner"),
    ],
)
def test_a_right_import_is_let_through(room: str, source: str) -> None:
    assert violations(list(imports_of(source, "f.py", room, f"megamem.{room}"))) == []


LOADED = "import sys, importlib; importlib.import_module({module!r}); sys.exit(3 * bool({heavy!r} & set(sys.modules)))"


def loads_heavy(module: str, path: str = "") -> bool:
    """Whether a fresh interpreter that imports `module` ends up with a heavy package."""
    code = LOADED.format(module=module, heavy=HEAVY)
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    status = subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode
    assert status in (0, 3)
    return status == 3


@pytest.mark.parametrize(
    "module",
    ["megamem", "megamem.ir.activation", "megamem.planner", "megamem.simulate", "megamem.cli", "megamem.patches"],
)
def test_the_pure_rooms_load_no_torch(module: str) -> None:
    assert not loads_heavy(module)


def test_the_test_for_loading_torch_can_fail(tmp_path: Path) -> None:
    """A stand-in for torch, imported by a module as a careless edit would, trips the check above."""
    (tmp_path / "torch.py").write_text("", encoding="utf-8")
    (tmp_path / "careless.py").write_text("import torch\n", encoding="utf-8")
    (tmp_path / "careful.py").write_text("def f():\n    import torch\n", encoding="utf-8")
    assert loads_heavy("careless", str(tmp_path))
    assert not loads_heavy("careful", str(tmp_path))


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by name, from folders that are no packages; the second one would stop the whole run."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name != "conftest.py":
            places.setdefault(path.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
