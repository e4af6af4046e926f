"""Explicit fates: rows that say, for some layers, what becomes of single tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from megamem.errors import ConfigError
from megamem.ir.activation import EXPERTS, TENSORS, Fate
from megamem.options import Invalid, suggestion
from megamem.yamlfile import read_inline

MLP = "mlp"
"""The one module without a path that a row can name: what it saves itself is what its activation function is given."""
_MODULE_PATH = re.compile(r"^[A-Za-z_]\w*(\.\w+)+$")
_PART = re.compile(r"^(?:(?P<all>all)|(?P<end>first|last)\s+(?P<count>\d+)|(?P<start>\d+)(?:\s*-\s*(?P<stop>\d+))?)$")
_EXAMPLES = '"all", "1-4", "1,3", "first 1" or "last 2"'
_ROWS = "[{layers: all, fc1: 0.5}]"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """The fates of some tensors in some layers. `layers` counts from 1 over the whole model."""

    layers: str = "all"
    fates: Mapping[str, Fate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in self.layers.split(","):
            match = _PART.match(part.strip())
            numbers = [int(text) for text in match.group("count", "start", "stop") if text] if match else [0]
            if 0 in numbers:
                raise ConfigError(f"layers: {self.layers!r} names no layers; write {_EXAMPLES} (the first layer is 1)")
            if len(numbers) == 2 and numbers[0] > numbers[1]:
                raise ConfigError(f"layers: {part.strip()!r} is backwards; write {numbers[1]}-{numbers[0]}")

    def layer_numbers(self, num_layers: int) -> frozenset[int]:
        """The 1-based numbers of the layers this row is about. Raises ConfigError where the model has no such layer."""
        chosen: set[int] = set()
        for part in self.layers.split(","):
            match = _PART.match(part.strip())
            assert match is not None, "checked on construction"
            if match["all"]:
                start, stop = 1, num_layers
            elif match["count"]:
                count = int(match["count"])
                start, stop = (1, count) if match["end"] == "first" else (num_layers - count + 1, num_layers)
            else:
                start, stop = int(match["start"]), int(match["stop"] or match["start"])
            if start < 1 or stop > num_layers:
                raise ConfigError(f"activations.table: layers {self.layers!r}, but the model has {num_layers} layers")
            chosen.update(range(start, stop + 1))
        return frozenset(chosen)


@dataclass(frozen=True)
class Table:
    """The kind of the option that holds rows; on the command line the rows are inline YAML."""

    metavar = "ROWS"

    def parse(self, raw: object) -> tuple[TableRow, ...]:
        if isinstance(raw, str):
            try:
                raw = read_inline(raw) or []
            except ValueError as fault:
                raise Invalid(f"not YAML: {fault}; write rows such as {_ROWS}") from None
        if not isinstance(raw, (list, tuple)):
            raise Invalid(f"{raw!r} is no list of rows; write rows such as {_ROWS}")
        rows: list[TableRow] = []
        problems: list[tuple[str, str]] = []
        for index, given in enumerate(raw):
            if isinstance(given, TableRow):
                given = {"layers": given.layers, **given.fates}
            row, found = _row(given)
            problems += [(f"[{index}]{place}", reason) for place, reason in found]
            if row is not None:
                rows.append(row)
        if problems:
            raise Invalid(*problems)
        return tuple(rows)

    def plain(self, value: tuple[TableRow, ...]) -> list[dict[str, str]]:
        return [{"layers": row.layers, **{name: _text(fate) for name, fate in row.fates.items()}} for row in value]

    def schema(self) -> dict[str, object]:
        fate = {"anyOf": [{"type": "string"}, {"type": "number", "minimum": 0, "maximum": 1}]}
        layers = {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}], "description": _EXAMPLES}
        row = {
            "type": "object",
            "required": ["layers"],
            "properties": {"layers": layers, **dict.fromkeys((*TENSORS, MLP), fate)},
            "patternProperties": {_MODULE_PATH.pattern: fate},
            "additionalProperties": False,
        }
        return {"type": "array", "items": row}


def _row(given: object) -> tuple[TableRow | None, list[tuple[str, str]]]:
    """One row, and what is wrong with it, each with its place inside the row."""
    if not isinstance(given, Mapping):
        return None, [("", f"{given!r} is no row; write {{layers: all, fc1: 0.5}}")]
    problems: list[tuple[str, str]] = []
    fates: dict[str, Fate] = {}
    for key, value in given.items():
        if key == "layers":
            continue
        try:
            fates[str(key)] = _fate(str(key), value)
        except Invalid as invalid:
            problems += [(f".{key}{place}", reason) for place, reason in invalid.reasons]
    row = None
    if "layers" not in given:
        problems.append(("", f"says no layers; add layers: {_EXAMPLES}"))
    else:
        try:
            row = TableRow(layers=str(given["layers"]), fates=fates)
        except ConfigError as fault:
            problems += [(f".{problem.partition(': ')[0]}", problem.partition(": ")[2]) for problem in fault.problems]
    if not fates and not problems:
        problems.append(("", "names no tensor; add one with its fate, such as fc1: 0.5"))
    return row, problems


def _text(fate: Fate) -> str:
    """The text form that reads back as the same fate; `str(fate)` is for people and rounds to six digits."""
    if Fate.parse(str(fate)) == fate:
        return str(fate)
    return f"{fate.fraction!r}@{fate.tier}" + ("" if fate.codec is None else f"/{fate.codec}")


def _fate(key: str, value: object) -> Fate:
    if key.strip().isdigit():
        raise Invalid('is no tensor; a list of layers is quoted, such as layers: "1,3"')
    if key not in (*TENSORS, MLP) and not _MODULE_PATH.match(key):
        raise Invalid(f"unknown tensor; {suggestion(key, TENSORS)} (a module needs its path, such as mlp.linear_fc2)")
    if isinstance(value, Fate):
        fate = value
    elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Invalid(f"{value!r} is no fate; give keep, swap, recompute, or a share such as 0.5 or 0.5@hbm")
    else:
        try:
            fate = Fate.parse(value)
        except ValueError as fault:
            raise Invalid(str(fault)) from None
    if key == EXPERTS and fate.is_partial:
        raise Invalid(f"{fate} is a share, and experts are handled whole; give keep, swap or recompute")
    return fate
