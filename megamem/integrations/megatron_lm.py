"""Megatron-LM's own scripts with the `--megamem*` flags in them, instead of `megamem run`.

    from megamem.integrations import megatron_lm

    megatron_lm.install()        # before the script imports Megatron; see patches/megatron_lm

The flags are in the script's parser, under a group of their own. What they ask for is switched on when the parallel
groups have been made, and reported when the script ends.
"""

from __future__ import annotations

import atexit
import sys

from megamem.errors import MegamemError
from megamem.flags import split_flags
from megamem.integrations.door import Door, is_main_rank


def install() -> None:
    """Let this script take the `--megamem*` flags of its command line. Ends it where they are wrong.

    Under `megamem run`, which has read them already, it does nothing.
    """
    if Door.current() is not None:
        return
    try:
        request, _ = split_flags(sys.argv[1:])
        door = Door(request)
        door.open()
    except MegamemError as fault:
        raise SystemExit(f"megamem: {fault}" if is_main_rank() else 2) from None
    atexit.register(_finish, door)


def _finish(door: Door) -> None:
    """At the end of the process, when it ends well; what went wrong has been told otherwise."""
    if hasattr(sys, "last_value"):
        door.abandon()
        return
    try:
        door.close()
    except MegamemError as fault:
        if is_main_rank():
            print(f"megamem: {fault}", file=sys.stderr)
