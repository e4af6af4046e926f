"""The recorder of a step on a GPU, with an allocator's history in place of the GPU; on a GPU for real."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from megamem.errors import AllocationError
from megamem.ir.allocation_trace import read_trace

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.profiler.cuda_recording import recorded_step
from megamem.profiler.cuda_snapshot import read_snapshot


class Memory:
    """`torch.cuda.memory` as the recorder uses it, with events that the test makes."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.metadata, self.is_on = "", False

    def _record_memory_history(self, enabled: str | None, **_options: Any) -> None:
        self.is_on = enabled is not None

    def _set_memory_metadata(self, text: str) -> None:
        self.metadata = text

    def _snapshot(self) -> dict[str, Any]:
        return {"segments": [], "device_traces": [self.events]}

    def add(self, action: str, addr: int, size: int) -> None:
        if self.is_on:
            event = {"action": action, "addr": addr, "size": size, "stream": 0, "time_us": len(self.events)}
            self.events.append({**event, "user_metadata": self.metadata})


class OldMemory(Memory):
    _set_memory_metadata = None  # type: ignore[assignment]


class Layer(torch.nn.Module):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.scale = memory, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Any) -> Any:
        self.memory.add("alloc", 7, 512)
        self.memory.add("free_requested", 7, 512)
        self.memory.add("free_completed", 7, 512)
        return x * self.scale


def train(memory: Memory, layers: Any) -> None:
    memory.add("alloc", 1, 100)
    x = torch.ones(2, requires_grad=True)
    for layer in layers:
        x = layer(x)
    x.sum().backward()
    memory.add("free_requested", 1, 100)
    memory.add("free_completed", 1, 100)


def test_a_step_is_recorded_and_tagged(tmp_path: Path) -> None:
    memory = Memory()
    layers = torch.nn.ModuleList([Layer(memory), Layer(memory)])
    train(memory, layers)  # not recorded
    path, snapshot = tmp_path / "step.trace", tmp_path / "step.pickle"
    with recorded_step(path, layers=list(layers), device=0, memory=memory, snapshot=snapshot):
        train(memory, layers)
    train(memory, layers)
    trace = read_trace(path)
    assert [(place.layer, place.part) for place in trace.places()] == [(None, ""), (0, "forward"), (1, "forward")]
    assert [request.size for request in trace.requests] == [100, 512, 512]
    assert not memory.is_on
    assert memory.metadata == ""
    assert read_snapshot(snapshot, step=0) == trace
    assert all(not layer._forward_hooks for layer in layers)


def test_an_older_pytorch_gives_no_phases(tmp_path: Path) -> None:
    memory = OldMemory()
    with recorded_step(tmp_path / "t", layers=[Layer(memory)], device=0, memory=memory):
        memory.add("alloc", 1, 100)
    assert [place.part for place in read_trace(tmp_path / "t").places()] == [""]


def test_nothing_is_left_on_and_nothing_written_when_the_step_fails(tmp_path: Path) -> None:
    memory = Memory()
    with (
        pytest.raises(ZeroDivisionError),
        recorded_step(tmp_path / "t", device=0, memory=memory),
    ):
        raise ZeroDivisionError
    assert not memory.is_on
    assert not (tmp_path / "t").exists()


def test_mistakes_are_told(tmp_path: Path) -> None:
    memory = Memory()
    with (
        pytest.raises(AllocationError, match="no events on device 0"),
        recorded_step(tmp_path / "t", device=0, memory=memory),
    ):
        pass
    with pytest.raises(AllocationError, match="no folder"), recorded_step(tmp_path / "no" / "t", memory=memory):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(AllocationError, match="no GPU"), recorded_step(tmp_path / "t"):
            pass


def test_a_snapshot_is_made_a_trace_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megamem.cli import main

    memory, snapshot, path = Memory(), tmp_path / "s.pickle", tmp_path / "s.trace"
    with recorded_step(path, device=0, memory=memory, snapshot=snapshot):
        train(memory, [Layer(memory)])
    again = tmp_path / "again.trace"
    assert main(["profile", "--snapshot", str(snapshot), "--allocations", str(again)]) == 0
    assert again.read_bytes() == path.read_bytes()
    assert main(["solve", str(again), "--json"]) == 0
    snapshot.write_bytes(pickle.dumps({"device_traces": 3}))
    assert main(["profile", "--snapshot", str(snapshot), "--allocations", str(again)]) == 2
    assert "no device_traces" in capsys.readouterr().err
    assert main(["profile", "--snapshot", str(snapshot)]) == 2


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(256, 256) for _ in range(3)]).cuda()

    def step() -> None:
        x = torch.ones(64, 256, device="cuda", requires_grad=True)
        for layer in layers:
            x = layer(x)
        x.sum().backward()

    step()
    with recorded_step(tmp_path / "t", layers=list(layers)):
        step()
    parts = {(place.layer, place.part) for place in read_trace(tmp_path / "t").places()}
    assert {(layer, "forward") for layer in range(3)} <= parts
    assert any(part == "backward" for _, part in parts)
