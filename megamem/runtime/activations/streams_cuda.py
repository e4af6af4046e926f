"""The CUDA backend of `streams`: real streams, asynchronous copies, no host synchronisation, no `record_stream`.

Choices, and what they answer to:

* Copies are issued in pieces of `chunk_bytes` (64 MiB). On a GPU that shares one copy engine between two queues, or
  one link between two GPUs, an urgent reload then waits for at most one piece of a bulk store.
* Host memory is mapped, touched and registered with CUDA here, slice by slice, instead of asking torch's pinned
  allocator, which rounds each request up to a power of two and keeps it. torch recognises registered memory as
  pinned, copies from and to it are truly asynchronous, and torch records no event for it: reuse is guarded by
  `HostArena`. A single copy must not cross two registrations (CUDA refuses it), so pieces are cut at multiples of
  `chunk_bytes` counted from the start of the block, and slices are a multiple of that.
* `compute` is one stream for the life of the device, by default the current one. Memory is owned by the stream that
  it was allocated on, so that computing on another stream would break every ordering here: it is refused.
* Events come from a pool per stream (see `streams`), without timing. With `profile=True` each wait of `compute` is
  enclosed by a pair of timing events, which are read, without waiting, once they have passed; `stall_ms` alone waits.

Known weakness: with CUDA_DEVICE_MAX_CONNECTIONS=1 (Megatron asks for it to overlap tensor-parallel communication
before Blackwell) all streams share one hardware queue, in which only the order of issue is kept: a copy can hold up
kernels issued behind it although nothing orders them. Results are right; overlap suffers. The log says so, once.

Importing this module needs no GPU; `CudaDevice()` does.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor

from megamem.errors import UnsupportedError
from megamem.runtime.activations.streams import AbstractDevice, AbstractEvent, AbstractStream, map_pages

DEFAULT_CHUNK_NBYTES = 64 << 20
HUGE_PAGE_NBYTES = 2 << 20
SLICE_NBYTES = 1 << 30
"""Host memory is pinned in slices of about this size, so that a refusal costs one slice and progress can be shown."""

_log = logging.getLogger("megamem")
_said: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def piece_bounds(skip: int, nbytes: int, chunk: int) -> list[tuple[int, int]]:
    """Divide `nbytes` that start `skip` bytes into a chunk where chunks end: (start, stop) of each piece."""
    ends = [*range(chunk - skip, nbytes, chunk), nbytes]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _clear_error() -> None:
    """Swallow the error that a refused CUDA call leaves behind; the next kernel launch would report it as its own."""
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError as error:
        _log.debug("cleared a CUDA error: %s", error)


def _pin(memory: Tensor, slice_nbytes: int) -> list[tuple[int, int]]:
    """Touch and register page-aligned memory slice by slice until one is refused; (address, nbytes) of each done."""
    done: list[tuple[int, int]] = []
    total = memory.numel()
    for start in range(0, total, slice_nbytes):
        piece = memory[start : start + slice_nbytes]
        size = -(-piece.numel() // mmap.PAGESIZE) * mmap.PAGESIZE  # within the map, which has room for alignment
        piece[:: mmap.PAGESIZE] = 0  # by all threads of torch; the driver's own touch would use one
        try:
            status = int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), size, 0))  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            _log.debug("cudaHostRegister: %s", error)
            status = -1
        if status != 0:
            _clear_error()
            _log.debug("cudaHostRegister refused bytes %d to %d with error %d", start, start + size, status)
            break
        done.append((piece.data_ptr(), piece.numel()))
        if total > 8 * slice_nbytes and len(done) % max(total // slice_nbytes // 8, 1) == 0:
            _log.info("host memory: %.0f of %.0f GiB pinned", (start + piece.numel()) / 2**30, total / 2**30)
    return done


def _unpin(
    pages: mmap.mmap,
    done: Sequence[tuple[int, int]],
    blocks: list[tuple[int, int]],
    block: tuple[int, int],
    index: int,
    owner: int,
) -> None:
    """Undo `_pin`, before `pages`, which this call keeps alive, are unmapped; copies that still run are waited for."""
    if os.getpid() != owner:
        return
    blocks.remove(block)
    torch.cuda.synchronize(index)
    for address, _ in done:
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


@final
class CudaEvent(AbstractEvent):
    """A point on a CUDA stream. Its CUDA event goes back to the pool of the stream with the last reference to this."""

    __slots__ = ("_number", "_stream", "raw")

    def __init__(self, stream: CudaStream, number: int, raw: torch.cuda.Event) -> None:
        self._stream = stream
        self._number = number
        self.raw = raw

    @property
    def stream(self) -> CudaStream:
        return self._stream

    @property
    def number(self) -> int:
        return self._number

    def done(self) -> bool:
        return bool(self.raw.query())  # type: ignore[no-untyped-call]

    def __del__(self) -> None:
        # An append is atomic, so any thread and any moment will do. A wait that was issued is not affected when the
        # CUDA event is recorded again: it refers to the recording that it saw.
        self._stream.pool.append(self.raw)


@final
class CudaStream(AbstractStream):
    """A CUDA stream of `device`. `is_compute` is the one that the model runs on, and may be watched for stalls."""

    def __init__(self, device: CudaDevice, raw: torch.cuda.Stream, is_compute: bool) -> None:
        # Not the device itself: streams and events outlive it, and no cycle should delay the end of its memory.
        self._index = device.index
        self._chunk = device.chunk_bytes
        self._blocks = device.blocks
        self._stalls = device.stalls
        self._is_compute = is_compute
        self._number = 0
        self.raw = raw
        self.pool: deque[torch.cuda.Event] = deque()

    def record(self) -> CudaEvent:
        if self._is_compute:
            self.check_current()
        try:
            raw = self.pool.pop()
        except IndexError:
            raw = torch.cuda.Event()  # type: ignore[no-untyped-call]
        raw.record(self.raw)
        self._number += 1
        return CudaEvent(self, self._number, raw)

    def wait(self, event: AbstractEvent) -> None:
        assert isinstance(event, CudaEvent)
        if not self._is_compute:
            self.raw.wait_event(event.raw)
            return
        self.check_current()
        stalls = self._stalls
        if stalls is None:
            self.raw.wait_event(event.raw)
        else:
            begin = stalls.mark(self.raw)
            self.raw.wait_event(event.raw)
            stalls.add(begin, stalls.mark(self.raw))

    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        if self._is_compute:
            self.check_current()
        with torch.no_grad(), torch.cuda.stream(self.raw):
            for dst, src in pairs:
                nbytes = src.numel() * src.element_size()
                skip = self._offset_in_block(dst if src.is_cuda else src) % self._chunk
                if skip + nbytes <= self._chunk:
                    dst.copy_(src, non_blocking=True)
                else:
                    self._copy_pieces(dst, src, skip, nbytes)

    def check_current(self) -> None:
        """Raise UnsupportedError when the model runs on another stream than this."""
        current = torch.cuda.current_stream(self._index)
        if current.cuda_stream != self.raw.cuda_stream:
            raise UnsupportedError(
                f"the model runs on CUDA stream {current.cuda_stream:#x}, but activations are swapped against "
                f"{self.raw.cuda_stream:#x}, the current stream when megamem was enabled. Enable megamem under the "
                "stream that the model runs on, and do not swap activations inside torch.cuda.stream(...)"
            )

    def _offset_in_block(self, host: Tensor) -> int:
        """Bytes between the start of the registered block and a tensor in it; 0 for other memory."""
        address = host.data_ptr()
        for start, stop in self._blocks:
            if start <= address < stop:
                return address - start
        return 0

    def _copy_pieces(self, dst: Tensor, src: Tensor, skip: int, nbytes: int) -> None:
        """Copy in pieces that end where `skip` + the number of bytes copied is a multiple of the chunk."""
        if not (dst.is_contiguous() and src.is_contiguous()):
            raise UnsupportedError(f"a copy of {nbytes} bytes in pieces must be contiguous on both sides")
        dst_bytes, src_bytes = dst.view(-1).view(torch.uint8), src.view(-1).view(torch.uint8)
        for start, stop in piece_bounds(skip, nbytes, self._chunk):
            dst_bytes[start:stop].copy_(src_bytes[start:stop], non_blocking=True)


@final
class Stalls:
    """How long `compute` stood still in waits: pairs of timing events, read once they have passed."""

    _MOST = 1024

    def __init__(self) -> None:
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._pool: list[torch.cuda.Event] = []
        self._total_ms = 0.0

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """A timing event recorded on `stream` now."""
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def add(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Note a wait between two marks; old pairs are read when there are many, but never waited for."""
        self._pairs.append((begin, end))
        if len(self._pairs) > self._MOST:
            while self._pairs and self._pairs[0][1].query():  # type: ignore[no-untyped-call]
                self._read()

    def total_ms(self) -> float:
        """All of it so far; the host waits for the last pair."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        while self._pairs:
            self._read()
        return self._total_ms

    def _read(self) -> None:
        begin, end = self._pairs.popleft()
        self._total_ms += begin.elapsed_time(end)
        self._pool += (begin, end)


@final
class CudaDevice(AbstractDevice):
    """A GPU and its three queues. `device`: CUDA device or its index, by default the current one.

    `chunk_bytes`: largest single copy. `profile`: measure stalls of `compute` (two more events per wait).
    Raises UnsupportedError where there is no CUDA device.
    """

    def __init__(
        self,
        device: torch.device | int | None = None,
        *,
        chunk_bytes: int = DEFAULT_CHUNK_NBYTES,
        profile: bool = False,
        compute: torch.cuda.Stream | None = None,
    ) -> None:
        if not torch.cuda.is_available():
            raise UnsupportedError(
                "activations are to be swapped on a CUDA device, but torch finds none; use HostDevice for training on "
                "the CPU, or check the driver and that this torch was built for CUDA"
            )
        if chunk_bytes < HUGE_PAGE_NBYTES or chunk_bytes % mmap.PAGESIZE:
            raise ValueError(f"chunk_bytes is a multiple of {mmap.PAGESIZE} and at least 2 MiB, not {chunk_bytes}")
        index = device.index if isinstance(device, torch.device) else device
        self.index = torch.cuda.current_device() if index is None else index
        self.chunk_bytes = chunk_bytes
        self.stalls = Stalls() if profile else None
        self.blocks: list[tuple[int, int]] = []
        """Address ranges of registered host memory."""
        raw = torch.cuda.current_stream(self.index) if compute is None else compute
        self._device = torch.device("cuda", self.index)
        self._compute = CudaStream(self, raw, is_compute=True)
        own = [torch.cuda.Stream(self._device) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._to_host = CudaStream(self, own[0], is_compute=False)
        self._to_device = CudaStream(self, own[1], is_compute=False)
        if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
            _warn_once(
                "CUDA_DEVICE_MAX_CONNECTIONS=1: all streams share one hardware queue, in which work starts in the "
                "order of issue; activation copies overlap less with computation. Where the overlap of tensor-parallel "
                "communication does not depend on it, unset it or set it to 8 or more"
            )

    @property
    def compute(self) -> CudaStream:
        return self._compute

    @property
    def to_host(self) -> CudaStream:
        return self._to_host

    @property
    def to_device(self) -> CudaStream:
        return self._to_device

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._compute.check_current()
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def discard(self, tensors: Sequence[Tensor]) -> None:
        pass

    def claim_host(self, block: Tensor, start: int, nbytes: int) -> None:
        pass

    def release_host(self, block: Tensor, start: int, nbytes: int, after: AbstractEvent | None) -> None:
        pass

    def host_buffer(self, nbytes: int) -> Tensor:
        """Registered host memory; what could not be registered is left out, so it may be shorter, or empty.

        Slow (seconds for tens of GiB). The first touch decides on which NUMA node the pages lie: bind the process to
        that of its GPU.
        """
        nothing = torch.empty(0, dtype=torch.uint8)
        try:
            memory, view = map_pages(nbytes, HUGE_PAGE_NBYTES)
        except (OSError, ValueError, OverflowError) as error:
            _log.warning("host memory: %.2f GiB cannot be mapped: %s", nbytes / 2**30, error)
            return nothing
        pages = view.obj
        assert isinstance(pages, mmap.mmap)
        with torch.cuda.device(self.index):
            done = _pin(memory, max(SLICE_NBYTES // self.chunk_bytes, 1) * self.chunk_bytes)
        if not done:
            return nothing
        # A forked data loader neither needs these pages nor should cause them to be copied.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_DONTFORK)
        address = memory.data_ptr()
        usable = sum(size for _, size in done)
        block = (address, address + usable)
        self.blocks.append(block)
        weakref.finalize(view, _unpin, pages, done, self.blocks, block, self.index, os.getpid()).atexit = False
        return memory[:usable]

    def stall_ms(self) -> float:
        return 0.0 if self.stalls is None else self.stalls.total_ms()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)
