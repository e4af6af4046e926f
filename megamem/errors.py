"""Everything megamem raises on purpose.

    MegamemError
     |- ConfigError        the user's configuration is wrong; lists every problem at once   (also a ValueError)
     |- PatchError         a patch cannot be applied or undone safely
     |- UnsupportedError   this model or Megatron setting does not work with the capability
     |- MissingPackage     an optional package that the asked-for feature needs is absent   (also an ImportError)
     |- ScheduleError      a pipeline schedule is malformed, incomplete, or would deadlock   (also a ValueError)
     |   `- InfeasibleError    no schedule of this kind meets the request; says the nearest one that can be met
     |- AllocationError    a memory-allocation problem, or a solution of one, is malformed   (also a ValueError)
     |   `- CapacityError      the buffers do not fit into the capacity; says which of them, and what is needed
     |- NativeError        the compiled core cannot be built or loaded; says how to get a compiler
     |- PipelineError      a rank failed while it ran a schedule; says which, and in which action
     |- NotLiveError       a capability is switched on but did nothing in the first step
     `- ActivationError    a saved activation was used in a way that would give wrong gradients

Catch `MegamemError` to catch them all. Messages say who, what, and what to do now.
"""

from collections.abc import Sequence
from typing import Any


class MegamemError(Exception):
    """Root of megamem's exceptions."""


class ConfigError(MegamemError, ValueError):
    """The configuration is wrong. `problems` holds one sentence per fault; the message shows them all."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the megamem configuration:\n  - "
        super().__init__(head + "\n  - ".join(self.problems))


class PatchError(MegamemError, RuntimeError):
    """A patch cannot be applied or undone safely; the message names the patch and the remedy."""


class UnsupportedError(MegamemError, RuntimeError):
    """The model or a trainer setting does not work together with the capability that was asked for."""


class MissingPackage(MegamemError, ImportError):  # noqa: N818 - named after what it says
    """An optional package is needed by the feature that was asked for; the message says how to install it."""


class ScheduleError(MegamemError, ValueError):
    """A pipeline schedule is malformed, incomplete, or cannot run to its end."""


class InfeasibleError(ScheduleError):
    """The request cannot be met; the message holds the arithmetic and the nearest setting that can be."""


class AllocationError(MegamemError, ValueError):
    """A memory-allocation problem or its file is malformed, or a solution puts two live buffers on the same bytes."""


class CapacityError(AllocationError):
    """The buffers cannot be placed within the capacity; the message holds the buffers that prove it.

    `outcome` is the best solution that was found all the same, where a solver raises this.
    """

    outcome: Any = None  # a megamem.planner.allocation.solver.Outcome


class NativeError(MegamemError, RuntimeError):
    """The compiled core cannot be built or loaded on this machine; the message holds the remedy."""


class PipelineError(MegamemError, RuntimeError):
    """A pipeline rank failed during a step; the message names the rank and the action."""


class NotLiveError(MegamemError, RuntimeError):
    """A capability is switched on, a step has run, and the capability took no part in it."""


class ActivationError(MegamemError, RuntimeError):
    """A swapped or recomputed activation cannot be given back faithfully."""
