"""Reversible patches of third-party code: declared once, checked first, undone last-in first-out.

A `Patch` is data. Nothing in another package changes until `apply` has checked every patch of the set; the returned
`Applied` restores each touched attribute exactly, as pytest's `MonkeyPatch` does: the raw `__dict__` entry is put back,
and an inherited attribute is deleted again.

The trap that a plain `setattr` falls into is `from module import function`: every module that imported the function
before keeps the old one, and the patch silently does nothing there. So a patch declares all `bindings` of its target,
and `apply` refuses where a loaded module holds a copy that is not declared. What it cannot see: copies inside
closures, containers and class attributes.

Importing this module needs none of the packages that are patched.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from packaging.requirements import Requirement

from megamem.errors import PatchError

State = Literal[
    "applicable",
    "applied",
    "not installed",
    "import fails",
    "wrong version",
    "moved",
    "source changed",
    "undeclared copies",
]

# Where the code that would be imported states its version. It counts more than the metadata: people run checkouts on
# PYTHONPATH, with no metadata at all or with that of another release installed below.
_VERSION_FILES = {
    "megatron-core": ("megatron.core", "package_info.py"),
    "megatron-bridge": ("megatron.bridge", "package_info.py"),
}
_ABSENT: Any = object()  # the attribute was inherited: undo by deleting, not by assigning
_MARK = "__megamem_patch__"  # on every live replacement, so that a second apply() is an error, not a second wrapper


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced attribute of one third-party module or class.

    target:       `package.module:Qual.name` of the binding that callers read.
    build:        called with the original, returns its replacement (wraps or ignores it); at most 15 lines. What it
                  needs besides, an integration gives it with `bound`, so that no patch keeps state in a module.
    why:          the missing seam, in one sentence.
    supports:     PEP 508 requirement of the patched distribution.
    remove_when:  the upstream change that makes this patch unnecessary.
    source_sha:   first 12 hex digits of the sha256 of the original's source, one per known variant; empty when the
                  body does not matter (pure wrappers).
    also:         further bindings of the same object (`from module import function` copies).
    where_loaded: such copies in modules that are not imported for it (a trainer's), and that not every release has;
                  replaced where the module is loaded and the name is the original.
    """

    target: str
    build: Callable[..., Any]
    why: str
    supports: str
    remove_when: str
    source_sha: frozenset[str] = frozenset()
    also: tuple[str, ...] = ()
    where_loaded: tuple[str, ...] = ()

    def bound(self, *context: object) -> Patch:
        """The same patch, whose `build` is called with `context` before the original."""
        return replace(self, build=partial(self.build, *context))

    @property
    def module(self) -> str:
        """The module that the target is in."""
        return self.target.partition(":")[0]

    @property
    def bindings(self) -> tuple[str, ...]:
        """All names that are always replaced."""
        return (self.target, *self.also)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What would happen if a patch were applied now."""

    patch: Patch
    state: State
    detail: str = ""


class _Refused(PatchError):  # noqa: N818 - a PatchError that knows which of the states it stands for
    def __init__(self, state: State, message: str) -> None:
        self.state: State = state
        super().__init__(message)


@dataclass(frozen=True)
class _Slot:
    """Where one binding lives, and what was there."""

    patch: Patch
    owner: Any
    name: str
    before: Any  # raw `__dict__` entry, or _ABSENT


@dataclass
class Applied:
    """The live set. `revert()`, or leaving the `with` block, restores every binding."""

    _done: list[tuple[_Slot, Any]] = field(default_factory=list)
    _known: set[tuple[str, str]] = field(default_factory=set)  # where the replacements themselves live

    def revert(self) -> None:
        """Restore every binding, last in first out, and the copies that modules took while the patch was live.

        Raises PatchError, and stops, where somebody else has replaced the binding since; undo theirs and call again.
        """
        for slot, ours in reversed(self._done):
            if vars(slot.owner).get(slot.name) is not ours:
                raise PatchError(
                    f"{slot.patch.target}: replaced by someone else since it was patched; undo theirs first"
                )
        news = {id(_plain(ours)): (_plain(ours), slot) for slot, ours in self._done}
        while self._done:
            slot, ours = self._done.pop()
            if slot.before is _ABSENT:
                delattr(slot.owner, slot.name)
            else:
                setattr(slot.owner, slot.name, slot.before)
            if _MARK in getattr(_plain(ours), "__dict__", {}):
                delattr(_plain(ours), _MARK)
        self._restore_late_copies(news)

    def _restore_late_copies(self, news: Mapping[int, tuple[Any, _Slot]]) -> None:
        """A module imported while the patch was live did `from x import y`, and must not keep the replacement."""
        for module, name, value in _module_globals():
            held, slot = news.get(id(value), (None, None))
            if slot is not None and held is value and (module.__name__, name) not in self._known:
                setattr(module, name, _bound(slot))

    def __iter__(self) -> Iterator[Patch]:
        return iter(dict.fromkeys(slot.patch for slot, _ in self._done))

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.revert()


def apply(patches: Iterable[Patch]) -> Applied:
    """Check all patches, build all replacements, then write all bindings; on any failure nothing stays patched.

    Raises PatchError with everything that is wrong.
    """
    wanted = tuple(patches)
    slots = _checked_all(wanted)
    news = {patch: _built(patch, next(slot for slot in slots if slot.patch is patch)) for patch in wanted}
    ids = {id(new) for new in news.values()}
    applied = Applied(_known={(module.__name__, name) for module, name, value in _module_globals() if id(value) in ids})
    try:
        for slot in slots:
            ours = _rewrap(slot.before, news[slot.patch])
            setattr(slot.owner, slot.name, ours)
            applied._done.append((slot, ours))
            setattr(news[slot.patch], _MARK, slot.patch.target)
    except BaseException as fault:
        applied.revert()
        if isinstance(fault, (AttributeError, TypeError)):
            raise PatchError(f"{slot.patch.target}: cannot be replaced: {fault}") from fault
        raise
    return applied


def inspect_patch(patch: Patch) -> Inspection:
    """Whether a patch would apply to what is installed; imports the patched module, changes nothing."""
    try:
        slots = _checked(patch)
    except _Refused as refused:
        return Inspection(patch=patch, state=refused.state, detail=str(refused))
    copies = undeclared_bindings(patch)
    if copies:
        return Inspection(patch=patch, state="undeclared copies", detail=_copies_message(patch, copies))
    return Inspection(patch=patch, state="applicable", detail=f"{len(slots)} binding{'s' * (len(slots) > 1)}")


def undeclared_bindings(patch: Patch) -> list[str]:
    """Module-level names that hold their own copy of the original; each must be listed in `also`."""
    return _undeclared([patch])[patch]


def _undeclared(patches: Iterable[Patch]) -> dict[Patch, list[str]]:
    """`undeclared_bindings` of several patches, in one sweep: a process with Megatron has 150,000 names to look at."""
    copies: dict[Patch, list[str]] = {}
    owners: dict[int, tuple[Patch, set[tuple[str, str]]]] = {}
    for patch in patches:
        slots = _located(patch)
        copies[patch] = []
        owners[id(_bound(slots[0]))] = patch, {(slot.owner.__name__, slot.name) for slot in slots}
    for module, name, value in _module_globals():
        owner = owners.get(id(value))
        if owner is not None and (module.__name__, name) not in owner[1]:
            copies[owner[0]].append(f"{module.__name__}:{name}")
    return {patch: sorted(names) for patch, names in copies.items()}


def source_sha(original: Any) -> str:
    """Fingerprint of an object's source, for `Patch.source_sha`."""
    return hashlib.sha256(inspect.getsource(inspect.unwrap(original)).encode()).hexdigest()[:12]


def installed_version(distribution: str) -> str:
    """The version of the code that `import` would find. Raises PackageNotFoundError."""
    package, file = _VERSION_FILES.get(distribution, ("", ""))
    try:
        spec = importlib.util.find_spec(package) if package else None
    except ModuleNotFoundError:
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / file).is_file():  # run alone: importing megatron.core would pull in torch
            return str(runpy.run_path(str(path))["__version__"])
    return version(distribution)


def ledger(groups: Mapping[str, Iterable[Patch]]) -> str:
    """All patches as the Markdown page `patches/README.md`."""
    lines = [
        "# What megamem replaces in other packages",
        "",
        "Generated by `megamem doctor --markdown > patches/README.md` from the records in this folder; a test fails",
        "when it is stale. Nothing is patched at import: `megamem.enable` checks all records of a capability, then",
        "applies them, and its handle restores every one exactly. `megamem doctor` says which fit what is installed.",
    ]
    for capability, patches in groups.items():
        lines += ["", f"## {capability}"]
        records = tuple(patches)
        if not records:
            lines += ["", "No patch: the seams that upstream offers are enough."]
        for patch in records:
            known = ", ".join(f"`{sha}`" for sha in sorted(patch.source_sha)) or "any (a pure wrapper)"
            further = {"also": patch.also, "also, where loaded": patch.where_loaded}
            also = [f"* {what}: {', '.join(f'`{name}`' for name in names)}" for what, names in further.items() if names]
            lines += ["", f"### `{patch.target}`", "", f"* why: {patch.why}", f"* supports: `{patch.supports}`"]
            lines += [*also, f"* source: {known}", f"* remove when: {patch.remove_when}"]
    return "\n".join(lines) + "\n"


def _checked_all(patches: tuple[Patch, ...]) -> list[_Slot]:
    slots: list[_Slot] = []
    problems: list[str] = []
    for patch in patches:
        try:
            slots += _checked(patch)
        except PatchError as fault:
            problems.append(str(fault))
    found = _undeclared(dict.fromkeys(slot.patch for slot in slots))
    problems += [_copies_message(patch, copies) for patch, copies in found.items() if copies]
    problems += _conflicts(slots)
    if problems:
        raise PatchError("\n".join(problems))
    return slots


def _checked(patch: Patch) -> list[_Slot]:
    need = Requirement(patch.supports)
    try:
        have = installed_version(need.name)
    except PackageNotFoundError:
        raise _Refused("not installed", f"{patch.target}: needs {need}, which is not installed") from None
    if not need.specifier.contains(have, prereleases=True):
        raise _Refused("wrong version", f"{patch.target}: written for {need}, found {have}; install one that fits")
    slots = _located(patch)
    originals = [_bound(slot) for slot in slots]
    if any(other is not originals[0] for other in originals):
        raise _Refused("moved", f"{patch.target}: {', '.join(patch.also)} no longer name the same object")
    if hasattr(originals[0], _MARK):
        raise _Refused("applied", f"{patch.target}: already patched; disable the live set before enabling another")
    if patch.source_sha and (sha := source_sha(originals[0])) not in patch.source_sha:
        raise _Refused(
            "source changed",
            f"{patch.target}: upstream changed its source (now {sha}, known {', '.join(sorted(patch.source_sha))}); "
            "review the patch against it, then add the fingerprint",
        )
    return slots


def _located(patch: Patch) -> list[_Slot]:
    """The target first. What is in `where_loaded` only as far as it is there: of another release, it may not be."""
    slots = [_locate(patch, binding) for binding in patch.bindings]
    for binding in patch.where_loaded:
        module, _, name = binding.partition(":")
        if getattr(sys.modules.get(module), "__dict__", {}).get(name) is _bound(slots[0]):
            slots.append(_locate(patch, binding))
    return slots


def _locate(patch: Patch, binding: str) -> _Slot:
    module, _, path = binding.partition(":")
    *parents, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError as fault:
        if fault.name is not None and (module == fault.name or module.startswith(f"{fault.name}.")):
            raise _moved(patch, binding) from fault
        raise _Refused("not installed", f"{binding}: importing {module} needs {fault.name}, which is missing") from None
    except Exception as fault:  # third-party code runs here; whatever it raises, the patch cannot be applied
        raise _Refused("import fails", f"{binding}: importing {module} fails: {fault!r}") from fault
    try:
        for parent in parents:
            owner = getattr(owner, parent)
        inspect.getattr_static(owner, name)
    except AttributeError as fault:
        raise _moved(patch, binding) from fault
    return _Slot(patch, owner, name, vars(owner).get(name, _ABSENT))


def _moved(patch: Patch, binding: str) -> _Refused:
    return _Refused("moved", f"{binding}: is gone, upstream moved it; needed because: {patch.why}")


def _built(patch: Patch, slot: _Slot) -> Any:
    original = _bound(slot)
    new = patch.build(original)
    if new is original or not hasattr(new, "__dict__"):
        raise PatchError(f"{patch.target}: build must return a new function or class, not {new!r}")
    return new


def _bound(slot: _Slot) -> Any:
    """The plain function or object behind a slot, without its staticmethod or classmethod wrapper."""
    return _plain(inspect.getattr_static(slot.owner, slot.name))


def _plain(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw


def _rewrap(before: Any, new: Any) -> Any:
    return type(before)(new) if isinstance(before, (staticmethod, classmethod)) else new


def _conflicts(slots: list[_Slot]) -> list[str]:
    owners: dict[tuple[int, str], Patch] = {}
    problems = []
    for slot in slots:
        other = owners.setdefault((id(slot.owner), slot.name), slot.patch)
        if other is not slot.patch:
            problems.append(f"{slot.patch.target} is patched twice: {other.why!r} and {slot.patch.why!r}")
    return problems


def _copies_message(patch: Patch, copies: list[str]) -> str:
    return (
        f"{patch.target}: copied by `from ... import` before megamem was enabled, and a copy cannot be patched: "
        f"{', '.join(copies)}; call megamem.enable before these imports, or declare the copies in Patch.where_loaded"
    )


def _module_globals() -> Iterator[tuple[Any, str, Any]]:
    """Every module-level name: (module, name, value). Reads `__dict__` only, so that no lazy module is woken."""
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__name__", None), str):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                yield module, name, value
