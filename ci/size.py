"""The size budget: a function has at most 60 lines, docstring and blank lines aside; a file at most 500.

    python ci/size.py        exit status 1 and one line per excess

Medians do not tell a clear code base from a muddle, the tail does: a function of 60 lines still fits one screen.
Kernels get 120, because a Triton kernel cannot be cut into functions without cost. A longer one needs a line in
`WAIVERS` that says why; a waiver which is no longer needed is an excess too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("megamem", "kernels", "patches", "examples", "ci", "tests")
FILE_LINES = 500
FUNCTION_LINES = 60
KERNEL_LINES = 120

WAIVERS: Mapping[str, str] = {}
"""`path` or `path:Qual.name` -> the reason why it may be longer."""


def find_excesses(root: Path = ROOT, waivers: Mapping[str, str] = WAIVERS) -> list[str]:
    """What is longer than the budget, one line each, and the waivers that nothing needs."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            found |= _measure(path, path.relative_to(root).as_posix())
    unused = [f"{place}: waived, but within the budget; remove the waiver" for place in waivers if place not in found]
    return [f"{place}: {excess}" for place, excess in found.items() if place not in waivers] + unused


def _measure(path: Path, name: str) -> dict[str, str]:
    """The excesses of one file by their place."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    excesses = {}
    if len(lines) > FILE_LINES:
        excesses[name] = f"{len(lines)} lines, {FILE_LINES} allowed"
    allowed = KERNEL_LINES if name.startswith("kernels/") else FUNCTION_LINES
    for qualified, function in _functions(ast.parse(text), ""):
        length = _body_length(function, lines)
        if length > allowed:
            excesses[f"{name}:{qualified}"] = f"{length} lines, {allowed} allowed"
    return excesses


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        yield from _functions(child, f"{prefix}{child.name}." if named else prefix)  # type: ignore[attr-defined]


def _body_length(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of the body without its docstring and blank lines."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    return sum(bool(line.strip()) for line in lines[body[0].lineno - 1 : function.end_lineno])


if __name__ == "__main__":
    excesses = find_excesses()
    print("\n".join(excesses) or "size: everything is within the budget")
    sys.exit(bool(excesses))
