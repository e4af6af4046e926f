"""Run an unmodified Megatron script on CPU with gloo.

    torchrun --nproc-per-node 2 -m megamem.testing pretrain_gpt.py --distributed-backend gloo --transformer-impl local
    ...

The script runs as `__main__` under `cpu_rig`. If it comes with `megatron.training` (a Megatron-LM checkout), what
stops that package without a GPU is taken out of the way first: its demand for CUDA, its compilation of CUDA helpers,
and on Python 3.11 an import of `typing.override`.
"""

import argparse
import functools
import inspect
import os
import runpy
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

_NEEDED = {"torch": "torch", "megatron.core": "megatron-core"}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m megamem.testing`."""
    parser = argparse.ArgumentParser(
        prog="python -m megamem.testing",
        description="Run an unmodified Megatron script on CPU with gloo, usually one process per rank under torchrun.",
        epilog="example: torchrun --nproc-per-node 2 -m megamem.testing pretrain_gpt.py --transformer-impl local ...",
    )
    parser.add_argument("--claim-cuda", action="store_true", help="make torch.cuda.is_available() answer True")
    parser.add_argument("script", help="the Python file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script gets")
    options = parser.parse_args(argv)
    script = Path(options.script)
    if not script.is_file():
        parser.error(f"{script} is not a file")
    sys.path[0] = str(script.resolve().parent)  # as `python script` does; a checkout's own megatron is found from here
    _check_packages(parser)

    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # before torch is imported, where it works best
    from megamem.testing.cpu import cpu_rig

    sys.argv = [str(script), *options.arguments]
    with cpu_rig(claim_cuda=options.claim_cuda):
        _unblock_training()
        runpy.run_path(str(script), run_name="__main__")


def _check_packages(parser: argparse.ArgumentParser) -> None:
    for module, package in _NEEDED.items():
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:  # the parent package is absent
            found = False
        if not found:
            remedy = "install it with: pip install 'megamem[train]'"
            parser.exit(2, f"{parser.prog}: {package} is not installed; {remedy}\n")


def _unblock_training() -> None:
    """Patches of `megatron.training`, for the life of this process (which is the script's)."""
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined,unused-ignore]
    if find_spec("megatron.training") is None:
        return
    from megatron import training
    from megatron.training import initialize
    from megatron.training import training as loop

    real = initialize.initialize_megatron
    if "allow_no_cuda" in inspect.signature(real).parameters:
        permissive = functools.partial(real, allow_no_cuda=True)
        for module in (initialize, loop, training):
            if getattr(module, "initialize_megatron", None) is real:
                module.initialize_megatron = permissive
    if hasattr(initialize, "_compile_dependencies"):
        initialize._compile_dependencies = lambda: None


if __name__ == "__main__":
    main()
