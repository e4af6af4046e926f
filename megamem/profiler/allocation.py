"""Record the malloc and free requests of a training iteration, with the layer and microbatch they belong to.

    phases = LayerPhases(layers)                 hooks on the layers of any model
    with StorageRecorder(phases) as recorder:    or AllocatorRecorder(phases)
        for step in range(3):
            recorder.start_iteration()
            train_step()
        recorder.stop()
    trace = recorder.trace()                     of the last iteration

`StorageRecorder` sees the storages that operators bring into being (a `TorchDispatchMode`), real or of fake tensors:
under `FakeTensorMode` nothing is computed and nothing allocated, so a layer of any size can be traced anywhere. It
does not see what an operator allocates and frees inside itself.

`AllocatorRecorder` sees every request that reaches the CPU allocator, such scratch included, through `torch.profiler`.

Traces of a GPU come from its own snapshots: `megamem.profiler.cuda_snapshot`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamem.errors import AllocationError
from megamem.ir.allocation_trace import AllocationTrace, Phase, Request

_MARK = "megamem phase: "
OUTSIDE = ""


class EventLog:
    """Mallocs, frees and phases in order, cut into iterations."""

    def __init__(self) -> None:
        self._events: list[tuple[bool, int]] = []
        self._sizes: list[int] = []
        self._phases: list[tuple[int, str]] = []
        self._cuts: list[int] = []

    def malloc(self, size: int) -> int:
        """A request; its number, by which it is freed."""
        self._sizes.append(size)
        self._events.append((True, len(self._sizes) - 1))
        return len(self._sizes) - 1

    def free(self, request: int) -> None:
        """The end of a request."""
        self._events.append((False, request))

    def free_unknown(self, size: int) -> None:
        """The end of a request from before the log."""
        self._sizes.append(size)
        self._events.append((False, len(self._sizes) - 1))

    def enter(self, label: str) -> None:
        """A new phase begins."""
        if self._phases and self._phases[-1][0] == len(self._events):
            self._phases.pop()  # in which nothing happened
        self._phases.append((len(self._events), label))

    def cut(self) -> None:
        """An iteration begins, or the last one ends."""
        self._cuts.append(len(self._events))
        self.enter(OUTSIDE)

    def is_steady(self) -> bool:
        """Whether the last two iterations asked for the same sizes in the same order."""
        if len(self._cuts) < 3:
            return False
        one, other = (
            [self._sizes[index] for is_malloc, index in self._events[begin:end] if is_malloc]
            for begin, end in (self._cuts[-3:-1], self._cuts[-2:])
        )
        return one == other

    def trace(self, *, persistent: int = 0, source: str = "") -> AllocationTrace:
        """The last iteration. Raises AllocationError when there is none."""
        if len(self._cuts) < 2:
            raise AllocationError("no iteration was recorded; start one, and another or stop() after it")
        begin, end = self._cuts[-2:]
        births: dict[int, int] = {}
        deaths: dict[int, int] = {}
        for instant, (is_malloc, index) in enumerate(self._events[begin:end]):
            (births if is_malloc else deaths)[index] = instant
        requests = [
            Request(size=self._sizes[index], birth=births.get(index), death=deaths.get(index))
            for index in {**births, **deaths}
        ]
        requests.sort(key=lambda request: (-1 if request.birth is None else request.birth, request.death or 0))
        phases: list[Phase] = []
        for at, label in self._phases:
            # The cut itself is a phase: the one that ends an iteration belongs to the next.
            if begin <= at <= end and (at < end or label) and not (phases and phases[-1].label == label):
                phases.append(Phase(begin=at - begin, label=label))
        return AllocationTrace(
            requests=tuple(requests),
            phases=tuple(phases),
            num_events=end - begin,
            persistent=persistent,
            source=source,
        )


class LayerPhases:
    """Says which pass of which layer the program is in: "layer 3 forward, microbatch 0".

    Layers are numbered as they are given, or by `numbers`; `others` are modules beside the layers, by name, such as the
    embedding. What is in no module, the program says itself by `enter`. A backward pass lasts from the gradient of the
    layer's output to that of its input; a layer that is recomputed begins its backward pass with that. Microbatches are
    counted per layer, so their backward passes must come in the order of their forward passes, as they do in every
    pipeline schedule.
    """

    def __init__(
        self,
        layers: Sequence[Module],
        numbers: Sequence[int] | None = None,
        *,
        others: Mapping[str, Module] | None = None,
        on_enter: Callable[[str], None] = lambda label: None,
    ) -> None:
        """`on_enter` is told of every phase as well, to show progress."""
        self._listener: Callable[[str], None] = lambda label: None
        self._on_enter = on_enter
        self._current = OUTSIDE
        self._forwards: Counter[str] = Counter()
        self._recomputed: Counter[str] = Counter()
        self._handles: list[Any] = []
        for number, layer in zip(range(len(layers)) if numbers is None else numbers, layers, strict=True):
            self._hook(layer, f"layer {number}")
        for name, module in (others or {}).items():
            self._hook(module, name)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Tell `listener` of every phase that begins."""
        self._listener = listener

    def restart(self) -> None:
        """An iteration begins: count microbatches from 0."""
        self._current = OUTSIDE
        self._forwards.clear()
        self._recomputed.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def enter(self, label: str) -> None:
        """A phase begins; the empty label ends the one before."""
        self._current = label
        self._listener(label)
        self._on_enter(label)

    def _leave(self, label: str) -> None:
        # The input of a layer is the output of the one before, whose backward pass its gradient may have begun.
        if self._current == label:
            self.enter(OUTSIDE)

    def _label(self, name: str, counts: Counter[str], kind: str) -> str:
        return f"{name} {kind}, microbatch {counts[name] - 1}"

    def _hook(self, layer: Module, name: str) -> None:
        def before(_layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            is_again = _is_in_backward()  # recomputation
            counts = self._recomputed if is_again else self._forwards
            counts[name] += 1
            backward = self._label(name, counts, "backward")
            self.enter(backward if is_again else self._label(name, counts, "forward"))
            for tensor in _differentiable((args, kwargs)):
                tensor.register_hook(lambda _gradient: self._leave(backward))  # type: ignore[no-untyped-call]
                break  # the hidden states; what follows is not on the path through the layers

        def after(_layer: Module, _args: Any, _kwargs: Any, output: Any) -> None:
            is_again = _is_in_backward()
            counts = self._recomputed if is_again else self._forwards
            backward = self._label(name, counts, "backward")
            for tensor in _differentiable(output):
                tensor.register_hook(lambda _gradient: self.enter(backward))  # type: ignore[no-untyped-call]
                break
            if not is_again:
                self._leave(self._label(name, counts, "forward"))

        self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(layer.register_forward_hook(after, with_kwargs=True))


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _differentiable(tree: Any) -> Iterator[Tensor]:
    if torch.is_grad_enabled():
        yield from (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad)


class StorageRecorder:
    """Records storages by the operators that make them; real tensors or fake ones. `persistent` are left out."""

    def __init__(self, phases: LayerPhases, persistent: Iterable[Tensor] = ()) -> None:
        self._phases = phases
        self._log = EventLog()
        self._live: dict[int, int] = {}  # by the address of the storage
        # Held, so that no later storage gets the address.
        self._persistent = {t.untyped_storage()._cdata: t.untyped_storage() for t in persistent}
        self._mode = _Watch(self)

    @property
    def persistent_bytes(self) -> int:
        """Bytes of the storages that are left out."""
        return sum(storage.nbytes() for storage in self._persistent.values())

    @property
    def is_steady(self) -> bool:
        """Whether the last two iterations asked for the same sizes in the same order."""
        return self._log.is_steady()

    def start_iteration(self) -> None:
        """The next iteration begins here."""
        self._phases.restart()
        self._log.cut()

    stop = start_iteration

    def trace(self, source: str = "storages") -> AllocationTrace:
        """The last iteration. Raises AllocationError when there is none."""
        return self._log.trace(persistent=self.persistent_bytes, source=source)

    def observe(self, outputs: Any) -> None:
        """Take in the outputs of an operator."""
        for tensor in tree_leaves(outputs):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live and key not in self._persistent and storage.nbytes() > 0:
                self._live[key] = self._log.malloc(storage.nbytes())
                weakref.finalize(storage, self._died, key).atexit = False

    def _died(self, key: int) -> None:
        self._log.free(self._live.pop(key))

    def __enter__(self) -> Self:
        self._phases.listen(self._log.enter)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        self._phases.listen(lambda label: None)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: StorageRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self._recorder.observe(outputs)
        return outputs


class AllocatorRecorder:
    """Records what reaches the CPU allocator, through `torch.profiler`. Cuts and phases are annotations in its trace.

    The allocator of the thread that starts the recorder is followed, and of those that autograd runs on.
    """

    def __init__(self, phases: LayerPhases) -> None:
        self._phases = phases
        self._log = EventLog()
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )

    @property
    def is_steady(self) -> bool:
        """Whether the last two iterations asked for the same sizes in the same order."""
        return self._log.is_steady()

    def start_iteration(self) -> None:
        """The next iteration begins here."""
        self._phases.restart()
        self._mark("cut")

    stop = start_iteration

    def trace(self, source: str = "CPU allocator") -> AllocationTrace:
        """The last iteration. Raises AllocationError when there is none, or when the recorder is still open."""
        return self._log.trace(source=source)

    @staticmethod
    def _mark(text: str) -> None:
        with torch.profiler.record_function(_MARK + text):
            pass

    def __enter__(self) -> Self:
        self._phases.listen(lambda label: self._mark(f"enter {label}"))
        self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        self._phases.listen(lambda label: None)
        if kind is None:
            self._read()

    def _read(self) -> None:
        inner = self._profile.profiler
        assert inner is not None and inner.kineto_results is not None
        events = sorted(_walk(inner.kineto_results.experimental_event_tree()), key=lambda event: event.start_time_ns)
        live: dict[int, int] = {}
        for event in events:
            if event.tag == torch._C._profiler._EventType.Allocation:
                address, size = event.typed[1].ptr, event.typed[1].alloc_size
                if size > 0:
                    live[address] = self._log.malloc(size)
                elif size < 0 and address in live:
                    self._log.free(live.pop(address))
                elif size < 0:
                    self._log.free_unknown(-size)
            elif event.name == f"{_MARK}cut":
                self._log.cut()
            elif event.name.startswith(f"{_MARK}enter "):
                self._log.enter(event.name.removeprefix(f"{_MARK}enter "))


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)
