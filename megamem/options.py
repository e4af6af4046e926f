"""One declaration per option, from which the loader, the flags, the help, the docs table and the schema derive.

A section of the configuration is a frozen dataclass whose fields are made by `option(kind, default, help)`. A *kind*
says how a value is read, written and described; it is the only code that knows the text form. Values arrive as text
(YAML files and flags: this loader leaves every scalar as the user typed it) or typed (from Python); one `parse` takes
both, so a file, a flag and a call agree about what is valid.

Standard library only, and nothing in here knows what the options mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_OPTION = "megamem.option"
_BYTES = re.compile(r"^(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)$")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SMALLEST = 4 << 10


class Invalid(Exception):  # noqa: N818 - never leaves the loader, which turns it into a ConfigError
    """What is wrong with one value: a reason, or several with the place inside the value in front (`[2].fc1`)."""

    def __init__(self, *reasons: str | tuple[str, str]) -> None:
        self.reasons = tuple(("", reason) if isinstance(reason, str) else reason for reason in reasons)
        super().__init__(*reasons)


class Kind(Protocol):
    """How the values of an option are read, written and described."""

    @property
    def metavar(self) -> str:
        """The values in a word or two, for `--help` and the docs table."""

    def parse(self, raw: object) -> Any:
        """The value that `raw` (text, or already typed) stands for. Raises `Invalid` with reason and remedy."""

    def plain(self, value: Any) -> object:
        """The value as YAML and JSON write it; `parse` reads it back."""

    def schema(self) -> dict[str, object]:
        """JSON Schema of the values."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """Name, kind, default and help of one field of a section."""

    name: str
    kind: Kind
    default: Any
    help: str

    def flag(self, section: str) -> str:
        """The command-line flag of this option."""
        return f"--megamem-{section}-{self.name}".replace("_", "-")

    def default_text(self) -> str:
        """The default as a user would write it."""
        plain = self.kind.plain(self.default)
        return str(plain).lower() if isinstance(plain, bool) else str(plain)


def option(kind: Kind, default: Any, help: str) -> Any:
    """A dataclass field that is an option; the field's own annotation and default are what Python code sees."""
    return dataclasses.field(default=default, metadata={_OPTION: (kind, help)})


def options_of(section: type) -> tuple[Option, ...]:
    """The options that a section declares, in order."""
    return tuple(
        Option(name=item.name, kind=kind, default=item.default, help=help)
        for item in dataclasses.fields(section)
        for kind, help in [item.metadata[_OPTION]]
    )


def suggestion(word: str, valid: Iterable[str]) -> str:
    """The nearest valid spelling, or all of them where none is near."""
    names = list(valid)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names)}"


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def metavar(self) -> str:
        return "{" + ",".join(self.words) + "}"

    def parse(self, raw: object) -> str:
        # A trainer that loads our block with a YAML 1.1 reader hands over `off` and `on` as booleans.
        word = {False: "off", True: "on"}[raw] if isinstance(raw, bool) else raw
        if not isinstance(word, str):
            raise Invalid(f"{raw!r} is no word; give one of {', '.join(self.words)}")
        if word not in self.words:
            raise Invalid(f"{word!r} is unknown; {suggestion(word, self.words)}")
        return word

    def plain(self, value: str) -> str:
        return value

    def schema(self) -> dict[str, object]:
        return {"enum": list(self.words)}


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1."""

    metavar = "0..1"

    def parse(self, raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
            raise Invalid(f"{raw!r} is no number; give one from 0 to 1, such as 0.5")
        try:
            value = float(raw)
        except ValueError:
            raise Invalid(f"{raw!r} is no number; give one from 0 to 1, such as 0.5") from None
        if not 0.0 <= value <= 1.0:
            raise Invalid(f"{raw} is out of range; give a number from 0 to 1")
        return value

    def plain(self, value: float) -> float:
        return value

    def schema(self) -> dict[str, object]:
        return {"type": "number", "minimum": 0, "maximum": 1}


@dataclass(frozen=True)
class Count:
    """A whole number, not below `least`, and not above `most` if there is one."""

    least: int = 0
    most: int | None = None

    @property
    def metavar(self) -> str:
        return "N" if self.most is None else f"{self.least}..{self.most}"

    def parse(self, raw: object) -> int:
        allowed = f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
        if isinstance(raw, str) and re.fullmatch(r"[+-]?[0-9]+", raw.strip()):
            raw = int(raw)
        if isinstance(raw, bool) or not isinstance(raw, int):
            raise Invalid(f"{raw!r} is no whole number; give one {allowed}")
        if raw < self.least or (self.most is not None and raw > self.most):
            raise Invalid(f"{raw} is out of range; give a whole number {allowed}")
        return raw

    def plain(self, value: int) -> int:
        return value

    def schema(self) -> dict[str, object]:
        bounds = {"minimum": self.least} | ({} if self.most is None else {"maximum": self.most})
        return {"type": "integer", **bounds}


@dataclass(frozen=True)
class Switch:
    """True or false."""

    metavar = "{true,false}"

    def parse(self, raw: object) -> bool:
        value = {"true": True, "false": False}.get(raw.strip().lower(), raw) if isinstance(raw, str) else raw
        if not isinstance(value, bool):
            raise Invalid(f"{raw!r} is neither true nor false")
        return value

    def plain(self, value: bool) -> bool:
        return value

    def schema(self) -> dict[str, object]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Bytes:
    """An amount of memory, with its unit, or `auto`. The value is a number of bytes or the word."""

    metavar = "100GiB|auto"

    def parse(self, raw: object) -> int | str:
        if raw == "auto":
            return "auto"
        nbytes = self._typed(raw) if not isinstance(raw, str) else self._read(raw.strip())
        if nbytes < _SMALLEST:
            raise Invalid(f"{raw!r} is only {nbytes} bytes; give an amount with its unit, such as 100GiB, or auto")
        return nbytes

    def _typed(self, raw: object) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int):
            raise Invalid(f"{raw!r} is no amount of memory; give one with its unit, such as 100GiB, or auto")
        return raw

    def _read(self, text: str) -> int:
        match = _BYTES.match(text)
        if match is None:
            raise Invalid(f"{text!r} is no amount of memory; give one with its unit, such as 100GiB, or auto")
        unit = match["unit"]
        if unit not in _UNITS:
            what = f"has the unknown unit {unit!r}" if unit else "has no unit"
            # GB is refused rather than guessed: 7 % of a host arena is too much to be wrong about.
            near = {known.replace("i", "").lower(): known for known in _UNITS}
            near |= {known.lower(): known for known in _UNITS} | {known[0].lower(): known for known in _UNITS}
            hint = near.get(unit.lower())
            raise Invalid(f"{text!r} {what}; " + (f"did you mean {match['number']}{hint}?" if hint else _unit_list()))
        return int(float(match["number"]) * _UNITS[unit])

    def plain(self, value: int | str) -> str:
        if isinstance(value, str):
            return value
        unit = next(unit for unit in reversed(_UNITS) if value % _UNITS[unit] == 0)
        return f"{value // _UNITS[unit]}{unit}"

    def schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": r"^(auto|[0-9]+(\.[0-9]+)? ?(" + "|".join(_UNITS) + "))$"}


_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?$")
_SECONDS = {None: 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Duration:
    """A time above 0, with its unit; the value is in seconds."""

    metavar = "60s"

    def parse(self, raw: object) -> float:
        match = None if isinstance(raw, bool) else _DURATION.match(str(raw).strip())
        if match is None or float(match[1]) == 0:
            raise Invalid(f"{raw!r} is no time; give one above 0 with its unit, such as 500ms, 60s or 5min")
        return float(match[1]) * _SECONDS[match[2]]

    def plain(self, value: float) -> str:
        return f"{value:g}s"

    def schema(self) -> dict[str, object]:
        return {"type": ["string", "number"], "pattern": r"^[0-9]+(\.[0-9]+)? ?(ms|s|min|m|h)?$"}


@dataclass(frozen=True)
class Auto:
    """Another kind of value, or a word: `auto`, unless others are given."""

    kind: Kind
    words: tuple[str, ...] = ("auto",)

    @property
    def metavar(self) -> str:
        return "|".join((self.kind.metavar, *self.words))

    def parse(self, raw: object) -> Any:
        if raw in self.words:
            return raw
        try:
            return self.kind.parse(raw)
        except Invalid as invalid:
            words = " or ".join(self.words)
            raise Invalid(*((place, f"{reason}, or {words}") for place, reason in invalid.reasons)) from None

    def plain(self, value: Any) -> object:
        return value if value in self.words else self.kind.plain(value)

    def schema(self) -> dict[str, object]:
        return {"anyOf": [self.kind.schema(), {"enum": list(self.words)}]}


@dataclass(frozen=True)
class Limit:
    """A limit of memory: a number without a unit (a float), an amount with its unit (an int, bytes), or `auto`."""

    metavar = "4.5|40GiB|auto"

    def parse(self, raw: object) -> float | int | str:
        if isinstance(raw, str) and re.search(r"[A-Za-z]", raw) and not re.fullmatch(r"[0-9.]+[eE][+-]?[0-9]+", raw):
            return Bytes().parse(raw.strip())
        if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
            raise Invalid(
                f"{raw!r} is no limit; give a number of microbatch activations, an amount such as 40GiB, or auto"
            )
        if isinstance(raw, int):
            return Bytes().parse(raw) if raw >= _SMALLEST else float(raw)
        try:
            value = float(raw)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise Invalid(f"{raw!r} is no limit; give a number above 0, an amount with its unit such as 40GiB, or auto")
        return value

    def plain(self, value: float | int | str) -> object:
        return value if isinstance(value, float) else Bytes().plain(value)

    def schema(self) -> dict[str, object]:
        return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, Bytes().schema()]}


@dataclass(frozen=True)
class File:
    """The path of a file, or of what else the metavar says, or `none`. It is opened when it is needed."""

    metavar: str = "FILE|none"

    def parse(self, raw: object) -> str:
        if not isinstance(raw, (str, os.PathLike)) or not os.fspath(raw):
            raise Invalid(f"{raw!r} is no path; give one, or none")
        return os.fspath(raw)

    def plain(self, value: str) -> str:
        return value

    def schema(self) -> dict[str, object]:
        return {"type": "string", "minLength": 1}


def _unit_list() -> str:
    return f"units: {', '.join(_UNITS)}"


def parse_values(
    options: Sequence[Option], raw: Mapping[str, object], section: str
) -> tuple[dict[str, Any], list[str]]:
    """The values given for a section, and the problem with each that is not valid. Reports all, raises nothing."""
    known = {item.name: item for item in options}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, given in raw.items():
        if key not in known:
            problems.append(f"{section}.{key}: unknown key; {suggestion(str(key), known)}")
            continue
        try:
            values[key] = known[key].kind.parse(given)
        except Invalid as invalid:
            problems += [f"{section}.{key}{place}: {reason}" for place, reason in invalid.reasons]
    return values, problems
