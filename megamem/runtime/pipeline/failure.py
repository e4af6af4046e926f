"""How ranks learn that one of them has failed: its name and action, by way of the job's store.

A rank that fails puts what happened under the key of the current *epoch* and then closes its connections. A neighbour
that waits for a message gets an error from the connection, looks the reason up, closes its own connections and raises;
so the news goes through the pipeline. Where closing wakes nobody (NCCL) or nobody waits for a message (another
data-parallel replica), a thread of each rank looks at the key once a second.

Every rank raises once per failure and then counts one epoch on, which names new connections: if the exception is
caught everywhere, the next step runs. A rank that is inside a collective of somebody else's (tensor parallelism, the
optimizer) cannot be woken from here; it ends when that collective does, at the latest when the process of the failed
rank has gone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

_LOG = logging.getLogger("megamem")
_INTERVAL_S = 1.0


class FailureNotice:
    """The place where failures of a job are published. `store` is the job's; `wake` is called when one is found."""

    def __init__(self, store: Any, wake: Callable[[], None]) -> None:
        self._store, self._wake = store, wake
        self.epoch = 0
        self.found: str | None = None  # set by the thread; the loop looks at it before every action
        self._in_step = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> str | None:
        """A step begins: watch. What failed before this rank came to it, if anything did."""
        if self._store.check([self._key()]):
            return self.published()
        self._in_step = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="megamem-failure-notice", daemon=True)
            self._thread.start()
        return None

    def end(self) -> None:
        """The step is over, well or not."""
        self._in_step = False

    def publish(self, text: str) -> str:
        """Say what failed here; what failed first, which may have been somewhere else."""
        return bytes(self._store.compare_set(self._key(), "", text)).decode()

    def published(self) -> str:
        """What failed in this epoch."""
        return bytes(self._store.get(self._key())).decode()

    def next_epoch(self) -> None:
        """This rank has raised; whatever comes now has nothing to do with that failure."""
        self.found = None
        self.epoch += 1

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _key(self) -> str:
        return f"megamem/pipeline-failure/{self.epoch}"

    def _watch(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            if not self._in_step or self.found is not None:
                continue
            try:
                if self._store.check([self._key()]):
                    self.found = self.published()
                    self._wake()
            except RuntimeError as error:  # the store's host has gone: the job is ending
                _LOG.warning("megamem no longer watches for failures of other ranks: %s", error)
                return
