"""The `megamem` command. It starts without torch; a subcommand imports what it needs when it runs.

megamem plan       the settings that train a model fastest on given GPUs, and why
megamem run        run a training script with megamem switched on
megamem doctor     what of megamem works with what is installed here
megamem config     check, resolve and describe configurations
megamem simulate   check, price and draw a pipeline schedule
megamem solve      place the buffers of a memory trace, with a proof
megamem profile    measure a training script, a model's layers, or this machine
megamem report     show what a plan predicts, as an HTML page
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megamem import __version__
from megamem.config import add_arguments, config_from_args, json_schema, options_table
from megamem.errors import MegamemError
from megamem.plan import add_plan
from megamem.plan_report import add_report
from megamem.profile import add_profile
from megamem.run import add_run
from megamem.solve import add_solve

_EXAMPLES = """examples:
  megamem doctor                               is everything here that training needs?
  megamem doctor --json                        the same for a program, or for a bug report
  megamem config --check megamem.yaml          every mistake in a file, at once
  megamem config --resolve megamem.yaml        the file with every default filled in
  megamem config --resolve megamem.yaml --megamem-activations-policy recompute
  megamem config --table                       all options, with values, defaults and meaning
  megamem simulate --schedule gis --stages 4 --microbatches 8 --chunks 2
"""

_SIMULATE_EXAMPLES = """examples:
  megamem simulate --list
  megamem simulate --schedule zb-h1 --stages 4 --microbatches 8
  megamem simulate --schedule gis-h --stages 8 --microbatches 32 --chunks 4 --svg gis-h.svg --perfetto gis-h.json
  megamem simulate --schedule auto --stages 8 --microbatches 32 --memory-limit 5 --json
  megamem simulate --schedule zb-2p --stages 8 --microbatches 24 --forward 18.5 --backward 18.1 --weight 9.3 --comm 0.6
  megamem simulate --schedule gis --stages 8 --microbatches 32 --chunks 4 --activation-bytes 3GiB --memory-limit 30GiB
  megamem simulate --schedule zb-h1 --stages 2 --microbatches 4 --text > mine.txt   (edit it)
  megamem simulate --file mine.txt

Costs are per rank and microbatch, divided by the chunks; --comm is per hop between ranks, and is not divided. The
memory of an activation is taken when F starts; B gives back what is not needed for W. A limit without a unit is in the
unit of the activations: microbatches per rank, or bytes with --activation-bytes. What the simulator ignores is said in
megamem/planner/schedules/simulator.py: contention, launch times, receive buffers, everything outside the schedule.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0 (fine), 1 (doctor is not green) or 2 (a mistake, told on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except MegamemError as fault:
        print(f"megamem: {fault}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `megamem config --table | head`
        sys.stderr.close()
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megamem",
        description="Train longer sequences on the GPUs you have: a plug-in for Megatron-style trainers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megamem {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_run(commands)
    add_plan(commands)
    _add_doctor(commands)
    _add_config(commands)
    _add_simulate(commands)
    add_solve(commands)
    add_profile(commands)
    add_report(commands)
    return parser


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what of megamem works with what is installed here",
        description="Say what of megamem works with what is installed here, and how to get what is missing. "
        "The exit status is 0 when all that the capabilities need is there.",
    )
    form = doctor.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--markdown", action="store_true", help="print the ledger of patches (patches/README.md)")
    doctor.set_defaults(run=_doctor)


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    config = commands.add_parser(
        "config",
        help="check, resolve and describe configurations",
        description="Check, resolve and describe configurations. The --megamem flags below work here as they do on the "
        "command line of a trainer.",
    )
    what = config.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="FILE", help="report every mistake in a file")
    what.add_argument(
        "--resolve",
        metavar="FILE",
        nargs="?",
        const="",
        help="print a file (default: no file) with all values filled in",
    )
    what.add_argument("--schema", action="store_true", help="print the JSON Schema, for editors that check YAML")
    what.add_argument("--table", action="store_true", help="print all options as a Markdown table")
    add_arguments(config)
    config.set_defaults(run=_config)


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="check, price and draw a pipeline schedule",
        description="Build a pipeline schedule, or read one from a file; prove that it is complete and cannot "
        "deadlock; say how long it takes, how much of that is bubble, and how much activation memory every rank needs.",
        epilog=_SIMULATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = simulate.add_argument_group("the schedule")
    what.add_argument("--schedule", metavar="NAME", help="its name (see --list), or auto")
    what.add_argument("--stages", metavar="P", type=int, help="pipeline ranks")
    what.add_argument("--microbatches", metavar="M", type=int, help="microbatches per step and pipeline")
    what.add_argument("--chunks", metavar="V", type=int, help="model chunks per rank (default: the schedule's fewest)")
    what.add_argument("--group", metavar="G", type=int, help="microbatches per turn of a chunk (gis, interleaved)")
    what.add_argument(
        "--vocabulary", metavar="B", type=int, choices=(1, 2), help="vocabulary parallelism with 1 or 2 barriers"
    )
    what.add_argument("--file", metavar="FILE", help="read the schedule from its text form instead")
    what.add_argument("--list", action="store_true", help="list the schedules and exit")
    costs = simulate.add_argument_group("costs")
    costs.add_argument("--forward", metavar="T", type=float, help="time of a forward pass (default 1)")
    costs.add_argument("--backward", metavar="T", type=float, help="time of the gradient of the input (default 1)")
    costs.add_argument("--weight", metavar="T", type=float, help="time of the gradient of the weights (default 1)")
    costs.add_argument("--comm", metavar="T", type=float, help="latency of a hop between ranks (default 0)")
    costs.add_argument(
        "--offload", metavar="T", type=float, help="time to copy the activation out, or back (default 0)"
    )
    costs.add_argument(
        "--output-layer",
        metavar="T",
        type=float,
        help="time of each of the output layer's three GEMMs: on the last stage, or shared by --vocabulary (default 0)",
    )
    costs.add_argument(
        "--costs", metavar="FILE", help="costs of every stage or layer, YAML or JSON, instead of all these"
    )
    costs.add_argument("--activation-bytes", metavar="N", help="activations of one microbatch on one rank, e.g. 3GiB")
    costs.add_argument("--weight-grad-bytes", metavar="N", help="of these, what W still needs after B (default: all)")
    costs.add_argument(
        "--memory-limit", metavar="X", help="activation memory per rank: 4.5, or 40GiB; refuse what exceeds"
    )
    output = simulate.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the figures and the order as JSON")
    form.add_argument("--text", action="store_true", help="print the schedule in its text form, to edit or to report")
    output.add_argument("--svg", metavar="FILE", help="write a picture")
    output.add_argument("--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev")
    simulate.set_defaults(run=_simulate)


def _doctor(arguments: argparse.Namespace) -> int:
    from megamem import doctor

    if arguments.markdown:
        print(doctor.patches_ledger(), end="")
        return 0
    report = doctor.examine()
    print(report.to_json() if arguments.json else report.to_text(), end="")
    return 0 if report.is_green else 1


def _config(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        import json

        print(json.dumps(json_schema(), indent=2))
    elif arguments.table:
        print(options_table(), end="")
    else:
        # The file may be given to --check and --resolve or, as trainers take it, to --megamem.
        arguments.megamem = arguments.check or arguments.resolve or arguments.megamem
        config = config_from_args(arguments)
        if arguments.check:
            print(f"{arguments.check}: valid; switched on: {', '.join(config.enabled) or 'nothing'}")
        else:
            print(config.to_yaml(), end="")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from megamem import simulate

    return simulate.run(arguments)
