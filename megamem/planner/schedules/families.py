"""Every family of schedules by name; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Schedule
from megamem.planner.schedules.family import Family, Request

_ALL: tuple[Family, ...] = ()

FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""The families by name, in the order of the documentation."""


def build_schedule(name: str, request: Request) -> Schedule:
    """The schedule of the family `name` for a request.

    Raises InfeasibleError, with the arithmetic and the nearest setting, where there is none.
    """
    family = FAMILIES.get(name)
    if family is None:
        raise InfeasibleError(f"{name!r} is no schedule; there are {', '.join(FAMILIES)}")
    family.check(request)
    return family.build(request)
