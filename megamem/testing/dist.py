"""Run a function on N gloo ranks: forked after one import of torch and Megatron, and reused from case to case.

    with RankPool(2) as pool:
        losses = pool.run(train_case, "rope")        # [rank 0's value, rank 1's value]

    run_ranks(train_case, 2, "rope")                 # one pool for one call

**What runs where.** A rank is forked, enters `cpu_rig`, joins the process group and then serves one call after the
other. The function must be module-level, because it travels by name; arguments and results are pickled. Between two
calls everything that Megatron keeps globally is reset (`_reset`). A call in which any rank fails ends all ranks, and so
does one after which a rank has too many threads: each of gloo's communicators has three, which wake a hundred times a
second, and something may still hold groups that were destroyed. The next call forks new ones.

**Fork and threads.** Only the forking thread survives a fork, so the process that forks must not have started OpenMP
or autograd threads: no torch operation before the first `run`. A pytest process cannot promise that. `start_server`
therefore forks, before torch is imported, a process that does nothing but import and fork; `run_ranks` and
`server_pool` go through it when there is one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from types import TracebackType
from typing import IO, Any, Self

from megamem.testing._rank import Call, die_with_parent, serve_rank

_START_S = 60  # for forking and joining the group, which is not counted against a call
_MOST_THREADS = 64
_GRACE_S = 0.5  # after the first failure, how long the others may take to say what they saw


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """What happened to one rank: an exception, a signal, an exit, or the time-out; `details` is its Python
    traceback.
    """

    rank: int
    reason: str
    details: str


class RankError(RuntimeError):
    """At least one rank failed. `failures` lists them, the first to fail first."""

    def __init__(self, failures: tuple[RankFailure, ...]) -> None:
        super().__init__(failures)
        self.failures = failures

    def __str__(self) -> str:
        return "\n".join(f"rank {f.rank} {f.reason}\n{f.details}" for f in self.failures)


@dataclass(kw_only=True)
class _Rank:
    process: ForkProcess
    pipe: Connection[Any, Any]
    output: IO[bytes]  # what the rank prints, and its Python stacks when it is sent SIGUSR1; opened for appending
    seen: int = 0

    def exit_reason(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def kill(self) -> None:
        """End the process and what it has started: the group that it leads."""
        self.process.kill()
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def num_threads(self) -> int:
        """Of the rank; 0 where the system does not say."""
        tasks = f"/proc/{self.process.pid}/task"
        return len(os.listdir(tasks)) if os.path.isdir(tasks) else 0

    def stack(self) -> str:
        """Where the rank is now; works also while it waits inside gloo."""
        if self.process.pid is None or not self.process.is_alive():
            return ""
        self.new_output()
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self.new_output()

    def new_output(self) -> str:
        """What was written since the last call; read at a position, as the rank shares the file's own."""
        size = os.fstat(self.output.fileno()).st_size
        text = os.pread(self.output.fileno(), size - self.seen, self.seen)
        self.seen = size
        return text.decode(errors="replace")


class RankPool:
    """N forked ranks with a gloo process group, kept for many calls. `timeout` is in seconds and counts per call."""

    def __init__(self, nranks: int, *, timeout: float = 60) -> None:
        if nranks < 1:
            raise ValueError(f"a pool needs at least one rank, not {nranks}")
        self.nranks = nranks
        self.timeout = timeout
        self.output = ""  # what the ranks printed during the last call
        self._ranks: list[_Rank] = []

    def run(self, function: Callable[..., Any], /, *args: Any, timeout: float | None = None) -> list[Any]:
        """Call `function(*args)` on every rank; the values by rank, or `RankError`."""
        try:
            return [pickle.loads(value) for value in self._run_pickled(Call.of(function, args), timeout)]
        finally:
            sys.stdout.write(self.output)

    def close(self) -> None:
        """End the ranks."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.process.join()
            rank.pipe.close()
            rank.output.close()
        atexit.unregister(self.close)

    def _run_pickled(self, call: Call, timeout: float | None) -> list[bytes]:
        """Values stay pickled here: a server must not run the torch code that unpickling a tensor is."""
        try:
            if not self._ranks:
                self._fork()
                self._collect(_START_S)
            for rank in self._ranks:
                with contextlib.suppress(OSError):  # it died while idle; collecting finds that out
                    rank.pipe.send(call)
            values = self._collect(self.timeout if timeout is None else timeout)
        except BaseException:
            self._take_output()
            self.close()
            raise
        self._take_output()
        if any(rank.num_threads > _MOST_THREADS for rank in self._ranks):
            self.close()
        return values

    def _take_output(self) -> None:
        texts = ((index, rank.new_output()) for index, rank in enumerate(self._ranks))
        self.output = "".join(f"[rank {index}] {line}\n" for index, text in texts for line in text.splitlines())

    def _fork(self) -> None:
        _import_once()
        context = get_context("fork")
        with socket.create_server(("127.0.0.1", 0)) as listener:  # inherited by rank 0: no port is ever free for others
            for index in range(self.nranks):
                ours, theirs = context.Pipe()
                output = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed with the rank
                to_close = [*(rank.pipe for rank in self._ranks), ours]
                process = context.Process(
                    target=serve_rank,
                    args=(index, self.nranks, listener, theirs, to_close, output),
                    name=f"rank-{index}",
                )
                process.start()
                theirs.close()
                self._ranks.append(_Rank(process=process, pipe=ours, output=output))
        atexit.register(self.close)

    def _collect(self, timeout: float) -> list[bytes]:
        values: dict[int, bytes] = {}
        failures: list[RankFailure] = []
        waiting = {rank.pipe: index for index, rank in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                index = waiting.pop(pipe)  # type: ignore[call-overload]  # what we put in
                self._receive(index, values, failures)
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if waiting and not failures:
            late = f"did not finish within {timeout:g} s"
            failures = [RankFailure(rank=i, reason=late, details=self._ranks[i].stack()) for i in waiting.values()]
        if failures:
            raise RankError(tuple(failures))
        return [values[index] for index in range(self.nranks)]

    def _receive(self, index: int, values: dict[int, bytes], failures: list[RankFailure]) -> None:
        rank = self._ranks[index]
        try:
            succeeded, payload = rank.pipe.recv()
        except (EOFError, OSError):
            failures.append(RankFailure(rank=index, reason=rank.exit_reason(), details=""))
            return
        if succeeded:
            values[index] = payload
        else:
            failures.append(RankFailure(rank=index, reason="raised", details=payload))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _import_once() -> None:
    """What every rank needs, loaded before the fork; ranks then start in a fraction of a second."""
    for name, value in {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)
    import torch

    import megamem.testing.cpu

    torch.set_num_threads(1)
    if find_spec("megatron") is not None and find_spec("megatron.core") is not None:
        with warnings.catch_warnings(action="ignore"):  # Megatron says at import what it would rather have
            import megamem.testing.models  # noqa: F401


class _Server:
    """The clean process. Requests: (nranks, reuse, Call, timeout).

    Answers: (True, values, output) or (False, exception, output).
    """

    def __init__(self) -> None:
        context = get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.pipe), name="rank-server")
        self.process.start()
        theirs.close()
        atexit.register(self.stop)

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self.pipe.close()  # the server reads the end of file and closes its pools
        self.process.join(5)
        self.process.kill()
        self.process.join()

    def request(self, nranks: int, reuse: bool, call: Call, timeout: float) -> list[Any]:
        try:
            self.pipe.send((nranks, reuse, call, timeout))
            succeeded, payload, output = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the fork server of megamem.testing.dist has died") from error
        except BaseException:  # an interrupt: question and answer are out of step
            self.process.kill()
            raise
        sys.stdout.write(output)  # here, so that pytest shows it with the test
        if not succeeded:
            raise payload
        return [pickle.loads(value) for value in payload]


def _serve(pipe: Connection[Any, Any], other_end: Connection[Any, Any]) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    other_end.close()
    pools: dict[int, RankPool] = {}
    try:
        while True:
            nranks, reuse, call, timeout = pipe.recv()
            pool = pools.setdefault(nranks, RankPool(nranks)) if reuse else RankPool(nranks)
            try:
                answer = True, pool._run_pickled(call, timeout)
            except Exception as error:
                answer = False, error  # type: ignore[assignment]
            if not reuse:
                pool.close()
            pipe.send((*answer, pool.output))
    except EOFError:
        pass
    finally:
        for pool in pools.values():
            pool.close()


_server: _Server | None = None


def start_server() -> None:
    """Fork the clean process that later forks the ranks; to be called before torch is imported. Idempotent."""
    global _server
    if _server is None or not _server.process.is_alive():
        if "torch" in sys.modules:
            raise RuntimeError("start_server must be called before torch is imported (see megamem.testing.dist)")
        _server = _Server()


def stop_server() -> None:
    """End the server, and its ranks with it."""
    global _server
    server, _server = _server, None
    if server is not None:
        server.stop()


def server_pool(nranks: int, *, timeout: float = 60) -> Callable[..., list[Any]]:
    """A function like `RankPool.run`, on a pool that the server keeps for all callers with the same `nranks`."""

    def run(function: Callable[..., Any], /, *args: Any, timeout: float = timeout) -> list[Any]:
        if _server is None:
            raise RuntimeError("no fork server: call megamem.testing.dist.start_server() first")
        return _server.request(nranks, True, Call.of(function, args), timeout)

    return run


def run_ranks(function: Callable[..., Any], nranks: int, /, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `function(*args)` on `nranks` new ranks; the values by rank, or `RankError` naming each failed rank."""
    if _server is not None:
        return _server.request(nranks, False, Call.of(function, args), timeout)
    with RankPool(nranks, timeout=timeout) as pool:
        return pool.run(function, *args)
