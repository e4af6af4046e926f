"""Predicted memory as a snapshot: PyTorch's own tools read it, and find in it what was predicted."""

from __future__ import annotations

import json
import pickle
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from sample_plan import RANKS, sample

from megamem.ir.plan import Prediction, RankMemory, Utilization, timeline_text
from megamem.profiler.cuda_snapshot import curves_of_snapshot, label, load_snapshot, read_snapshot
from megamem.report.charts import ACTIVATION_KINDS
from megamem.report.memory_snapshot import beside, predicted_snapshot, write_snapshot


def predicted() -> Prediction:
    plan = sample().plan
    assert plan is not None and plan.predicted is not None
    return plan.predicted


def live(events: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(microsecond, bytes allocated from then on), and a check that blocks never overlap and are freed once."""
    held: dict[int, int] = {}
    curve = []
    for event in events:
        if event["action"] == "alloc":
            begin, end = event["addr"], event["addr"] + event["size"]
            assert all(end <= other or begin >= other + size for other, size in held.items())
            held[begin] = event["size"]
        elif event["action"] == "free_completed":
            assert held.pop(event["addr"]) == event["size"]
        curve.append((event["time_us"], sum(held.values())))
    return curve


def test_each_rank_is_a_device_whose_memory_is_what_was_predicted() -> None:
    snapshot = predicted_snapshot(predicted())
    assert len(snapshot["device_traces"]) == RANKS
    for rank, events in zip(predicted().memory, snapshot["device_traces"], strict=True):
        fixed = sum(rank.kinds.get(kind, 0) for kind in rank.kinds if kind not in (*ACTIVATION_KINDS, "transients"))
        curve = live(events)
        assert [time for time, _ in curve] == sorted(time for time, _ in curve)
        assert curve[-1][1] == fixed
        want = max(nbytes for _, nbytes in rank.curve()) + rank.kinds.get("transients", 0) + fixed
        assert max(nbytes for _, nbytes in curve) == want
        assert max(nbytes for _, nbytes in curves_of_snapshot(snapshot)[rank.rank]) == want
        for moment, nbytes in rank.curve():
            at = round(moment * 1e6)
            after = [held for time, held in curve if time <= at][-1]
            if [time for time, _ in rank.curve() if round(time * 1e6) == at] == [moment]:
                assert after - fixed == nbytes


def test_blocks_are_named_after_kinds_and_actions() -> None:
    events = predicted_snapshot(predicted())["device_traces"][0]
    names = {event["frames"][0]["name"] for event in events}
    assert {"weights", "gradients", "optimizer", "working space of a layer"} <= names
    assert any(re.fullmatch(r"F of microbatch \d+(, chunk 1)?", name) for name in names)


def test_a_timeline_by_hand() -> None:
    rank = RankMemory(
        rank=0, kinds={"weights": 100, "kept": 9}, timeline=timeline_text([(0, 0), (1, 6), (2, 9), (3, 4)])
    )
    prediction = Prediction(
        step_seconds=4.0,
        utilization=Utilization(mfu=0.0, formula="", model_flops=0.0, peak_flops_per_gpu=1.0),
        memory=(rank,),
        pipeline=("F0@0.5-1.5 BW0@2-4",),
    )
    events = predicted_snapshot(prediction)["device_traces"][0]
    told = [
        (e["action"], e["size"], e["time_us"], e["frames"][0]["name"])
        for e in events
        if e["action"] != "free_requested"
    ]
    first, second = "F of microbatch 0", "BW of microbatch 0"
    assert told == [
        ("alloc", 100, 0, "weights"),
        ("alloc", 6, 1_000_000, first),
        ("alloc", 3, 2_000_000, second),
        ("free_completed", 3, 3_000_000, second),
        ("free_completed", 6, 3_000_000, first),
        ("alloc", 4, 3_000_000, first),
        ("free_completed", 4, 4_000_000, first),
    ]


def test_pytorchs_tools_open_it(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="pip install 'megamem[train]'")
    from torch.cuda import _memory_viz as viz

    path = tmp_path / "plan.pickle"
    write_snapshot(path, predicted_snapshot(predicted()))
    with path.open("rb") as file:
        snapshot = pickle.load(file)
    page = viz.trace_plot(snapshot)  # type: ignore[no-untyped-call]
    (embedded,) = json.loads(re.search(r"const local_files = (\[.*?\])\n", page, re.S)[1])  # type: ignore[index]
    assert pickle.loads(b64decode(embedded["base64"])) == snapshot
    assert viz.trace(snapshot).count("free completed") == viz.trace(snapshot).count("\ndel ")  # type: ignore[no-untyped-call]
    held = sum(predicted().memory[0].kinds[kind] for kind in ("weights", "gradients", "optimizer"))
    assert held > 0 and "total_reserved" in viz.segsum(snapshot)  # type: ignore[no-untyped-call]
    assert viz.segment_plot(snapshot)  # type: ignore[no-untyped-call]
    stacks = viz.memory(snapshot, format_flamegraph=lambda lines: lines)  # type: ignore[no-untyped-call]
    assert "optimizer" in stacks and str(predicted().memory[0].kinds["optimizer"]) in stacks


def test_our_own_reader_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.pickle"
    write_snapshot(path, predicted_snapshot(predicted()))
    trace = read_snapshot(path, device=1)
    assert sum(request.size for request in trace.requests if request.death is None) > 0


def measured() -> dict[str, Any]:
    """Two devices, as PyTorch records them: the first had 7 bytes before, allocates 5, and frees the 7."""
    frames: list[Any] = []
    events = [
        {"action": "alloc", "addr": 100, "size": 5, "stream": 0, "time_us": 1_700_000, "frames": frames},
        {"action": "free_requested", "addr": 50, "size": 7, "stream": 0, "time_us": 1_700_400, "frames": frames},
        {"action": "free_completed", "addr": 50, "size": 7, "stream": 0, "time_us": 1_700_400, "frames": frames},
    ]
    block = {"address": 100, "size": 8, "requested_size": 5, "state": "active_allocated", "frames": frames}
    segment = {"device": 0, "address": 0, "total_size": 200, "blocks": [block], "stream": 0}
    return {"segments": [segment], "device_traces": [events, []], "allocator_settings": {}}


def test_a_measured_snapshot_stands_behind_the_predicted_ranks() -> None:
    both = beside(predicted_snapshot(predicted()), [(measured(), 0), (measured(), 1)])
    assert len(both["device_traces"]) == RANKS + 2
    assert [event["time_us"] for event in both["device_traces"][RANKS]] == [0, 400, 400]
    assert both["segments"][-1]["device"] == RANKS
    assert measured()["segments"][0]["device"] == 0


def test_curves_of_a_measured_snapshot_count_what_was_there_before() -> None:
    assert curves_of_snapshot(measured()) == {0: [(0.0, 7), (0.0, 12), (0.0004, 5)]}


def test_curves_are_of_the_last_whole_step_where_steps_are_marked() -> None:
    snapshot = measured()
    block = {"address": 10, "size": 64, "requested_size": 40, "state": "active_allocated"}
    snapshot["segments"] = [{"device": 0, "blocks": [block]}]
    snapshot["device_traces"] = [
        [
            {"action": "alloc", "addr": at, "size": 10, "time_us": at, "user_metadata": label(at // 10, "forward")}
            for at in (10, 20, 25, 30)
        ]
    ]
    assert curves_of_snapshot(snapshot) == {0: [(0.0, 10), (0.0, 20), (5e-06, 30)]}


@pytest.mark.parametrize("content", [b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"segments": []})])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, content: bytes) -> None:
    from megamem.errors import AllocationError

    path = tmp_path / "file.pickle"
    path.write_bytes(content)
    with pytest.raises(AllocationError, match="no memory snapshot of PyTorch"):
        load_snapshot(path)
