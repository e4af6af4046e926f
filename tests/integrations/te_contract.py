"""What a source file takes from a package, held against the package's sources without importing them.

    uses = Uses.of(adapter_source, "transformer_engine")
    uses.complaints(Sources(folder))      # [] if every import, call and attribute is there

Looked at are: names that are imported; calls of them; attributes and methods of variables that are annotated with an
imported class (or a union of some); classes derived from one: what they override, what they call on `super()`.
`uses.unannotated` are attributes that are none of the file's own, of PyTorch's or of Python's, and were read from
something that is not annotated: they would escape.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """A definition, and the module it stands in."""

    module: str
    node: Definition


class Sources:
    """The Python files of an unpacked wheel."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cache  # noqa: B019 - one object per release, for the whole run
    def _tree(self, module: str) -> ast.Module | None:
        base = self._folder.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return ast.parse(path.read_text(encoding="utf-8"))
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self._folder.joinpath(*module.split("."), "__init__.py").is_file()
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def find(self, module: str, name: str) -> Found | None:
        """Where `from module import name` leads, through any number of re-exports; None where it fails."""
        tree = self._tree(module)
        if tree is None:
            return None
        for node in _statements(tree.body):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
                return Found(module, node)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" and (found := self.find(self._absolute(module, node), name)):
                        return found
                    if (alias.asname or alias.name) == name:
                        return self.find(self._absolute(module, node), alias.name)
        return None

    def attributes(self, found: Found) -> set[str]:
        """Everything that an instance of a class may have: of the class, of its bases, set on `self`."""
        assert isinstance(found.node, ast.ClassDef)
        names = set()
        for node in ast.walk(found.node):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                names |= _targets(node)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.fast_setattr", "setattr"):
                names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
        for base in self._bases(found):
            names |= self.attributes(base) if isinstance(base, Found) else set(dir(base))
        return names

    def method(self, found: Found, name: str) -> Function | None:
        """The definition of a method, of the class or of a base."""
        assert isinstance(found.node, ast.ClassDef)
        for node in found.node.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return node
        for base in self._bases(found):
            if isinstance(base, Found) and (inherited := self.method(base, name)) is not None:
                return inherited
        return None

    def _bases(self, found: Found) -> Iterator[Any]:
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            text = ast.unparse(base)
            if text.endswith("nn.Module"):
                yield torch.nn.Module()
            elif text == "torch.Tensor":
                yield torch.Tensor
            elif inner := self.find(found.module, text):
                yield inner


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those inside `if`, `try` and `with` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = set()
    for target in targets:
        for item in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(item, ast.Name):
                names.add(item.id)
            elif isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name) and item.value.id == "self":
                names.add(item.attr)
    return names


@dataclass(frozen=True)
class Call:
    """A call: how many positional arguments, which keywords, and whether any are unpacked from something."""

    positional: int
    keywords: tuple[str, ...]
    is_open: bool
    text: str

    @classmethod
    def of(cls, node: ast.Call) -> Call:
        plain = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
        names = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
        is_open = len(plain) < len(node.args) or len(names) < len(node.keywords)
        return cls(len(plain), names, is_open, ast.unparse(node))

    def problem(self, function: Function, *, bound: bool) -> str | None:
        """Why the function does not take this call; `bound`: its first parameter is the instance."""
        args = function.args
        positional = [arg.arg for arg in (*args.posonlyargs, *args.args)][bound:]
        required = positional[: len(positional) - len(args.defaults)]
        required += [a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
        names = {*positional, *(arg.arg for arg in args.kwonlyargs)}
        if self.positional > len(positional) and args.vararg is None:
            return f"{self.text}: {function.name} takes {len(positional)} positional arguments"
        if unknown := [name for name in self.keywords if name not in names and args.kwarg is None]:
            return f"{self.text}: {function.name} has no argument {', '.join(unknown)}"
        given = {*positional[: self.positional], *self.keywords}
        if not self.is_open and (missing := [name for name in required if name not in given]):
            return f"{self.text}: {function.name} also needs {', '.join(missing)}"
        return None


@dataclass
class Uses:
    """What a file takes from the package."""

    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # local name -> module, name
    calls: list[tuple[str, Call]] = field(default_factory=list)
    attributes: set[tuple[str, str]] = field(default_factory=set)  # class by its local name, attribute
    methods: list[tuple[str, str, Call]] = field(default_factory=list)
    overrides: list[tuple[str, Function]] = field(default_factory=list)
    unannotated: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, source: str, package: str) -> Uses:
        """Read a file."""
        tree = ast.parse(source)
        uses = cls()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                for alias in node.names:
                    uses.imports[alias.asname or alias.name] = (node.module or "", alias.name)
        _Reader(uses).visit(tree)
        read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        uses.unannotated = read - _own_names(tree) - _known_names() - {name for _, name in uses.attributes}
        return uses

    def complaints(self, sources: Sources) -> list[str]:
        """What is not there, or is called otherwise, in these sources."""
        found = {name: sources.find(module, original) for name, (module, original) in self.imports.items()}
        problems = [f"from {self.imports[n][0]} import {self.imports[n][1]}" for n, f in found.items() if f is None]
        there = {name: item for name, item in found.items() if item is not None}
        known = {name: sources.attributes(item) for name, item in there.items() if isinstance(item.node, ast.ClassDef)}
        problems += [f"{kind}.{name}" for kind, name in sorted(self.attributes) if name not in known.get(kind, {name})]
        for name, call in self.calls:
            if (item := there.get(name)) is not None:
                problems += _call_problems(sources, item, call)
        for kind, name, call in self.methods:
            if (item := there.get(kind)) is not None and (method := sources.method(item, name)) is not None:
                problems += filter(None, [call.problem(method, bound=not _is_static(method))])
        for kind, function in self.overrides:
            if (item := there.get(kind)) is not None:
                problems += _override_problems(sources, item, kind, function)
        return problems


def _call_problems(sources: Sources, item: Found, call: Call) -> list[str]:
    if isinstance(item.node, ast.ClassDef):
        method = sources.method(item, "__init__")
        return [] if method is None else list(filter(None, [call.problem(method, bound=True)]))
    if isinstance(item.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return list(filter(None, [call.problem(item.node, bound=False)]))
    return []


def _override_problems(sources: Sources, item: Found, kind: str, function: Function) -> list[str]:
    method = sources.method(item, function.name)
    if method is None:
        return [f"{kind} has no {function.name} to override"]
    ours, theirs = ([arg.arg for arg in f.args.args] for f in (function, method))
    return [] if ours == theirs else [f"{kind}.{function.name} takes {theirs}, the override {ours}"]


def _is_static(function: Function) -> bool:
    return any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)


class _Reader(ast.NodeVisitor):
    """Fills in `Uses`, function by function, knowing which variables are annotated."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._types: list[dict[str, tuple[str, ...]]] = [{}]
        self._bases: list[str | None] = [None]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        base = next((n.id for n in node.bases if isinstance(n, ast.Name) and n.id in self._uses.imports), None)
        self._bases.append(base)
        own = _own_names(node)
        for item in node.body:
            if base is not None and isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for inner in ast.walk(item):
                    if (
                        isinstance(inner, ast.Attribute)
                        and ast.unparse(inner.value) == "self"
                        and inner.attr not in own
                    ):
                        self._uses.attributes.add((base, inner.attr))
        self.generic_visit(node)
        self._bases.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        base = self._bases[-1]
        if base is not None and not node.name.startswith("__") and not node.decorator_list:
            self._uses.overrides.append((base, node))
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._types.append({**self._types[-1], **{a.arg: self._named(a.annotation) for a in arguments}})
        for inner in ast.walk(node):
            if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                self._types[-1][inner.target.id] = self._named(inner.annotation)
        self.generic_visit(node)
        self._types.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for kind in self._kinds(node.value):
            self._uses.attributes.add((kind, node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        call, function = Call.of(node), node.func
        if isinstance(function, ast.Name) and function.id in self._uses.imports:
            self._uses.calls.append((function.id, call))
        elif isinstance(function, ast.Attribute):
            is_super = ast.unparse(function.value) == "super()"
            base = self._bases[-1]
            for kind in [base] if is_super and base is not None else self._kinds(function.value):
                self._uses.methods.append((kind, function.attr, call))
        self.generic_visit(node)

    def _kinds(self, node: ast.expr) -> tuple[str, ...]:
        return self._types[-1].get(node.id, ()) if isinstance(node, ast.Name) else ()

    def _named(self, annotation: ast.expr | None) -> tuple[str, ...]:
        if annotation is None:
            return ()
        names = [n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)]
        return tuple(name for name in names if name in self._uses.imports)


def _own_names(tree: ast.AST) -> set[str]:
    """What the file defines: functions, methods, fields, attributes of `self`, and the names of its modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            names |= _targets(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {part for alias in node.names for part in alias.name.split(".")}
    return names


def _known_names() -> set[str]:
    """Attributes of PyTorch's tensors and modules, of Python's types, and of what this project's queue has."""
    from megamem.runtime.pipeline import weights

    things = [torch.Tensor, torch.nn.Module(), torch, dict, list, set, tuple, str, type, BaseException]
    things += [os, sys, contextlib, weakref, importlib.metadata, weights.WeightQueue(), weights.WeightTask]
    return {name for thing in things for name in dir(thing)}
