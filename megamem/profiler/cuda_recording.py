"""Record the allocations of one step of a job on a GPU, tagged with layers and microbatches.

    with recorded_step("step.trace", layers=model.decoder.layers):
        train_step()

PyTorch's own allocator records itself (`torch.cuda.memory._record_memory_history`), so the step runs as it always does;
hooks on the layers tell it where the program is (`_set_memory_metadata`, from PyTorch 2.10 on; older releases give a
trace without phases). Take a step after the first few: the first ones allocate what stays.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from megamem.errors import AllocationError
from megamem.ir.allocation_trace import AllocationTrace, write_trace
from megamem.profiler.allocation import LayerPhases
from megamem.profiler.cuda_snapshot import label, trace_of_snapshot

MAX_ENTRIES = 2_000_000  # events, some 100 bytes each while they are recorded
_STEP = 0


@contextlib.contextmanager
def recorded_step(
    path: str | Path,
    *,
    layers: Sequence[Module] = (),
    others: Mapping[str, Module] | None = None,
    device: int | None = None,
    snapshot: str | Path | None = None,
    memory: Any = None,
) -> Iterator[None]:
    """Record what runs within the block on this rank, and write its trace to `path`: one name per rank.

    layers, others:  as `LayerPhases` takes them
    device:          ordinal, the current one by default
    snapshot:        where PyTorch's snapshot is written too, for its viewers
    memory:          in place of `torch.cuda.memory`

    Raises AllocationError where there is no GPU, the block allocated nothing or more than can be recorded, or a file
    cannot be written. When the block raises, nothing is written.
    """
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise AllocationError(f"{path}: there is no folder {path.parent}")
    if memory is None:
        if not torch.cuda.is_available():
            raise AllocationError("there is no GPU whose allocator could be recorded")
        memory = torch.cuda.memory
    ordinal = torch.cuda.current_device() if device is None else device
    phases = LayerPhases(list(layers), others=others)
    tag = getattr(memory, "_set_memory_metadata", None)
    memory._record_memory_history("all", context=None, max_entries=MAX_ENTRIES)
    try:
        if tag is not None:
            phases.listen(lambda phase: tag(label(_STEP, phase)))
            tag(label(_STEP, ""))
        yield
        taken = memory._snapshot()
    finally:
        phases.remove()
        if tag is not None:
            tag("")
        memory._record_memory_history(None)
    if snapshot is not None:
        _dump(Path(snapshot), taken)
    write_trace(path, _trace(taken, ordinal, is_tagged=tag is not None))


def _trace(taken: Mapping[str, Any], device: int, *, is_tagged: bool) -> AllocationTrace:
    events = taken["device_traces"][device] if device < len(taken["device_traces"]) else []
    if len(events) >= MAX_ENTRIES:
        raise AllocationError(f"the step has more than {MAX_ENTRIES} events, of which only the last were recorded")
    return trace_of_snapshot(taken, device=device, step=_STEP if is_tagged else None)


def _dump(path: Path, taken: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            pickle.dump(dict(taken), file)
    except OSError as fault:
        raise AllocationError(f"{path}: cannot be written ({fault.strerror or fault})") from fault
