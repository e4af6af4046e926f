"""`megamem simulate`: a schedule by name or from a file, checked, priced, and shown as table, JSON, picture or trace.

Times are in the unit of the costs. Memory is in activations of one microbatch on one rank, unless the activations are
given in bytes or in a costs file; a limit without a unit is in the same unit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamem.errors import ConfigError, ScheduleError
from megamem.ir.schedule import Schedule, order_text, parse_schedule
from megamem.ir.workload import HasCosts, StageCost, Uniform, parse_costs
from megamem.options import Bytes, Invalid, Limit, suggestion
from megamem.planner.schedules.checker import accumulates_in_order, check_schedule
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.passes import add_communication, receive_buffers, strip_communication
from megamem.planner.schedules.simulator import Simulation, simulate
from megamem.report.perfetto import chrome_trace
from megamem.report.schedule_svg import Picture, render_svg
from megamem.report.schedule_text import render_text
from megamem.yamlfile import read_mapping

AUTO = "auto"

_DEFAULTS = {"forward": 1.0, "backward": 1.0, "weight": 1.0, "comm": 0.0, "offload": 0.0}
_OUTPUT_LAYER = "output_layer"
_TRACE_UNIT = 1000.0  # microseconds that one unit of cost becomes in a trace


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What is shown of a schedule. `unit` names that of the memory; `front` is what `auto` found, by rising memory."""

    simulation: Simulation
    limit: float | None
    unit: str
    buffers: tuple[int, ...]
    front: tuple[dict[str, Any], ...] = ()

    @property
    def schedule(self) -> Schedule:
        return self.simulation.schedule


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand. Raises MegamemError for everything that is wrong with the request."""
    if arguments.list:
        print(json.dumps(_family_records(), indent=2) if arguments.json else _family_table())
        return 0
    workload, unit = _workload(arguments)
    limit = _limit(arguments.memory_limit, in_bytes=unit != _MICROBATCHES)
    schedule, front = _schedule(arguments, workload, limit)
    check_schedule(schedule, costs=workload, memory_limit=limit)
    posted = add_communication(schedule)
    check_schedule(posted)
    buffers = tuple(sum(channels.values()) for channels in receive_buffers(posted))
    simulation = simulate(schedule, workload)
    shown = _Shown(simulation=simulation, limit=limit, unit=unit, buffers=buffers, front=front)
    _write_files(arguments, shown)
    if arguments.json:
        print(json.dumps(_record(shown), indent=2))
    elif arguments.text:
        print(schedule.to_text(), end="")
    else:
        print(_table(shown))
    return 0


_MICROBATCHES = "microbatch activations per rank"
_BYTES = "bytes"
_OF_FILE = "the unit of the costs file"


def _workload(arguments: argparse.Namespace) -> tuple[HasCosts, str]:
    """The costs, and the unit of their memory."""
    costs = (*_DEFAULTS, _OUTPUT_LAYER)
    given = {name: getattr(arguments, name) for name in costs if getattr(arguments, name) is not None}
    amounts = {"activation": arguments.activation_bytes, "weight_grad": arguments.weight_grad_bytes}
    flags = [name.replace("_", "-") for name in given]
    flags += [f"{name}-bytes".replace("_", "-") for name, amount in amounts.items() if amount is not None]
    if arguments.costs is not None:
        if flags:
            raise ConfigError(f"--costs {arguments.costs} holds all costs; leave --{', --'.join(flags)} out")
        try:
            return parse_costs(read_mapping(Path(arguments.costs))), _OF_FILE
        except ScheduleError as fault:
            raise ConfigError(f"{arguments.costs}: {fault}") from None
    for name, value in given.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: a cost is a finite number, zero or more")
    ends: dict[str, Any] = {}
    if (layer := given.pop(_OUTPUT_LAYER, None)) is not None:
        ends["last"] = StageCost(forward=layer, backward=layer, weight=layer, activation=0.0, weight_grad=0.0)
    if amounts["activation"] is None:
        if amounts["weight_grad"] is not None:
            raise ConfigError("--weight-grad-bytes is a part of the activation; give --activation-bytes too")
        return Uniform(**{**_DEFAULTS, **given}, **ends), _MICROBATCHES
    activation = _amount(amounts["activation"], "--activation-bytes")
    kept = activation if amounts["weight_grad"] is None else _amount(amounts["weight_grad"], "--weight-grad-bytes")
    if kept > activation:
        raise ConfigError(f"--weight-grad-bytes {kept:g} is a part of --activation-bytes {activation:g}; it is larger")
    return Uniform(**{**_DEFAULTS, **given}, **ends, activation=activation, weight_grad=kept), _BYTES


def _amount(text: str, flag: str) -> float:
    """Bytes: a plain number, or an amount with its unit."""
    try:
        value = float(text)
    except ValueError:
        try:
            return float(Bytes().parse(text))
        except (Invalid, ValueError) as fault:
            raise ConfigError(f"{flag}: {fault}") from None
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{flag} {text}: an amount of memory is zero or more")
    return value


def _limit(text: str | None, *, in_bytes: bool) -> float | None:
    if text is None:
        return None
    try:
        limit = Limit().parse(text)
    except Invalid as fault:
        raise ConfigError(f"--memory-limit: {fault}") from None
    if limit == "auto":
        return None
    if isinstance(limit, int) and not in_bytes:
        raise ConfigError(
            f"--memory-limit {text} is in bytes, and the activations are not; give --activation-bytes or --costs, or "
            "the limit in microbatch activations per rank, such as 4"
        )
    return float(limit)


def _schedule(
    arguments: argparse.Namespace, workload: HasCosts, limit: float | None
) -> tuple[Schedule, tuple[dict[str, Any], ...]]:
    """The schedule without communication, and what else `auto` found."""
    if arguments.file is not None:
        return _read(arguments), ()
    missing = [flag for flag in ("schedule", "stages", "microbatches") if getattr(arguments, flag) is None]
    if missing:
        raise ConfigError(f"give --{', --'.join(missing)} (or --file with a schedule, or --list)")
    for flag in ("stages", "microbatches", "chunks", "group"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: at least 1 is needed")
    name = arguments.schedule
    if name not in FAMILIES and name != AUTO:
        raise ConfigError(f"--schedule {name}: no such schedule; {suggestion(name, [*FAMILIES, AUTO])}")
    request = Request(
        num_ranks=arguments.stages,
        num_microbatches=arguments.microbatches,
        group=arguments.group,
        workload=workload,
        memory_limit=limit,
        vocabulary=arguments.vocabulary,
    )
    if name == AUTO and request.vocabulary is not None:
        raise ConfigError(f"--vocabulary {request.vocabulary}: auto places no vocabulary passes; name a --schedule")
    if name == AUTO:
        return _search(arguments, request)
    chunks = FAMILIES[name].default_chunks if arguments.chunks is None else arguments.chunks
    return build_schedule(name, request.with_chunks(chunks)), ()


def _search(arguments: argparse.Namespace, request: Request) -> tuple[Schedule, tuple[dict[str, Any], ...]]:
    """The best schedule within the limit, and the Pareto front of makespan and memory."""
    if arguments.group is not None:
        raise ConfigError(f"--group {arguments.group}: auto chooses the groups; leave it out")
    from megamem.planner.schedules.search import CHUNK_COUNTS, search

    found = search(
        request,
        chunk_counts=CHUNK_COUNTS if arguments.chunks is None else (arguments.chunks,),
        progress=_report_progress if sys.stderr.isatty() else None,
    )
    front = [
        {
            "schedule": candidate.name,
            "placement": candidate.placement.shape,
            "chunks": candidate.placement.num_chunks,
            "group": candidate.group,
            "makespan": _tidy(candidate.makespan),
            "stage_span": _tidy(candidate.stage_span),
            "peak_activation": _tidy(candidate.peak),
            "fits": candidate.fits,
        }
        for candidate in found.front
    ]
    return found.schedule, tuple(front)


def _report_progress(phase: str, share: float) -> None:
    print(f"\r{phase}: {share:.0%}\x1b[K", end="\r" if share >= 1 else "", file=sys.stderr, flush=True)


def _read(arguments: argparse.Namespace) -> Schedule:
    """The schedule in a file; flags that are given too must agree with it."""
    try:
        schedule = parse_schedule(Path(arguments.file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{arguments.file}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from None
    except ScheduleError as fault:
        raise ConfigError(f"{arguments.file}: {fault}") from None
    placement = schedule.placement
    there = {
        "schedule": schedule.name,
        "stages": placement.num_ranks,
        "microbatches": schedule.num_microbatches,
        "chunks": placement.num_chunks,
        "group": schedule.group,
        "vocabulary": schedule.barriers,
    }
    for name, value in there.items():
        wanted = getattr(arguments, name)
        if wanted is not None and wanted != value:
            raise ConfigError(f"--{name} {wanted}: {arguments.file} says {value}; leave the flag out")
    check_schedule(schedule)  # with the communication that somebody wrote
    return strip_communication(schedule)


def _write_files(arguments: argparse.Namespace, shown: _Shown) -> None:
    simulation = shown.simulation
    curves = [simulation.memory_curve(rank) for rank in range(shown.schedule.placement.num_ranks)]
    timeline = simulation.timeline()
    if arguments.svg is not None:
        picture = Picture(
            timeline=timeline, title=_title(shown.schedule), caption=_caption(shown), memory=curves, limit=shown.limit
        )
        _write(arguments.svg, render_svg(picture))
    if arguments.perfetto is not None:
        trace = chrome_trace(
            timeline,
            memory=dict(enumerate(curves)),
            memory_name=f"activation memory ({shown.unit})",
            microseconds=_TRACE_UNIT,
            title=shown.schedule.name,
        )
        _write(arguments.perfetto, trace)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be written: {fault.strerror or fault}") from None


def _record(shown: _Shown) -> dict[str, Any]:
    """What --json prints."""
    simulation, schedule = shown.simulation, shown.schedule
    placement, share = schedule.placement, simulation.costs.vocabulary
    return {
        "schedule": schedule.name,
        "stages": placement.num_ranks,
        "microbatches": schedule.num_microbatches,
        "chunks": placement.num_chunks,
        "group": schedule.group,
        **({} if schedule.barriers is None else {"barriers": schedule.barriers}),
        "placement": placement.shape,
        "makespan": _tidy(simulation.makespan),
        "stage_span": _tidy(simulation.stage_span),
        "bubble_rate": _tidy(simulation.bubble_rate),
        "stage_bubble_rate": _tidy(simulation.stage_bubble_rate),
        "peak_activation": [_tidy(peak) for peak in simulation.peak_activation],
        "memory_unit": shown.unit,
        "memory_limit": shown.limit,
        "receive_buffers": list(shown.buffers),
        "accumulates_in_order": accumulates_in_order(schedule),
        "costs": {
            "comm": simulation.costs.comm,
            "stages": [{key: _tidy(value) for key, value in asdict(cost).items()} for cost in simulation.costs.stages],
            **({} if share is None else {"vocabulary": {key: _tidy(value) for key, value in share.given().items()}}),
        },
        **({"front": list(shown.front)} if shown.front else {}),
        "order": [order_text(actions) for actions in schedule.ranks],
    }


def _tidy(value: float) -> float:
    """Without the noise that sums of thirds have in their last digits."""
    return float(f"{value:.12g}")


def _title(schedule: Schedule) -> str:
    placement = schedule.placement
    chunks = f" x {placement.num_chunks} chunks ({placement.shape})" if placement.num_chunks > 1 else ""
    group = f", groups of {schedule.group}" if schedule.group is not None else ""
    sharing = ""
    if schedule.barriers is not None:
        sharing = f", vocabulary parallel ({schedule.barriers} barrier{'s' * (schedule.barriers > 1)})"
    count = schedule.num_microbatches
    return f"{schedule.name}: {placement.num_ranks} ranks{chunks}, {count} microbatches{group}{sharing}"


def _caption(shown: _Shown) -> str:
    simulation = shown.simulation
    return (
        f"makespan {simulation.makespan:.6g}, bubble {simulation.bubble_rate:.2%} (stage span "
        f"{simulation.stage_span:.6g}, {simulation.stage_bubble_rate:.2%}), peak activation "
        f"{_memory(max(simulation.peak_activation), shown.unit)}"
    )


def _memory(value: float, unit: str) -> str:
    if unit == _BYTES:
        return f"{value / 2**30:.3f}GiB"
    return f"{value:.6g} microbatches" if unit == _MICROBATCHES else f"{value:.6g}"


def _table(shown: _Shown) -> str:
    """What is printed without --json: figures, peaks per rank, and the timeline if the terminal is wide enough."""
    simulation = shown.simulation
    lines = [
        _title(shown.schedule),
        f"  makespan    {simulation.makespan:<12.6g} bubble {simulation.bubble_rate:.4f}   "
        "(synchronous optimizer step)",
        f"  stage span  {simulation.stage_span:<12.6g} bubble {simulation.stage_bubble_rate:.4f}   "
        "(the papers' metric: no barrier at the optimizer)",
        "",
        "  rank   peak activation      busy   receive buffers",
    ]
    for rank, peak in enumerate(simulation.peak_activation):
        spans = zip(shown.schedule.ranks[rank], simulation.times[rank], strict=True)
        busy = sum(end - start for action, (start, end) in spans if action.is_compute)
        share = busy / simulation.makespan if simulation.makespan else 0.0
        lines.append(f"  {rank:<4} {_memory(peak, shown.unit):>17} {share:>9.1%} {shown.buffers[rank]:>17}")
    if shown.limit is not None:
        lines.append(f"  limit{_memory(shown.limit, shown.unit):>17}")
    if shown.front:
        lines += ["", *_front_lines(shown)]
    timeline = render_text(simulation.timeline(), shutil.get_terminal_size((120, 24)).columns)
    if timeline is None:
        lines += ["", "(too long for a timeline in this terminal; --svg FILE draws it)"]
    else:
        lines += ["", timeline]
    return "\n".join(lines)


def _front_lines(shown: _Shown) -> list[str]:
    """The Pareto front as a table."""
    lines = ["  more memory, less time:", "  peak activation       makespan   schedule"]
    for row in shown.front:
        group = f", groups of {row['group']}" if row["group"] is not None else ""
        mark = "" if row["fits"] else "   (above the limit)"
        peak = _memory(row["peak_activation"], shown.unit)
        what = f"{row['schedule']}, {row['chunks']} chunks ({row['placement']}){group}{mark}"
        lines.append(f"  {peak:>17} {row['makespan']:>12.6g}   {what}")
    return lines


def _family_records() -> list[dict[str, Any]]:
    """What --list --json prints."""
    return [
        {
            "name": family.name,
            "placement": family.shape,
            "min_chunks": family.min_chunks,
            "max_chunks": family.max_chunks,
            "summary": family.summary,
        }
        for family in FAMILIES.values()
    ]


def _family_table() -> str:
    """What --list prints."""
    rows = [("name", "placement", "chunks", "what it is")]
    for family in FAMILIES.values():
        least, most = family.min_chunks, family.max_chunks
        chunks = str(least) if least == most else f"{least}+" if most is None else f"{least}-{most}"
        rows.append((family.name, family.shape, chunks, family.summary))
    rows.append((AUTO, "any", "any", "the fastest that is found within --memory-limit"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    columns = [[f"{cell:<{width}}" for cell, width in zip(row[:3], widths, strict=True)] for row in rows]
    return "\n".join("  ".join([*cells, row[3]]) for cells, row in zip(columns, rows, strict=True))
