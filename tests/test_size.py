"""The size budget holds, and the check notices when it does not."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_size", ROOT / "ci" / "size.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_everything_is_within_the_size_budget() -> None:
    assert load().find_excesses() == []


def test_an_excess_and_a_useless_waiver_are_noticed(tmp_path: Path) -> None:
    size = load()
    (tmp_path / "megamem").mkdir()
    body = "        x = 1\n" * 61
    text = f'class A:\n    def f(self):\n        """Doc.\n\n        More.\n        """\n\n{body}'
    (tmp_path / "megamem" / "long.py").write_text(text, encoding="utf-8")
    (tmp_path / "megamem" / "file.py").write_text("x = 1\n" * 501, encoding="utf-8")
    assert size.find_excesses(tmp_path, {}) == [
        "megamem/file.py: 501 lines, 500 allowed",
        "megamem/long.py:A.f: 61 lines, 60 allowed",
    ]
    waivers = {"megamem/file.py": "r", "megamem/long.py:A.f": "r", "megamem/gone.py": "r"}
    assert size.find_excesses(tmp_path, waivers) == [
        "megamem/gone.py: waived, but within the budget; remove the waiver"
    ]
