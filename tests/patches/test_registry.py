"""The patch registry, on toy modules: everything is checked before anything is written, and undone exactly."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megamem.errors import PatchError
from megamem.patches.registry import (
    Patch,
    apply,
    inspect_patch,
    installed_version,
    ledger,
    source_sha,
    undeclared_bindings,
)

UPSTREAM = """
def loss(x):
    return x + 1

class Base:
    def inherited(self):
        return "base"

class Layer(Base):
    def forward(self, x):
        return x

    @staticmethod
    def static(x):
        return x

    @classmethod
    def make(cls):
        return cls.__name__

CONSTANT = 3
"""
CALLER = "from toy_upstream import loss\n\ndef train(x):\n    return loss(x)\n"


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package to patch (`toy_upstream`) and one that copied a function of it (`toy_caller`, not imported yet)."""
    (tmp_path / "toy_upstream.py").write_text(UPSTREAM, encoding="utf-8")
    (tmp_path / "toy_caller.py").write_text(CALLER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("toy_upstream")
    for name in ("toy_upstream", "toy_caller", "toy_late"):
        sys.modules.pop(name, None)


def negated(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(*args: Any) -> Any:
        return ("patched", original(*args))

    return replacement


def record(target: str, **fields: Any) -> Patch:
    defaults: dict[str, Any] = {
        "build": negated,
        "why": "upstream has no seam",
        "supports": "packaging>=1",
        "remove_when": "upstream has one",
    }
    return Patch(target=f"toy_upstream:{target}", **(defaults | fields))


@pytest.mark.parametrize("path", ["loss", "Layer.forward", "Layer.static", "Layer.make", "Layer.inherited"])
def test_applies_and_restores_the_identical_object(toys: Any, path: str) -> None:
    owner = toys.Layer if path.startswith("Layer.") else toys
    name = path.rpartition(".")[2]
    before = dict(vars(owner))
    with apply([record(path)]) as applied:
        assert [patch.target for patch in applied] == [f"toy_upstream:{path}"]
        assert vars(owner)[name] is not before.get(name)
        layer = toys.Layer()
        calls = {
            "loss": lambda: toys.loss(1),
            "forward": lambda: layer.forward(2),
            "static": lambda: toys.Layer.static(2),
            "make": lambda: toys.Layer.make(),
            "inherited": lambda: layer.inherited(),
        }
        assert calls[name]() == ("patched", {"make": "Layer", "inherited": "base"}.get(name, 2))
        assert toys.Base().inherited() == "base"
    after = dict(vars(owner))
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


def test_can_be_applied_again_after_it_was_undone(toys: Any) -> None:
    for _ in range(2):
        with apply([record("loss"), record("Layer.forward")]):
            assert toys.loss(1) == ("patched", 2)
        assert toys.loss(1) == 2


def test_a_wrong_version_touches_nothing_and_names_both(toys: Any) -> None:
    before = toys.Layer.forward
    with pytest.raises(PatchError, match=r"toy_upstream:loss: written for packaging<1, found 2\d"):
        apply([record("Layer.forward"), record("loss", supports="packaging<1")])
    assert toys.Layer.forward is before


def test_the_version_is_checked_before_the_module_is_imported() -> None:
    for requirement, reason in (("packaging<1", "written for"), ("no-such-distribution", "is not installed")):
        patch = record("loss", supports=requirement)
        with pytest.raises(PatchError, match=reason):
            apply([patch])
    assert "toy_upstream" not in sys.modules


def test_all_faults_are_named_together(toys: Any) -> None:
    with pytest.raises(PatchError) as caught:
        apply([record("gone"), record("loss", source_sha=frozenset({"0"}))])
    assert "toy_upstream:gone: is gone" in str(caught.value)
    assert "toy_upstream:loss: upstream changed its source" in str(caught.value)


def test_a_failing_build_leaves_nothing_patched(toys: Any) -> None:
    def broken(original: Any) -> Any:
        raise RuntimeError("no kernel for this device")

    before = toys.loss
    with pytest.raises(RuntimeError, match="no kernel"):
        apply([record("loss"), record("Layer.forward", build=broken)])
    assert toys.loss is before
    assert not hasattr(before, "__megamem_patch__")


def test_a_failing_write_rolls_back(toys: Any) -> None:
    builtin = Patch(
        target="builtins:int.bit_length",
        build=negated,
        why="cannot be set",
        supports="packaging>=1",
        remove_when="never",
    )
    before = toys.loss
    with pytest.raises(PatchError, match=r"builtins:int.bit_length: cannot be replaced"):
        apply([record("loss"), builtin])
    assert toys.loss is before
    assert toys.loss(1) == 2


@pytest.mark.parametrize("build", [lambda original: original, lambda original: 3])
def test_build_must_make_something_new(toys: Any, build: Callable[[Any], Any]) -> None:
    with pytest.raises(PatchError, match="must return a new function or class"):
        apply([record("loss", build=build)])
    with apply([record("loss")]):
        pass


def test_a_changed_source_is_refused_and_a_known_one_is_not(toys: Any) -> None:
    known = source_sha(toys.loss)
    with apply([record("loss", source_sha=frozenset({known, "another"}))]):
        assert toys.loss(1) == ("patched", 2)
    with pytest.raises(PatchError, match=rf"now {known}, known another"):
        apply([record("loss", source_sha=frozenset({"another"}))])


def test_two_patches_of_one_binding_conflict(toys: Any) -> None:
    with pytest.raises(PatchError, match="patched twice: 'upstream has no seam' and 'the other'"):
        apply([record("loss"), record("loss", why="the other")])


def test_a_second_apply_is_an_error_not_a_second_wrapper(toys: Any) -> None:
    with apply([record("loss")]):
        with pytest.raises(PatchError, match="already patched"):
            apply([record("loss")])
        assert inspect_patch(record("loss")).state == "applied"
        assert toys.loss(1) == ("patched", 2)
    assert toys.loss(1) == 2


def test_a_copy_made_before_is_found_and_refused(toys: Any) -> None:
    caller = importlib.import_module("toy_caller")
    assert undeclared_bindings(record("loss")) == ["toy_caller:loss"]
    with pytest.raises(PatchError, match=r"toy_caller:loss; call megamem.enable before"):
        apply([record("loss")])
    assert caller.train(1) == 2
    assert inspect_patch(record("loss")).state == "undeclared copies"


def test_a_declared_copy_is_patched_and_restored(toys: Any) -> None:
    caller = importlib.import_module("toy_caller")
    before = caller.loss
    with apply([record("loss", also=("toy_caller:loss",))]):
        assert caller.train(1) == ("patched", 2)
        assert caller.loss is toys.loss
    assert caller.loss is before
    assert toys.loss is before


def test_a_copy_declared_where_loaded_is_patched_and_restored(toys: Any) -> None:
    patch = record("loss", where_loaded=("toy_caller:loss", "toy_caller:of_another_release", "toy_gone:loss"))
    assert inspect_patch(patch).detail == "1 binding" and "toy_caller" not in sys.modules, "nothing is imported for it"
    caller = importlib.import_module("toy_caller")
    before = caller.loss
    assert undeclared_bindings(patch) == [] and inspect_patch(patch).detail == "2 bindings"
    with apply([patch]):
        assert caller.train(1) == ("patched", 2)
        assert caller.loss is toys.loss
    assert caller.loss is before
    assert toys.loss is before


def test_what_is_no_copy_where_loaded_is_left_alone(toys: Any) -> None:
    caller = importlib.import_module("toy_caller")
    theirs = caller.loss = lambda x: "theirs"  # type: ignore[attr-defined]
    with apply([record("loss", where_loaded=("toy_caller:loss",))]):
        assert caller.train(1) == "theirs" and toys.loss(1) == ("patched", 2)
    assert caller.loss is theirs


def test_a_copy_made_while_the_patch_was_live_is_restored_too(toys: Any) -> None:
    with apply([record("loss")]):
        caller = importlib.import_module("toy_caller")
        assert caller.train(1) == ("patched", 2)
    assert caller.train(1) == 2
    assert caller.loss is toys.loss


def test_the_home_of_a_replacement_is_left_alone(toys: Any) -> None:
    """A build may return a function that lives in a module; undoing must not write the original over that."""
    home = ModuleType("toy_late")
    home.replacement = lambda x: "mine"  # type: ignore[attr-defined]
    sys.modules["toy_late"] = home
    kept = home.replacement
    with apply([record("loss", build=lambda original: kept)]):
        assert toys.loss(1) == "mine"
    assert home.replacement is kept
    assert not hasattr(kept, "__megamem_patch__")


def test_copies_that_no_longer_are_copies_are_refused(toys: Any) -> None:
    importlib.import_module("toy_caller").loss = lambda x: 0  # type: ignore[attr-defined]
    with pytest.raises(PatchError, match="no longer name the same object"):
        apply([record("loss", also=("toy_caller:loss",))])


def test_undo_refuses_to_clobber_and_can_be_tried_again(toys: Any) -> None:
    applied = apply([record("loss"), record("Layer.forward")])
    ours = toys.loss
    toys.loss = negated(ours)
    with pytest.raises(PatchError, match="replaced by someone else"):
        applied.revert()
    assert toys.Layer().forward(1) == ("patched", 1), "all or nothing: the rest is still live"
    toys.loss = ours
    applied.revert()
    assert toys.loss(1) == 2
    applied.revert()  # nothing is left to do


def test_undo_happens_when_the_block_raises(toys: Any) -> None:
    with pytest.raises(KeyError), apply([record("loss")]):
        raise KeyError
    assert toys.loss(1) == 2


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"target": "toy_upstream:loss"}, "applicable"),
        ({"target": "toy_upstream:Layer.gone"}, "moved"),
        ({"target": "toy_upstream:Gone.forward"}, "moved"),
        ({"target": "toy_upstream.sub:loss"}, "moved"),
        ({"target": "toy_gone:loss"}, "moved"),
        ({"target": "toy_upstream:loss", "also": ("toy_gone:loss",)}, "moved"),
        ({"target": "toy_upstream:loss", "supports": "packaging<1"}, "wrong version"),
        ({"target": "toy_upstream:loss", "supports": "no-such-distribution"}, "not installed"),
        ({"target": "toy_upstream:loss", "source_sha": frozenset({"0"})}, "source changed"),
        ({"target": "toy_needs:loss"}, "not installed"),
        ({"target": "toy_broken:loss"}, "import fails"),
    ],
)
def test_inspection_tells_the_state_and_changes_nothing(
    toys: Any, tmp_path: Path, fields: dict[str, Any], state: str
) -> None:
    (tmp_path / "toy_needs.py").write_text("import no_such_dependency\n", encoding="utf-8")
    (tmp_path / "toy_broken.py").write_text("raise AttributeError('half ported')\n", encoding="utf-8")
    before = dict(vars(toys))
    defaults: dict[str, Any] = {"build": negated, "why": "w", "supports": "packaging", "remove_when": "r"}
    found = inspect_patch(Patch(**(defaults | fields)))
    assert found.state == state, found.detail
    assert found.detail
    assert vars(toys) == before


def test_a_checkout_without_metadata_is_versioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one with the metadata of another release below it has its own version, not that one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "package_info.py").write_text("__version__ = '0.19.2+fork'\n", encoding="utf-8")
    (folder / "__init__.py").write_text("raise ImportError('must not be imported to be versioned')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("megamem.patches.registry._VERSION_FILES", {"packaging": ("checkout", "package_info.py")})
    assert installed_version("packaging") == "0.19.2+fork"
    assert "checkout" not in sys.modules


def test_the_ledger_holds_every_field() -> None:
    patch = record("loss", also=("toy_caller:loss",), where_loaded=("toy_late:loss",), source_sha=frozenset({"b", "a"}))
    text = ledger({"activations": [patch], "schedule": []})
    for part in (patch.target, "toy_caller:loss", patch.why, patch.supports, "`a`, `b`", patch.remove_when):
        assert part in text
    assert "\n* also, where loaded: `toy_late:loss`\n" in text
    assert "## schedule\n\nNo patch" in text


def test_context_reaches_the_build_and_two_contexts_are_two_patches(toys: Any) -> None:
    def counted(calls: list[int], original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(x: int) -> Any:
            calls.append(x)
            return original(x)

        return replacement

    calls: list[int] = []
    with apply([record("loss", build=counted).bound(calls)]):
        assert toys.loss(1) == 2
    assert calls == [1]
    with pytest.raises(PatchError, match="patched twice"):
        apply([record("loss", build=counted).bound([]), record("loss", build=counted).bound([])])
