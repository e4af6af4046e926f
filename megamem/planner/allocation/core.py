"""The two inner loops of the solvers, in two versions that give the same answers: compiled, and in plain Python.

    first_fit          place buffers one after the other in a given order
    search             look for a placement within a capacity, exhaustively up to a number of nodes

All sizes, offsets and capacities here are in units of the sweep. `watch` is called now and then; True asks to stop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from megamem.errors import NativeError
from megamem.planner.allocation.sweep import Sweep

Watch = Callable[[], bool]
Status = Literal["found", "none", "limit", "stopped"]


def never() -> bool:
    """A watch that lets everything run to its end."""
    return False


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found. `offsets` is set when the status is `found`; `none` is a proof that there is nothing."""

    status: Status
    nodes: int
    offsets: Sequence[int] | None = None


class Core(ABC):
    """The inner loops."""

    name: ClassVar[str]

    @abstractmethod
    def first_fit(
        self, sweep: Sweep, order: Sequence[int], *, best_fit: bool = False, watch: Watch = never
    ) -> Sequence[int] | None:
        """Offsets of the buffers placed in `order`, each in the lowest gap that holds it (or the smallest, with
        `best_fit`, the lowest of equals); None when stopped."""

    @abstractmethod
    def search(
        self,
        sweep: Sweep,
        capacity: int,
        preorder: Sequence[int],
        *,
        max_nodes: int,
        fullest_first: bool = False,
        watch: Watch = never,
    ) -> SearchResult:
        """Depth-first search over canonical placements within `capacity`; `preorder` says what is tried first.

        With `fullest_first` it comes second to the units that are yet to be placed in the fullest section of a buffer,
        which are counted anew for every part that the problem falls into.
        """


def best_core() -> tuple[Core, str]:
    """The compiled core, or its Python twin together with the reason why the compiled one is not to be had."""
    try:
        from megamem.planner.allocation.native_core import NativeCore

        return NativeCore(), ""
    except NativeError as fault:
        from megamem.planner.allocation.python_core import PythonCore

        return PythonCore(), str(fault)
