"""Lanes: collectives that run beside the computation, each kind of them in an order of its own.

    Lane             runs what is posted to it, in order: on a CUDA stream of its own, or else on a thread of its own
    Communicator     a communicator for some ranks of the job, that no other kind of collective uses

What is posted is a function, which may do several things one after the other: an all-gather, what is made of it, and a
reduction. On a stream the functions run at once, and their kernels wait for one another on the device; elsewhere (gloo)
they run on the thread, which waits. The host waits for neither: `Pending.wait` makes the current stream, or the
calling thread, wait for the result.

**Failures.** A thread that waits for a rank which has failed cannot be woken: gloo has no abort, and closes a
connection only when nothing refers to it. So nobody waits for such a thread: `Pending.wait` looks once a second whether
another rank has failed, and a lane that is closed with something under way leaves its thread, a daemon, to its fate,
which is the end of the process or the communicator's timeout.
"""

from __future__ import annotations

import datetime
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from megamem.errors import PipelineError
from megamem.runtime.pipeline.links import TIMEOUT, connect

_INTERVAL_S = 1.0  # between looks at whether another rank has failed

Result = TypeVar("Result")


class Communicator:
    """A communicator of its own for `ranks` (global), of which this process is number `rank`; made by all of them.

    Every operation waits for its end, the current stream on CUDA, else the calling thread.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        store: distributed_c10d.Store,
        name: str,
        timeout: datetime.timedelta = TIMEOUT,
    ) -> None:
        self.size, self._device = len(ranks), device
        self._group: Any = connect(ranks, rank, device, store, name, timeout)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` by that of number `source`."""
        options = distributed_c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        self._group.broadcast([tensor], options).wait()

    def reduce(self, tensor: Tensor, target: int) -> None:
        """The sum, in place on number `target`; what the tensors of the others hold then means nothing."""
        options = distributed_c10d.ReduceOptions()
        options.rootRank, options.rootTensor = target, 0
        self._group.reduce([tensor], options).wait()

    def gather(self, part: Tensor) -> Tensor:
        """All parts [size, ...] in rank order."""
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        self._group._allgather_base(whole, part.contiguous()).wait()
        return whole.view(self.size, *part.shape)

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """This rank's part, along the first dimension, of the sum."""
        part = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        self._group._reduce_scatter_base(part, whole.contiguous()).wait()
        return part

    def abort(self) -> None:
        """End what is under way, where the backend can."""
        if self._device.type == "cuda":
            self._group.abort()


class Pending(ABC, Generic[Result]):
    """What a function that was posted will return."""

    @abstractmethod
    def wait(self) -> Result:
        """The result, for use by what the caller does next; may be asked for again. Raises what the function raised,
        and PipelineError where another rank has failed meanwhile."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the function and everything it started has ended."""


class Lane(ABC):
    """Functions that run beside the computation, in the order in which they are posted."""

    def __init__(self) -> None:
        self._posted: deque[tuple[Pending[Any], object]] = deque()

    def post(self, function: Callable[[], Result]) -> Pending[Result]:
        """Run `function` after those before it, once what the caller has done so far is there; it builds no graph.

        It and what it refers to are kept until it has ended.
        """
        self.drop_finished()
        pending = self._start(function)
        self._posted.append((pending, function))
        return pending

    def drop_finished(self) -> None:
        """Let go of what has ended, and of what it held."""
        while self._posted and self._posted[0][0].is_done():
            self._posted.popleft()

    def finish(self) -> None:
        """Wait for everything that was posted; raises as `Pending.wait`."""
        while self._posted:
            self._posted.popleft()[0].wait()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return all(pending.is_done() for pending, _ in self._posted)

    @abstractmethod
    def _start(self, function: Callable[[], Result]) -> Pending[Result]:
        """Begin."""

    @abstractmethod
    def close(self) -> None:
        """Take nothing more."""


def make_lane(name: str, device: torch.device, failure: Callable[[], str | None]) -> Lane:
    """A lane for tensors on `device`. `failure()` says which other rank has failed, None if none has."""
    return _StreamLane(device) if device.type == "cuda" else _ThreadLane(name, failure)


@final
class _Answer(Pending[Result]):
    """The result of a function that a thread runs."""

    def __init__(self, failure: Callable[[], str | None]) -> None:
        self._failure, self._done = failure, threading.Event()
        self._result: list[Result] = []
        self._error: BaseException | None = None

    def run(self, function: Callable[[], Result]) -> None:
        try:
            with torch.no_grad():
                self._result.append(function())
        except BaseException as error:
            self._error = error.with_traceback(None)  # a frame of it would keep a connection open
        self._done.set()

    def wait(self) -> Result:
        while not self._done.wait(_INTERVAL_S):
            if (text := self._failure()) is not None:
                raise PipelineError(text)
        if self._error is not None:
            raise self._error
        return self._result[0]

    def is_done(self) -> bool:
        return self._done.is_set()


@final
class _ThreadLane(Lane):
    def __init__(self, name: str, failure: Callable[[], str | None]) -> None:
        super().__init__()
        self._failure = failure
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._queue,), name=f"megamem-{name}", daemon=True)
        self._thread.start()

    def _start(self, function: Callable[[], Result]) -> Pending[Result]:
        answer: _Answer[Result] = _Answer(self._failure)
        self._queue.put(lambda: answer.run(function))
        return answer

    def close(self) -> None:
        is_idle = self.is_idle
        self._posted.clear()
        self._queue.put(None)
        if is_idle:
            self._thread.join()


def _serve(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it holds tensors


@final
class _Recorded(Pending[Result]):
    """The result of a function whose kernels run on a stream."""

    def __init__(self, result: Result, stream: Any) -> None:
        self._result, self._event = result, stream.record_event()

    def wait(self) -> Result:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._event)
        for tensor in self._result if isinstance(self._result, tuple) else (self._result,):
            if isinstance(tensor, Tensor):
                tensor.record_stream(stream)  # its memory is the lane's
        return self._result

    def is_done(self) -> bool:
        return bool(self._event.query())


@final
class _StreamLane(Lane):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def _start(self, function: Callable[[], Result]) -> Pending[Result]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.no_grad():
            return _Recorded(function(), self._stream)

    def close(self) -> None:
        self._posted.clear()
