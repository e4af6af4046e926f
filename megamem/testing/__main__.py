"""Run an unmodified Megatron script on CPU with gloo.

    torchrun --nproc-per-node 2 -m megamem.testing pretrain_gpt.py --distributed-backend gloo --transformer-impl local
    ...

The script runs as `__main__` under `cpu_rig`, and what stops Megatron-LM and Megatron-Bridge without a GPU is taken
out of the way (`trainers`). `megamem run --cpu` does the same, with megamem switched on.
"""

import argparse
import os
import runpy
import sys
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
    from megamem.testing.trainers import unblock_trainers

    sys.argv = [str(script), *options.arguments]
    with cpu_rig(claim_cuda=options.claim_cuda), unblock_trainers():
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


if __name__ == "__main__":
    main()
