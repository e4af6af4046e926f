"""Recorders: what they see of real and fake steps of a plain PyTorch model, and the phases they put it in."""

from __future__ import annotations

from typing import Any

import pytest

from megamem.errors import AllocationError

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from megamem.profiler.allocation import AllocatorRecorder, EventLog, LayerPhases, StorageRecorder  # noqa: E402


class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.relu(self.up(x)))


def record(make: Any, *, recompute: bool = False, steps: int = 3) -> tuple[Any, bool]:
    layers = torch.nn.ModuleList(Layer() for _ in range(3))
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    start = torch.randn(16, 32)
    phases = LayerPhases(list(layers))
    kept = [start, *(tensor for p in layers.parameters() for tensor in (p, p.grad))]
    with make(phases, kept) as recorder:
        for _ in range(steps):
            recorder.start_iteration()
            for _microbatch in range(2):
                x = start * 2
                x.requires_grad_()
                for layer in layers:
                    x = checkpoint(layer, x, use_reentrant=True) if recompute else layer(x)
                x.sum().backward()
                del x
        recorder.stop()
    phases.remove()
    return recorder.trace(), recorder.is_steady


def storages(phases: Any, kept: Any) -> Any:
    return StorageRecorder(phases, kept)


def allocator(phases: Any, _kept: Any) -> Any:
    return AllocatorRecorder(phases)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", [storages, allocator])
def test_phases_name_every_pass_of_every_layer_and_microbatch(make: Any, recompute: bool) -> None:
    trace, is_steady = record(make, recompute=recompute)
    assert is_steady
    expected = [
        f"layer {layer} {kind}, microbatch {microbatch}"
        for microbatch in range(2)
        for kind, order in (("forward", (0, 1, 2)), ("backward", (2, 1, 0)))
        for layer in order
    ]
    assert [phase.label for phase in trace.phases if phase.label] == expected
    groups = [buffer.group for buffer in trace.problem().buffers]
    assert set(expected) <= set(groups) if recompute else {e for e in expected if "backward" in e} <= set(groups)


@pytest.mark.parametrize("recompute", [False, True])
def test_fake_tensors_are_traced_as_real_ones(recompute: bool) -> None:
    real, _ = record(storages, recompute=recompute)
    with FakeTensorMode():
        fake, _ = record(storages, recompute=recompute)
    assert fake == real
    assert real.persistent > 4 * 3 * 2 * 2 * 32 * 128


def test_the_allocator_sees_what_the_operators_do_and_scratch_besides() -> None:
    by_operator, _ = record(storages)
    by_allocator, _ = record(allocator)
    assert len(by_allocator) >= len(by_operator)
    assert by_operator.peak_live() <= by_allocator.peak_live() <= 1.04 * by_operator.peak_live()


def test_recomputation_lowers_the_peak() -> None:
    assert record(storages, recompute=True)[0].peak_live() < record(storages)[0].peak_live()


def test_requests_across_the_edges_of_the_iteration() -> None:
    log = EventLog()
    early = log.malloc(10)
    log.cut()
    late = log.malloc(20)
    log.free(early)
    log.free_unknown(30)
    log.cut()
    log.free(late)
    trace = log.trace()
    assert [(r.size, r.birth, r.death) for r in trace.requests] == [(10, None, 1), (30, None, 2), (20, 0, None)]
    assert trace.peak_live() == 60
    assert [(b.lower, b.upper, b.size) for b in trace.problem(alignment=8).buffers] == [
        (0, 2, 16),
        (0, 3, 32),
        (1, 4, 24),
    ]


def test_without_an_iteration_there_is_no_trace() -> None:
    log = EventLog()
    log.cut()
    with pytest.raises(AllocationError, match="no iteration was recorded"):
        log.trace()
