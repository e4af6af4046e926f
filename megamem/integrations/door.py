"""A way into scripts that do not know of megamem: it is switched on when Megatron's parallel groups are there.

    door = Door(request)
    door.open()              # nothing is imported yet; the script's own imports are waited for
    runpy.run_path(script)   # initialize_model_parallel switches megamem on, the first step checks that it is live
    door.close()             # the report, and everything restored

Torch is not imported before the script imports it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megamem.config import add_arguments
from megamem.errors import NotLiveError
from megamem.flags import Request
from megamem.host import rank_of
from megamem.integrations.after_import import AfterImport
from megamem.patches import DOORS
from megamem.patches.registry import Patch, apply
from megamem.runtime.door import AbstractDoor

if TYPE_CHECKING:
    from megamem.integrations.megatron_core import Handle
    from megamem.integrations.metering import Meter
    from megamem.integrations.this_job import KnownJob
    from megamem.patches.registry import Applied


class Door(AbstractDoor):
    """Switches `request` on in the script that runs in this process, and off again.

    request:  what is to be switched on; a trainer's own configuration may add to it (`take`)
    handle:   megamem, while it is on
    job:      what the script trains, where its own configuration has told; Megatron-LM's arguments are found later
    stays:    whether the script may make groups again when it has destroyed them
    """

    def __init__(self, request: Request | None = None, *, stays: bool = True) -> None:
        self.request, self._stays = request or Request(), stays
        self.handle: Handle | None = None
        self.job: KnownJob | None = None
        self._was_on = False
        self._applied: list[Applied] = []
        self._imports: AfterImport | None = None

    @staticmethod
    def current() -> Door | None:
        """The door that is open in this process."""
        owners = (getattr(finder, "owner", None) for finder in sys.meta_path)
        return next((owner for owner in owners if isinstance(owner, Door)), None)

    def open(self, doors: Sequence[str] = tuple(DOORS)) -> None:
        """Wait for the script's imports, and apply the patches of these `DOORS` when they come.

        Raises PatchError where they do not fit what is there already.
        """
        by_module: dict[str, list[Patch]] = {}
        for name in doors:
            for patch in DOORS[name]:
                by_module.setdefault(patch.module, []).append(patch.bound(self))
        actions = {name: self._applier(found) for name, found in by_module.items()}
        self._imports = AfterImport(actions, owner=self)
        self.take(self.request)

    def take(self, request: Request) -> None:
        """Switch `request` on, now if the groups are there already; what an earlier run has left on is switched off."""
        if self.handle is not None:
            self.handle.disable()
            self.handle = None
        self.request = request
        if self._has_groups():
            self.on_groups()

    @staticmethod
    def _has_groups() -> bool:
        """Whether the script has made its parallel groups already."""
        parallel_state = sys.modules.get("megatron.core.parallel_state")
        return parallel_state is not None and bool(parallel_state.model_parallel_is_initialized())

    def _applier(self, patches: list[Patch]) -> Callable[[], None]:
        return lambda: self._applied.append(apply(patches))

    def on_groups(self) -> None:
        if self.handle is not None:  # groups of another model, beside the one that trains
            return
        from megamem.integrations.megatron_core import enable

        if self.request.config.enabled:
            self.handle = enable(self.request.config, origins=self.request.origins, job=self.job)
            self._was_on = True

    def on_groups_gone(self) -> None:
        self._switch_off()
        if not self._stays:
            self.abandon()

    def known_meter(self) -> Meter | None:
        """What counts the activations of the script's model already, where something does."""
        return None if self.handle is None else self.handle.meter()

    def make_way(self) -> None:
        """megamem is about to be switched on, by this door or by the script itself."""

    def adopt(self, handle: Handle) -> None:
        """megamem is on, whoever has switched it on."""

    def add_flags(self, parser: Any) -> Any:
        add_arguments(parser, default=argparse.SUPPRESS)
        parser.set_defaults(**self.request.values)  # so that the trainer's dump of arguments shows them
        return parser

    def on_config(self, config: Any) -> bool:
        from megamem.integrations.bridge import attach

        is_new = not hasattr(config, "megamem")
        if is_new:
            attach(config)
        return is_new

    def close(self) -> None:
        """The script has ended: say what was done, and restore everything.

        Raises NotLiveError if something was to be switched on, and the script never made Megatron's parallel groups.
        """
        self._switch_off()
        self.abandon()
        if self._was_on:
            return
        if wanted := self.request.config.enabled:
            raise NotLiveError(
                f"{', '.join(wanted)} was to be switched on, and the script has ended without "
                "megatron.core.parallel_state.initialize_model_parallel, where that happens; does it train with "
                "Megatron-Core?"
            )
        say("megamem: nothing was switched on; no --megamem flag and no megamem: block has asked for anything")

    def abandon(self) -> None:
        """Restore everything, and say nothing: the script has failed, and its own error is what matters."""
        if self._imports is not None:
            self._imports.close()
        if self.handle is not None:
            self.handle.disable()
            self.handle = None
        while self._applied:
            self._applied.pop().revert()

    def _switch_off(self) -> None:
        if self.handle is None:
            return
        say(f"megamem: what it did on rank 0\n{self.handle.report()}")
        self.handle.disable()
        self.handle = None


def say(text: str) -> None:
    """Print on one rank."""
    if is_main_rank():
        print(text, flush=True)


def is_main_rank() -> bool:
    """Whether this process is the one that talks; before there are process groups, too."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank()) == 0
    return rank_of(os.environ) in (None, 0)
