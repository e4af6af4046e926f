"""The `megamem` command. It starts without torch; a subcommand imports what it needs when it runs.

megamem doctor     what of megamem works with what is installed here
megamem config     check, resolve and describe configurations
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megamem import __version__
from megamem.config import add_arguments, config_from_args, json_schema, options_table
from megamem.errors import MegamemError

_EXAMPLES = """examples:
  megamem doctor                               is everything here that training needs?
  megamem doctor --json                        the same for a program, or for a bug report
  megamem config --check megamem.yaml          every mistake in a file, at once
  megamem config --resolve megamem.yaml        the file with every default filled in
  megamem config --resolve megamem.yaml --megamem-activations-policy recompute
  megamem config --table                       all options, with values, defaults and meaning
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
    _add_doctor(commands)
    _add_config(commands)
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
