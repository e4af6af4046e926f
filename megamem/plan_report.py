"""`megamem report`: what a plan predicts, as one HTML page, and as a memory snapshot that PyTorch's tools open."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megamem.config import Config, load_config
from megamem.errors import ConfigError
from megamem.ir.plan import PARTS, Plan, Prediction, parse_plan
from megamem.ir.record import RecordError
from megamem.ir.schedule import Placement, Shape
from megamem.ir.workload import PipelineCosts, StageCost, parse_costs
from megamem.planner.schedules.families import FAMILIES
from megamem.profiler.cuda_snapshot import curves_of_snapshot, load_snapshot
from megamem.profiler.trace import costs_of_trace
from megamem.report.charts import amount, duration
from megamem.report.memory_snapshot import beside, predicted_snapshot, write_snapshot
from megamem.report.page import Measured, PlanReport, render_page
from megamem.yamlfile import read_block, read_mapping

_EPILOG = """examples:
  megamem report plan.yaml                                writes plan.html, and says what is in it
  megamem report plan.yaml --html page.html --profile trace.costs.json
  megamem report plan.yaml --snapshot plan.pickle         for pytorch.org/memory_viz
  megamem report plan.yaml --snapshot both.pickle --measured rank0.pickle rank1.pickle

The page needs no network and no server. A profile is what `megamem profile` writes, or the FILE.costs.json that
schedule.trace leaves beside its trace. Measured snapshots are PyTorch's own (torch.cuda.memory._dump_snapshot), one per
pipeline rank: they are drawn over the predicted memory, and come into the written snapshot behind the predicted ranks.
"""


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    report = commands.add_parser(
        "report",
        help="show what a plan predicts, as an HTML page",
        description="Show what a plan predicts: memory and time by kind, the pipeline, what else there was, and why.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("plan", metavar="PLAN.yaml", help="a plan, as megamem plan writes it")
    report.add_argument("--html", metavar="FILE", help="the page to write (default: PLAN.html)")
    report.add_argument("--profile", metavar="FILE", help="measured times, set beside the predicted ones")
    report.add_argument(
        "--snapshot", metavar="FILE", help="also write the predicted memory as a PyTorch memory snapshot"
    )
    report.add_argument(
        "--measured",
        metavar="FILE",
        nargs="+",
        default=[],
        help="measured memory snapshots of the pipeline ranks, in order",
    )
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand. Raises MegamemError for everything that is wrong with the files."""
    path = Path(arguments.plan)
    config, plan = read_plan(path)
    predicted = _predicted(plan, path)
    snapshots = [load_snapshot(name) for name in arguments.measured]
    curves = [(one, device, curve) for one in snapshots for device, curve in curves_of_snapshot(one).items()]
    report = PlanReport(
        plan=plan,
        settings=yaml.safe_dump({"megamem": config.settings()}, sort_keys=False, width=100),
        is_edited=not plan.predicts(config.settings()),
        measured=tuple(_times(config, plan, Path(arguments.profile))) if arguments.profile else (),
        memory=tuple(curve for _, _, curve in curves),
        command=shlex.join(["megamem", "report", *(text for text in _given(arguments))]),
    )
    page = Path(arguments.html) if arguments.html else path.with_suffix(".html")
    _write(page, render_page(report))
    print(f"{page}: {amount(predicted.peak_memory)} on the fullest rank, {duration(predicted.step_seconds)} a step")
    if arguments.snapshot:
        both = beside(predicted_snapshot(predicted), [(one, device) for one, device, _ in curves])
        write_snapshot(arguments.snapshot, both)
        behind = f", and behind them {len(curves)} measured ones" if curves else ""
        print(f"{arguments.snapshot}: {len(predicted.memory)} predicted ranks as devices{behind}")
    return 0


def read_plan(path: Path) -> tuple[Config, Plan]:
    """The settings and the plan in a file, whatever versions are installed here. Raises ConfigError."""
    block = read_block(path)
    content: dict[str, Any] = {name: block[name] for name in PARTS if name in block}
    if not content:
        raise ConfigError(f"{path}: no plan: made_for and predicted are missing; megamem plan writes them")
    try:
        plan = parse_plan(content)
    except RecordError as fault:
        raise ConfigError([f"{path}: {place}: {reason}" for place, reason in fault.problems]) from None
    return load_config({name: value for name, value in block.items() if name not in PARTS}), plan


def _predicted(plan: Plan, path: Path) -> Prediction:
    if plan.predicted is None:
        raise ConfigError(f"{path}: the plan predicts nothing; make it again with megamem plan")
    return plan.predicted


def _given(arguments: argparse.Namespace) -> Iterator[str]:
    yield arguments.plan
    for name in ("html", "profile", "snapshot"):
        if getattr(arguments, name):
            yield from (f"--{name}", getattr(arguments, name))
    if arguments.measured:
        yield from ("--measured", *arguments.measured)


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be written: {fault.strerror or fault}") from None


def _times(config: Config, plan: Plan, path: Path) -> Iterator[Measured]:
    """F, B and W of every stage, predicted and measured."""
    placement = _placement(config, plan)
    found = parse_costs(read_mapping(path))
    # Layers are what `megamem profile` measures, in milliseconds; stages come from a trace, in seconds.
    measured = found if isinstance(found, PipelineCosts) else _in_seconds(found.costs(placement))
    if len(measured.stages) != placement.num_stages:
        raise ConfigError(
            f"{path}: costs of {len(measured.stages)} stages, and the plan has {placement.num_stages}; "
            "profile the model in the plan's layout"
        )
    predicted = costs_of_trace(_predicted(plan, path).timeline(), placement, measured)
    for stage, (ours, theirs) in enumerate(zip(predicted.stages, measured.stages, strict=True)):
        whole = not ours.weight or not theirs.weight
        yield Measured(stage=stage, name="forward", predicted=ours.forward, measured=theirs.forward)
        if whole:
            pairs = [("backward", ours.backward + ours.weight, theirs.backward + theirs.weight)]
        else:
            pairs = [
                ("input gradient", ours.backward, theirs.backward),
                ("weight gradient", ours.weight, theirs.weight),
            ]
        for name, one, other in pairs:
            yield Measured(stage=stage, name=name, predicted=one, measured=other)


def _in_seconds(costs: PipelineCosts) -> PipelineCosts:
    def stage(cost: StageCost) -> StageCost:
        names = ("forward", "backward", "weight", "offload")
        return StageCost(**{**vars(cost), **{name: getattr(cost, name) / 1e3 for name in names}})

    return PipelineCosts(stages=tuple(stage(cost) for cost in costs.stages), comm=costs.comm / 1e3)


def _placement(config: Config, plan: Plan) -> Placement:
    layout = plan.made_for.job.layout
    family = FAMILIES.get(config.schedule.name)
    shape: Shape = "round-robin" if family is None else family.shape
    return Placement(shape=shape, num_ranks=layout.pipeline, num_chunks=layout.chunks)
