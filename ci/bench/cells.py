"""Running one cell of `gpu_layer.py`: one shape and length, all contenders, in rounds that turn the order around."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import common
import torch
from contenders import CONTENDERS, Bench, Contender, NotRunError, Running
from rates import middle
from rig import LayerStack, release
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PEAK_FLOPS = 989e12  # H100 and H200, bf16 dense
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
OUT_OF_MEMORY: tuple[type[BaseException], ...] = (torch.cuda.OutOfMemoryError,)
_MEMORY_KEYS = ("num_alloc_retries", "num_ooms", "inactive_split_bytes.all.peak")


class Deadline:
    """The time budget."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def saved_sizes(stack: LayerStack, tokens: int) -> tuple[int, int]:
    """(bytes that one layer saves at `tokens`, bytes that save_on_cpu would pin for it), from a short run.

    Counted are the saved tensors themselves, each place once, and not the larger storages that some are views of.
    """
    few = min(tokens, 256 * stack.shape.shards)
    scale = tokens / few
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
    places: dict[int, int] = {}
    pinned = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal pinned
        is_parameter = tensor.untyped_storage().data_ptr() in parameters
        if not is_parameter:
            places[tensor.data_ptr()] = max(places.get(tensor.data_ptr(), 0), tensor.nbytes)
        nbytes = tensor.nbytes * (1 if is_parameter else scale)
        pinned += 1 << max(math.ceil(math.log2(max(nbytes, 1))), 0)
        return tensor

    hidden = stack.leaf(few).clone()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack.call(0, hidden, few)
    return int(sum(places.values()) * scale), pinned


def one_step(bench: Bench, running: Running, leaf: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Milliseconds of the forward and the backward pass."""
    bench.stack.clear_gradients()
    leaf.grad = None
    marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
    marks[0].record()
    hidden = leaf.clone()
    with running.around():
        for index in range(len(bench.stack.layers)):
            hidden = running.layer(index, hidden)
    marks[1].record()
    hidden.backward(gradient)
    del hidden
    running.end_step()
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


# -- parity -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _deterministic(bench: Bench) -> Iterator[None]:
    """Flash attention has a deterministic backward pass on request; cuDNN's has none, so parity is shown on flash."""
    if bench.device != "cuda":
        yield
        return
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def parity(bench: Bench, chosen: list[Contender]) -> common.Json:
    """Every contender's gradients against those of resident; resident against itself is the noise."""
    short = dataclasses.replace(bench, tokens=min(bench.tokens, 4096 * bench.stack.shape.shards), link=1.0)
    scale = short.tokens / bench.tokens
    for name in ("unit_nbytes", "saved_nbytes", "pinned_nbytes"):
        setattr(short, name, int(getattr(bench, name) * scale))
    # With a link of 1 byte a second, a layer time at which MEMO's formula gives a half.
    short.layer_seconds = (short.base_nbytes + short.saved_nbytes) / 2
    found: common.Json = {"tokens": short.tokens}
    with _deterministic(bench):
        resident = next(contender for contender in CONTENDERS if contender.name == "resident")
        reference = _gradients(short, resident)
        for contender in chosen:
            try:
                gradients = _gradients(short, contender)
            except NotRunError as reason:
                found[contender.name] = {"status": f"not run: {reason}"}
                continue
            except OUT_OF_MEMORY:
                found[contender.name] = {"status": "out of memory"}
                continue
            found[contender.name] = _compare(gradients, reference) | {"must_be_bitwise": contender.exact}
            release(bench.device)
    bench.stack.clear_gradients()
    return found


def _gradients(bench: Bench, contender: Contender) -> list[Tensor]:
    leaf, gradient = bench.stack.leaf(bench.tokens), bench.stack.output_gradient(bench.tokens)
    with contender.open(bench) as running:
        for _ in range(2):  # the second step is what training consists of
            one_step(bench, running, leaf, gradient)
    found = [tensor.grad for tensor in (leaf, *bench.stack.parameters())]
    assert all(gradient is not None for gradient in found)
    return [gradient.detach().clone() for gradient in found if gradient is not None]


def _compare(one: list[Tensor], other: list[Tensor]) -> common.Json:
    errors = [
        ((a.float() - b.float()).abs().amax() / b.float().abs().amax().clamp_min(1e-30)).item()
        for a, b in zip(one, other, strict=True)
    ]
    return {
        "status": "ok",
        "bitwise": all(torch.equal(a, b) for a, b in zip(one, other, strict=True)),
        "max_relative_error": max(errors),
    }


# -- timing -----------------------------------------------------------------------------------------------------------


class Turns:
    """What the turns of one contender brought."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.status = "not run: time"
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.peak_allocated = self.peak_reserved = 0
        self.memory: dict[str, int] = {}
        self.counters: dict[str, float] = {}
        self.settings: dict[str, Any] = {}
        self.stall_ms: float | None = None
        self.seconds = 0.0

    @property
    def is_over(self) -> bool:
        """Whether there is no point in another turn."""
        return self.status not in ("ok", "not run: time")


def take_turn(bench: Bench, turns: Turns, warm_up: int, steps: int) -> None:
    """Set the contender up, warm up, time; whatever goes wrong becomes its status."""
    begin = time.monotonic()
    try:
        _timed(bench, turns, warm_up, steps)
        turns.status = "ok"
    except NotRunError as reason:
        turns.status = f"not run: {reason}"
    except OUT_OF_MEMORY:
        turns.status = "out of memory"
    except Exception as error:  # a contender's failure is a result; main says so in its exit status
        turns.status = f"failed: {type(error).__name__}: {error}"[:500]
    turns.seconds = time.monotonic() - begin
    bench.stack.clear_gradients()
    release(bench.device)


def _timed(bench: Bench, turns: Turns, warm_up: int, steps: int) -> None:
    leaf, gradient = bench.stack.leaf(bench.tokens), bench.stack.output_gradient(bench.tokens)
    with turns.contender.open(bench) as running:
        for _ in range(warm_up):
            one_step(bench, running, leaf, gradient)
        torch.cuda.reset_peak_memory_stats()
        counters, memory = running.counters(), torch.cuda.memory_stats()
        for _ in range(steps):
            forward, backward = one_step(bench, running, leaf, gradient)
            turns.forward.append(forward)
            turns.backward.append(backward)
        after = torch.cuda.memory_stats()
        turns.memory = {key: after.get(key, 0) - memory.get(key, 0) for key in _MEMORY_KEYS}
        turns.counters = {key: (value - counters.get(key, 0)) / steps for key, value in running.counters().items()}
        turns.settings = running.settings
        turns.peak_allocated = max(turns.peak_allocated, torch.cuda.max_memory_allocated())
        turns.peak_reserved = max(turns.peak_reserved, torch.cuda.max_memory_reserved())


def measure_stall(bench: Bench, turns: Turns, profiled: Any, steps: int) -> None:
    """A separate run with timing events around every wait: they cost a little, so its step times are not used."""
    bench = dataclasses.replace(bench, memory=profiled)
    again = Turns(turns.contender)
    before = profiled.stall_ms() if profiled is not None else 0.0
    take_turn(bench, again, 1, steps)
    if again.status == "ok":
        total = (profiled.stall_ms() if profiled is not None else 0.0) - before
        turns.stall_ms = total / (1 + steps)


def run_cell(
    bench: Bench, chosen: list[Contender], args: argparse.Namespace, deadline: Deadline, profiled: Any
) -> common.Json:
    """All contenders in two rounds, the second in reverse order; then the stalls."""
    all_turns = [Turns(contender) for contender in chosen]
    steps = 1 if args.quick else max(args.steps // 2, 1)
    for number in range(1 if args.quick else 2):
        for turns in all_turns if number == 0 else reversed(all_turns):
            expected = turns.seconds or max((other.seconds for other in all_turns), default=0.0)
            if turns.is_over or expected > deadline.left:
                continue
            take_turn(bench, turns, 1 if number else 2 - int(args.quick), steps + number * (args.steps % 2))
            _note_layer_time(bench, turns)
            print(f"    {turns.contender.name}: {turns.status}, {turns.seconds:.1f} s", flush=True)
    for turns in all_turns:
        if turns.status == "ok" and turns.contender.profiled and deadline.left > turns.seconds:
            measure_stall(bench, turns, profiled, 1 if args.quick else 2)
    return {turns.contender.name: _result(bench, turns) for turns in all_turns}


def _note_layer_time(bench: Bench, turns: Turns) -> None:
    """Plans are made from the forward pass of the first contender that ran: resident, else full recompute."""
    if not bench.layer_seconds and turns.forward:
        bench.layer_seconds = middle(turns.forward) / 1e3 / len(bench.stack.layers)


def _result(bench: Bench, turns: Turns) -> common.Json:
    result: common.Json = {"status": turns.status, "settings": turns.settings}
    if not turns.forward:
        return result
    each = [ahead + back for ahead, back in zip(turns.forward, turns.backward, strict=True)]
    step = common.summary(each)
    seconds = step["median"] / 1e3
    layers = len(bench.stack.layers)
    flops = 3 * layers * bench.stack.shape.forward_flops(bench.tokens)
    moved = turns.counters.get("bytes_stored", 0.0) + turns.counters.get("bytes_fetched", 0.0)
    result |= {
        "step_ms": step,
        "forward_ms": common.summary(turns.forward),
        "backward_ms": common.summary(turns.backward),
        "tokens_per_s": bench.tokens / seconds,
        "mfu": flops / seconds / PEAK_FLOPS,
        "peak_allocated_bytes": turns.peak_allocated,
        "peak_reserved_bytes": turns.peak_reserved,
        "allocator": turns.memory,
        "per_step": turns.counters,
        "moved_gb_per_step": moved / 1e9,
        "moved_gb_per_s": moved / 1e9 / seconds,
        "stall_ms_per_step": turns.stall_ms,
        "stall_share": None if turns.stall_ms is None else turns.stall_ms / step["median"],
    }
    return result
