"""Time for a computation, and a way to end it early."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Budget:
    """`seconds` from its making, or no end (None). `stop` ends it at once, from any thread or signal handler."""

    def __init__(self, seconds: float | None = None) -> None:
        self._begin = time.monotonic()
        self._end = None if seconds is None else self._begin + seconds
        self.is_stopped = False

    @property
    def elapsed(self) -> float:
        """Seconds since the budget was made."""
        return time.monotonic() - self._begin

    @property
    def remaining(self) -> float | None:
        """Seconds left, 0 when it is over; None without an end."""
        if self.is_stopped:
            return 0.0
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    @property
    def is_over(self) -> bool:
        """Whether to stop."""
        return self.is_stopped or (self._end is not None and time.monotonic() >= self._end)

    def stop(self) -> None:
        """End it."""
        self.is_stopped = True

    @contextlib.contextmanager
    def until_interrupt(self) -> Iterator[None]:
        """Within the block the first Ctrl-C ends the budget, and a second one interrupts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return

        def end(_number: int, _frame: FrameType | None) -> None:
            if self.is_stopped:
                raise KeyboardInterrupt
            self.stop()

        before = signal.signal(signal.SIGINT, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
