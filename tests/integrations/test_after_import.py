"""Doing something to a module when it is imported: once, before its importer sees it, and leaving no trace."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamem.integrations.after_import import AfterImport

NAMES = ("waited_for", "waited_package", "waited_package.inner", "waited_user", "waited_broken")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "waited_for.py").write_text("VALUE = 1\ndef function():\n    return VALUE\n")
    (tmp_path / "waited_broken.py").write_text("raise RuntimeError('theirs')\n")
    (tmp_path / "waited_user.py").write_text("from waited_package.inner import VALUE\n")
    (tmp_path / "waited_package").mkdir()
    (tmp_path / "waited_package" / "__init__.py").write_text("from .inner import VALUE\n")
    (tmp_path / "waited_package" / "inner.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield
    assert sys.meta_path == before
    for name in NAMES:
        sys.modules.pop(name, None)


def set_value(name: str, value: int) -> None:
    sys.modules[name].VALUE = value  # type: ignore[attr-defined]


def test_importers_see_what_the_action_left() -> None:
    imports = AfterImport({"waited_package.inner": lambda: set_value("waited_package.inner", 2)})
    user = importlib.import_module("waited_user")
    imports.close()
    assert user.VALUE == sys.modules["waited_package"].VALUE == 2  # type: ignore[attr-defined]


def test_the_module_is_as_if_nobody_had_waited() -> None:
    imports = AfterImport({"waited_for": lambda: None})
    module = importlib.import_module("waited_for")
    imports.close()
    assert type(module.__loader__).__module__ == type(module.__spec__.loader).__module__ == "_frozen_importlib_external"
    assert "return VALUE" in inspect.getsource(module.function)


def test_a_module_that_is_there_already_is_not_waited_for() -> None:
    importlib.import_module("waited_for")
    calls: list[str] = []
    AfterImport({"waited_for": lambda: calls.append("now"), "waited_user": lambda: calls.append("never")}).close()
    importlib.import_module("waited_user")
    assert calls == ["now"]


def test_an_action_happens_once() -> None:
    calls: list[str] = []
    imports = AfterImport({"waited_for": lambda: calls.append("once")})
    importlib.import_module("waited_for")
    sys.modules.pop("waited_for")
    importlib.import_module("waited_for")
    imports.close()
    assert calls == ["once"]


def test_what_an_action_raises_comes_out_of_the_import() -> None:
    def fail() -> None:
        raise LookupError("ours")

    imports = AfterImport({"waited_for": fail})
    with pytest.raises(LookupError, match="ours"):
        importlib.import_module("waited_for")
    imports.close()


def test_a_module_that_fails_says_so_itself_and_an_absent_one_is_absent() -> None:
    calls: list[str] = []
    imports = AfterImport({"waited_broken": lambda: calls.append("x"), "waited_nowhere": lambda: calls.append("x")})
    with pytest.raises(RuntimeError, match="theirs"):
        importlib.import_module("waited_broken")
    with pytest.raises(ModuleNotFoundError, match="waited_nowhere"):
        importlib.import_module("waited_nowhere")
    imports.close()
    assert calls == []
