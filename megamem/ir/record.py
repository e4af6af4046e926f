"""Dataclasses as plain values and back: what plans, models and hardware tables are read and written by.

    to_plain(record)             mappings, lists, numbers and text, ready for YAML and JSON; defaults are left out
    from_plain(Class, content)   the same record; every scalar may be text, as a strict YAML reader leaves it

Fields may be int, float, bool, str, other dataclasses, `T | None`, `tuple[T, ...]` and `Mapping[str, T]`. What does not
fit is reported with its place, all of it at once.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS = {"true": True, "false": False}


class RecordError(ValueError):
    """The content does not fit the record. `problems` holds (place, reason) for each fault."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{place}: {reason}" if place else reason for place, reason in problems))


def to_plain(record: Any) -> Any:
    """The record as mappings, lists and scalars; fields that have their default are left out."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {
            item.name: to_plain(value)
            for item in dataclasses.fields(record)
            if (value := getattr(record, item.name)) != _default(item)
        }
    if isinstance(record, Mapping):
        return {str(key): to_plain(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_plain(value) for value in record]
    return float(f"{record:.6g}") if isinstance(record, float) and math.isfinite(record) else record


def from_plain(kind: type[T], content: Any) -> T:
    """The record of class `kind` that `content` describes. Raises RecordError with everything that is wrong."""
    problems: list[tuple[str, str]] = []
    record = _read(kind, content, "", problems)
    if problems:
        raise RecordError(problems)
    return record  # type: ignore[no-any-return]


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _read(kind: Any, raw: Any, place: str, problems: list[tuple[str, str]]) -> Any:
    """`raw` as a value of type `kind`; None, with the fault in `problems`, where it is none."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if raw is None or raw == "":
            return None
        (kind,) = (option for option in get_args(kind) if option is not type(None))
        return _read(kind, raw, place, problems)
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, raw, place, problems)
    if origin is tuple:
        if isinstance(raw, str) or not isinstance(raw, Sequence):
            problems.append((place, f"{raw!r} is no list"))
            return None
        return tuple(_read(get_args(kind)[0], value, f"{place}[{i}]", problems) for i, value in enumerate(raw))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(raw, Mapping):
            problems.append((place, f"{raw!r} is no mapping"))
            return None
        inner = get_args(kind)[1]
        return {str(key): _read(inner, value, _join(place, str(key)), problems) for key, value in raw.items()}
    return _read_scalar(kind, raw, place, problems)


def _read_record(kind: Any, raw: Any, place: str, problems: list[tuple[str, str]]) -> Any:
    if not isinstance(raw, Mapping):
        problems.append((place, f"{raw!r} is no mapping"))
        return None
    hints = get_type_hints(kind)
    items = {item.name: item for item in dataclasses.fields(kind)}
    before = len(problems)
    for name in raw:
        if name not in items:
            problems.append((_join(place, str(name)), f"unknown key; valid: {', '.join(items)}"))
    for name, item in items.items():
        if name not in raw and _default(item) is dataclasses.MISSING:
            problems.append((_join(place, name), "missing"))
    values = {name: _read(hints[name], raw[name], _join(place, name), problems) for name in items if name in raw}
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except ValueError as fault:
        problems.append((place, str(fault)))
        return None


def _read_scalar(kind: Any, raw: Any, place: str, problems: list[tuple[str, str]]) -> Any:
    if kind is bool:
        value = _WORDS.get(raw.strip().lower(), raw) if isinstance(raw, str) else raw
        fits = isinstance(value, bool)
    elif kind is str:
        value, fits = str(raw), not isinstance(raw, (Mapping, list, tuple))
    else:
        value, fits = _number(kind, raw)
    if not fits:
        problems.append((place, f"{raw!r} is no {kind.__name__}"))
        return None
    return value


def _number(kind: type, raw: Any) -> tuple[Any, bool]:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        return None, False
    try:
        value = float(raw)
        if kind is int:
            return (int(raw) if isinstance(raw, (int, str)) and not _has_point(raw) else int(value)), value % 1 == 0
    except (ValueError, OverflowError):
        return None, False
    return value, not math.isnan(value)


def _has_point(raw: int | str) -> bool:
    return isinstance(raw, str) and any(mark in raw for mark in ".eE")


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
