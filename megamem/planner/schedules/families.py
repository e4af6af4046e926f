"""Every family of schedules by name; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Schedule
from megamem.planner.schedules import (
    dualpipe_v,
    gis,
    gis_h,
    interleaved,
    one_f_one_b,
    one_f_one_b_v,
    po_f,
    po_h,
    v_adaptive,
    v_half,
    v_min,
    zb_h1,
    zb_h2,
    zb_heuristic,
    zb_v,
)
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.vocabulary_passes import build_with_vocabulary

_ALL: tuple[Family, ...] = (
    one_f_one_b.FAMILY,
    interleaved.FAMILY,
    zb_h1.FAMILY,
    zb_h2.FAMILY,
    zb_heuristic.ZB_1P,
    zb_heuristic.ZB_2P,
    gis.FAMILY,
    gis_h.FAMILY,
    po_h.FAMILY,
    po_f.FAMILY,
    zb_v.FAMILY,
    v_half.FAMILY,
    v_min.FAMILY,
    v_adaptive.FAMILY,
    one_f_one_b_v.FAMILY,
    dualpipe_v.FAMILY,
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""The families by name, in the order of the documentation."""


def build_schedule(name: str, request: Request) -> Schedule:
    """The schedule of the family `name` for a request, with vocabulary passes where it asks for them.

    Raises InfeasibleError, with the arithmetic and the nearest setting, where there is none.
    """
    family = FAMILIES.get(name)
    if family is None:
        raise InfeasibleError(f"{name!r} is no schedule; there are {', '.join(FAMILIES)}")
    family.check(request)
    return family.build(request) if request.vocabulary is None else build_with_vocabulary(family, request)
