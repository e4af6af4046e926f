"""The inner loops, compiled (`megamem/native/src`)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, ClassVar

from megamem import native
from megamem.planner.allocation.core import Core, SearchResult, Status, Watch, never
from megamem.planner.allocation.sweep import Sweep

_STATUS: tuple[Status, ...] = ("found", "none", "limit", "stopped")
_NO_MEMORY = 4


class _Poll:
    """A `Watch` as the C function that the library calls. An exception in it, such as a KeyboardInterrupt, stops the
    computation and is raised again once the library has returned: none may pass through C++."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._raised: BaseException | None = None
        self.function = native.Poll(self._call)

    def _call(self, _nodes: int) -> int:
        try:
            return int(self._watch())
        except BaseException as fault:
            self._raised = fault
            return 1

    def check(self, status: int) -> Status:
        if self._raised is not None:
            raise self._raised
        if status == _NO_MEMORY:
            raise MemoryError("the allocation solver's compiled core ran out of memory")
        return _STATUS[status]


class NativeCore(Core):
    """Calls the library. Raises NativeError, with the remedy, where it cannot be built."""

    name: ClassVar[str] = "native"

    def __init__(self) -> None:
        self._library = native.load()

    def first_fit(
        self, sweep: Sweep, order: Sequence[int], *, best_fit: bool = False, watch: Watch = never
    ) -> Sequence[int] | None:
        offsets = array("q", bytes(8 * len(sweep)))
        poll = _Poll(watch)
        status = self._library.megamem_first_fit(
            *_instance(sweep), _int32s(array("i", order)), int(best_fit), _int64s(offsets), poll.function
        )
        return offsets if poll.check(status) == "found" else None

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
        offsets, nodes = array("q", bytes(8 * len(sweep))), ctypes.c_uint64()
        poll = _Poll(watch)
        code = self._library.megamem_canonical_search(
            *_instance(sweep), capacity, _int32s(array("i", preorder)), int(fullest_first), max_nodes,
            _int64s(offsets), ctypes.byref(nodes), poll.function,
        )  # fmt: skip
        status = poll.check(code)
        return SearchResult(status=status, nodes=nodes.value, offsets=offsets if status == "found" else None)


def _instance(sweep: Sweep) -> tuple[Any, ...]:
    return len(sweep), _int32s(sweep.first), _int32s(sweep.last), _int64s(sweep.size)


def _int32s(values: array[int]) -> Any:
    return (ctypes.c_int32 * len(values)).from_buffer(values)


def _int64s(values: array[int]) -> Any:
    return (ctypes.c_int64 * len(values)).from_buffer(values)
