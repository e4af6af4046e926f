"""`megamem run SCRIPT`: a training script that does not know of megamem, with megamem switched on in it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megamem.config import add_arguments
from megamem.errors import ConfigError, MegamemError, MissingPackage
from megamem.flags import Request, split_flags
from megamem.host import rank_of

if TYPE_CHECKING:
    from megamem.integrations.door import Door

EXAMPLES = """examples:
  torchrun --nproc-per-node 8 -m megamem run pretrain_gpt.py --megamem megamem.yaml <Megatron-LM's flags>
  torchrun --nproc-per-node 8 -m megamem run pretrain_gpt.py --megamem-activations-policy memo ...
  torchrun --nproc-per-node 8 -m megamem run pretrain_gpt.py --yaml-cfg run.yaml    (it may have a megamem: block)
  torchrun --nproc-per-node 2 -m megamem run --cpu pretrain_gpt.py --distributed-backend gloo ...

SCRIPT is any program that trains with Megatron-Core: Megatron-LM's pretrain_gpt.py from an unmodified checkout, a
Megatron-Bridge script, your own. The --megamem flags may stand before or behind it; it never sees them. megamem is
switched on when the script has made Megatron's parallel groups, and off, with a report, when it ends.
"""

_USES = {"run": "run", "profile": "profile --output profile.json --script"}


def add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "run",
        help="run a training script with megamem switched on",
        description="Run a training script that does not know of megamem, on every rank, with megamem switched on.",
        usage="megamem run [--cpu] [--megamem FILE.yaml] [--megamem-SECTION-OPTION VALUE ...] SCRIPT [ARGUMENT ...]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cpu", action="store_true", help="train on CPU ranks: what Megatron asks of CUDA is mapped to the CPU"
    )
    parser.add_argument("script", metavar="SCRIPT", help="the Python file to run")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="what the script gets")
    add_arguments(parser)
    parser.set_defaults(run=run_script)


def run_script(options: argparse.Namespace) -> int:
    """Run the script as `__main__`. What it raises, SystemExit included, goes on to the caller."""
    typed = [word for key, value in vars(options).items() for word in _typed(key, value)]
    try:
        request, arguments = prepare(Path(options.script), [*typed, *options.arguments], "run")
    except MegamemError:
        if rank_of(os.environ) in (None, 0):
            raise
        return 2  # all ranks see the same; one of them says so
    with rig(options.cpu):
        from megamem.integrations.door import Door

        run_behind(Door(request), Path(options.script), arguments)
    return 0


def prepare(script: Path, words: Sequence[str], command: str) -> tuple[Request, list[str]]:
    """What `words` ask of megamem, and what is left for the script. Raises MegamemError with what is wrong.

    The script's folder becomes the first place where modules are looked for. `command` is megamem's.
    """
    request, arguments = split_flags(words)
    _check(script, arguments, command)
    # As `python script` does; a checkout's own megatron is found from here.
    sys.path[0] = str(script.resolve().parent)
    _check_packages(command)
    return request, arguments


def _typed(key: str, value: object) -> list[str]:
    """A --megamem flag from before the script, as it was typed."""
    is_ours = key.startswith("megamem") and value is not None
    return [f"--{key.replace('_', '-')}={value}"] if is_ours else []


def run_behind(door: Door, script: Path, arguments: Sequence[str]) -> None:
    """Run the script as `__main__`, with what the door switches on. What it raises goes on to the caller."""
    import runpy

    sys.argv = [str(script), *arguments]
    door.open()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code in (None, 0):
            door.close()
        else:
            door.abandon()
        raise
    except BaseException:
        door.abandon()
        raise
    door.close()


def _check(script: Path, arguments: Sequence[str], command: str) -> None:
    """What is wrong with the call, before anything is loaded."""
    if not script.is_file():
        near = "" if script.suffix else f"; did you mean {script}.py?" if script.with_suffix(".py").is_file() else ""
        raise ConfigError(f"{command}: {script} is not a file{near}")
    if rank_of(os.environ) is None and not {"-h", "--help"} & set(arguments):
        raise ConfigError(
            f"{command}: no launcher has started this process (RANK is not set), so it would not know the other ranks; "
            f"start it as  torchrun --nproc-per-node N -m megamem {_USES[command]} {script} ..."
        )


def _check_packages(command: str) -> None:
    for module, package in (("torch", "torch"), ("megatron.core", "megatron-core")):
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:  # the parent package is absent
            found = False
        if not found:
            raise MissingPackage(
                f'{command}: {package} is not installed, and not beside the script; pip install "megamem[train]", or '
                "set PYTHONPATH to where it is"
            )


@contextlib.contextmanager
def rig(on_cpu: bool) -> Iterator[None]:
    """What a script needs that is to train on CPU ranks; nothing where it is not."""
    if not on_cpu:
        yield
        return
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # before torch is imported, where it works best
    from megamem.testing.cpu import cpu_rig
    from megamem.testing.trainers import unblock_trainers

    with cpu_rig(), unblock_trainers():
        yield
