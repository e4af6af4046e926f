"""Overlapped reductions: a chunk's gradients are reduced while its last microbatch makes them, and not before."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch.nn import Module

from megamem.errors import UnsupportedError
from megamem.ir.schedule import Action, Schedule


class GradientSync:
    """One step's `no_sync_func`, `grad_sync_func` and `param_sync_func`: each one for all chunks, or one per chunk.

    last:        the actions of every chunk's last microbatch that make gradients
    completing:  of these, the ones after which a chunk has all its gradients
    """

    def __init__(
        self, config: Any, chunks: Sequence[Module], last: Collection[Action], completing: Collection[Action]
    ) -> None:
        self._config, self._chunks = config, chunks
        self._last, self._completing = last, completing
        self._open: dict[int, contextlib.AbstractContextManager[Any]] = {}
        self._grad_sync = _per_chunk(config.grad_sync_func, chunks)
        self._param_sync = _per_chunk(config.param_sync_func, chunks) if len(chunks) > 1 else None
        self._unsynced = list(range(len(chunks)))

    @contextlib.contextmanager
    def step(self, forward_only: bool) -> Iterator[None]:
        """No reduction starts inside, but where `around` lets it."""
        if forward_only:
            self._grad_sync = self._param_sync = None
        no_sync = self._config.no_sync_func
        functions = no_sync if isinstance(no_sync, list) else [no_sync] if no_sync is not None else []
        self._functions = functions
        with contextlib.ExitStack() as stack:
            stack.callback(self._leave_all)
            for index in range(len(functions)):
                self._enter(index)
            yield

    @contextlib.contextmanager
    def around(self, action: Action) -> Iterator[None]:
        """Around an action that makes gradients."""
        index = min(action.chunk, len(self._functions) - 1)
        reduces = action in self._last and bool(self._functions) and self._grad_sync is None
        if reduces:
            self._leave(index)
        try:
            yield
        finally:
            if reduces:
                self._enter(index)
        if self._grad_sync is not None and action in self._completing:
            self._leave_all()
            self._grad_sync[action.chunk](self._chunks[action.chunk].parameters())
            for index in range(len(self._functions)):
                self._enter(index)

    def before_first_forward(self, chunk: int) -> None:
        """Have the parameters of this chunk and of the next one on their way."""
        if self._param_sync is None:
            return
        while self._unsynced and self._unsynced[0] <= chunk + 1:
            following = self._unsynced.pop(0)
            self._param_sync[following](self._chunks[following].parameters())

    def _enter(self, index: int) -> None:
        context = self._functions[index]()
        context.__enter__()
        self._open[index] = context

    def _leave(self, index: int) -> None:
        self._open.pop(index).__exit__(None, None, None)

    def _leave_all(self) -> None:
        while self._open:
            self._leave(next(iter(self._open)))


def _per_chunk(functions: Any, chunks: Sequence[Module]) -> list[Callable[..., Any]] | None:
    if functions is None:
        return None
    return list(functions) if isinstance(functions, list) else [functions] * len(chunks)


def check_order(schedule: Schedule, *, reduces: bool, overwrites: bool) -> None:
    """Raise UnsupportedError where a chunk's gradients come in an order that would spoil them.

    reduces:     gradients are reduced while the last microbatch makes them, so its must be a chunk's last ones
    overwrites:  the microbatch that runs forward first replaces the gradients of the step before instead of adding to
                 them (Transformer Engine, with gradient_accumulation_fusion), so its must be a chunk's first ones
    """
    for rank, actions in enumerate(schedule.ranks):
        for chunk in range(schedule.placement.num_chunks):
            first = next(action for action in actions if action.chunk == chunk and action.kind == "F")
            for kinds in (("B", "BW"), ("W", "BW")):
                order = [action for action in actions if action.chunk == chunk and action.kind in kinds]
                late = next((b for a, b in itertools.pairwise(order) if a.microbatch > b.microbatch), None)
                if reduces and late is not None:
                    raise UnsupportedError(
                        f"schedule {schedule.name}: rank {rank} runs {late} after a later microbatch's, and gradients "
                        "are reduced while the last microbatch makes them; switch overlap_grad_reduce off, or keep "
                        "the microbatches in order"
                    )
                if overwrites and order and order[0].microbatch != first.microbatch:
                    raise UnsupportedError(
                        f"schedule {schedule.name}: rank {rank} runs {first} first but {order[0]} before its backward "
                        "pass, and with gradient_accumulation_fusion Transformer Engine takes the gradients of the "
                        "first microbatch for the first ones; switch it off, or keep the microbatches in order"
                    )
