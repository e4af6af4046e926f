"""The part of a configuration file that makes it a plan: read, and refused where it was made for something else."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megamem.ir.plan import PARTS, Plan, parse_plan
from megamem.ir.record import RecordError


def read_plan(block: Mapping[str, object], problems: list[str]) -> Plan | None:
    """The plan in a `megamem:` block, None where there is none; what is wrong with it goes to `problems`.

    Checked here is what needs no process group: versions, and the number of ranks where a launcher has named it.
    """
    content = {name: block[name] for name in PARTS if name in block}
    if not content:
        return None
    try:
        plan = parse_plan(content)
    except RecordError as fault:
        problems += [f"{place}: {reason}" for place, reason in fault.problems]
        return None
    problems += plan.made_for.version_problems(installed("megamem") or "", installed("megatron-core"))
    if "WORLD_SIZE" in os.environ:
        problems += plan.made_for.layout_problems({"world_size": int(os.environ["WORLD_SIZE"])})
    return plan


def installed(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    from importlib import metadata  # slow to load

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
