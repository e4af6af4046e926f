"""Queues, events and copies: the only way in which the activation engine touches a device.

A device has three queues, as in MEMO (arXiv 2407.12117, section on rounding buffers and streams):

    compute    the stream that the model runs on; it also owns all device memory
    to_host    device -> host copies (D2H)
    to_device  host -> device copies (H2D)

Work on one queue runs in the order it was issued. Nothing orders two queues but `record` and `wait`:

    to_host.wait(compute.record())      # what is copied from here on sees what was computed up to here

Nothing in this interface makes the host wait. Device memory is allocated on `compute` only, since blocks of the
caching allocator cannot migrate between the pools of two streams (TransformerEngine's reasoning), and goes back in
the order of `compute` too: the holder of a reference makes `compute` wait for the copy and then drops the reference,
so `Tensor.record_stream`, which gives memory back at unpredictable times, is never needed.

Backends, each final: `HostDevice` (here), `CudaDevice` (`streams_cuda.py`) and, for tests, `SimulatedDevice`
(`megamem/testing/streams.py`), which runs every copy at the worst moment that the recorded waits allow.

**Events and their pool.** An event is a point on one stream, numbered along it. CUDA events are expensive to create,
so each stream keeps a pool of them: one goes back when the last reference to the `AbstractEvent` is dropped, and may
be recorded again from then on. That is safe because a wait, once issued, refers to the recording that it saw, and not
to the event object. A fixed ring would be no cheaper, and would be wrong for parcels that outlive its length, as they
do with many microbatches in flight.
"""

from __future__ import annotations

import contextlib
import mmap
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor

NO_RESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
"""MAP_NORESERVE, which Python 3.11 does not name: an arena that is larger than what will be touched is no mistake."""

_CPU = torch.device("cpu")  # a name would be parsed in every call


class AbstractEvent(ABC):
    """A point on a stream: everything issued to `stream` before it was recorded, and nothing later."""

    __slots__ = ()

    @property
    @abstractmethod
    def stream(self) -> AbstractStream:
        """The stream that this is a point of."""

    @property
    @abstractmethod
    def number(self) -> int:
        """Position along the stream; of two events of one stream, the higher number is done no earlier."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the point has been passed. Never blocks; never turns back from True to False."""


class AbstractStream(ABC):
    """A queue of work that runs in the order in which it was issued, beside the host and the other queues."""

    @abstractmethod
    def record(self) -> AbstractEvent:
        """The point behind everything issued so far."""

    @abstractmethod
    def wait(self, event: AbstractEvent) -> None:
        """Let what is issued to this stream from now on run after `event`; the host does not wait."""

    @abstractmethod
    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Issue one copy per (destination, source); each pair is dense and equal in shape and dtype.

        The caller keeps both sides of each copy alive and unchanged until an event behind it has been waited for.
        """

    @final
    def copy(self, dst: Tensor, src: Tensor) -> None:
        """Issue one copy; see `copy_all`."""
        self.copy_all(((dst, src),))


class AbstractDevice(ABC):
    """A device as the activation engine sees it: three queues, memory, and the host memory that it can copy to."""

    @property
    @abstractmethod
    def compute(self) -> AbstractStream:
        """The stream that the model runs on."""

    @property
    @abstractmethod
    def to_host(self) -> AbstractStream:
        """The stream for device -> host copies."""

    @property
    @abstractmethod
    def to_device(self) -> AbstractStream:
        """The stream for host -> device copies."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Unfilled device memory, allocated on `compute`.

        Earlier work on `compute` may still be using that memory: another stream that fills it must first wait for
        an event recorded on `compute` after this call.
        """

    @abstractmethod
    def discard(self, tensors: Sequence[Tensor]) -> None:
        """Say that the caller drops its references to these tensors right after this call.

        `compute` must have waited for every copy that touches them. Only the simulator does anything here.
        """

    @abstractmethod
    def host_buffer(self, nbytes: int) -> Tensor:
        """Host memory that copies may run to and from asynchronously, as uint8; it may be shorter than asked for.

        The memory is given back when the last tensor over it is dropped. Slow: once per run.
        """

    @abstractmethod
    def claim_host(self, block: Tensor, start: int, nbytes: int) -> None:
        """Say that bytes `start` to `start + nbytes` of a host buffer have a new tenant. For the simulator only."""

    @abstractmethod
    def release_host(self, block: Tensor, start: int, nbytes: int, after: AbstractEvent | None) -> None:
        """Say that their tenant leaves as soon as `after` is done. For the simulator only."""

    @abstractmethod
    def stall_ms(self) -> float:
        """Milliseconds that `compute` has stood still in `wait`; 0 where it is not measured.

        May make the host wait for the device: for reports, not for the hot path.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Make the host wait until all three queues are empty: for tests and shutdown."""


def map_pages(nbytes: int, alignment: int = mmap.PAGESIZE) -> tuple[Tensor, memoryview]:
    """`nbytes` > 0 of zeroed private memory as uint8, aligned, or half as much until the system allows it.

    Pages that are never touched cost nothing.

    Not `torch.empty`, which writes to all of it under `torch.use_deterministic_algorithms`. Huge pages are asked for
    where the system has them. The view lives as long as the memory is referred to: a finalizer on it that holds
    `view.obj` runs before the memory is unmapped. Raises OSError where not even 1 MiB can be had.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    while True:
        try:
            pages = mmap.mmap(-1, nbytes + alignment, flags=flags)
            break
        except OSError:
            nbytes //= 2
            if nbytes < 1 << 20:
                raise
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: ordinary ones do
            pages.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(pages)
    whole = torch.frombuffer(view, dtype=torch.uint8)
    skip = -whole.data_ptr() % alignment
    return whole[skip : skip + nbytes], view


@final
class HostEvent(AbstractEvent):
    """A point that is always in the past."""

    __slots__ = ("_number", "_stream")

    def __init__(self, stream: HostStream, number: int) -> None:
        self._stream = stream
        self._number = number

    @property
    def stream(self) -> HostStream:
        return self._stream

    @property
    def number(self) -> int:
        return self._number

    def done(self) -> bool:
        return True


@final
class HostStream(AbstractStream):
    """A queue whose work is over when the call that issues it returns."""

    def __init__(self) -> None:
        self._number = 0

    def record(self) -> HostEvent:
        self._number += 1
        return HostEvent(self, self._number)

    def wait(self, event: AbstractEvent) -> None:
        pass

    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        destinations, sources = zip(*pairs, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(destinations, sources)  # one call into torch for all of them


@final
class HostDevice(AbstractDevice):
    """The processor as its own device: copies are done at once. What training on the CPU rig runs on."""

    def __init__(self) -> None:
        self._streams = (HostStream(), HostStream(), HostStream())

    @property
    def compute(self) -> HostStream:
        return self._streams[0]

    @property
    def to_host(self) -> HostStream:
        return self._streams[1]

    @property
    def to_device(self) -> HostStream:
        return self._streams[2]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=_CPU)

    def discard(self, tensors: Sequence[Tensor]) -> None:
        pass

    def host_buffer(self, nbytes: int) -> Tensor:
        return map_pages(nbytes)[0]

    def claim_host(self, block: Tensor, start: int, nbytes: int) -> None:
        pass

    def release_host(self, block: Tensor, start: int, nbytes: int, after: AbstractEvent | None) -> None:
        pass

    def stall_ms(self) -> float:
        return 0.0

    def synchronize(self) -> None:
        pass
