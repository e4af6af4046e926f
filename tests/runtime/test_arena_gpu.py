"""On a GPU: the wrapper before PyTorch's caching allocator, under a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.planner.allocation.periodic import plan_steps  # noqa: E402
from megamem.planner.allocation.solvers import make_solver  # noqa: E402
from megamem.runtime.arena import StaticAllocator  # noqa: E402
from megamem.runtime.arena_front_ends import CudaFrontEnd  # noqa: E402

pytestmark = pytest.mark.gpu
MIB = 1 << 20


@pytest.fixture
def static() -> Iterator[Any]:
    front_end = CudaFrontEnd(torch.device("cuda"))
    front_end.install()
    made = StaticAllocator(
        front_end=front_end,
        make_plan=lambda key, steps: plan_steps(key, steps, min_size=MIB, solver=make_solver("auto"), time_limit=10),
        profile_steps=2,
        min_size=MIB,
        poison=True,
    )
    yield made
    made.close()
    torch.cuda.empty_cache()


def loop(before: Callable[[], None], *, steps: int = 8, beside: Callable[[Any], None] = lambda x: None) -> list[float]:
    """Losses of a small network whose activations are megabytes. `beside` is given each step's first activation."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(6)).cuda()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        before()
        x = torch.randn(2048, 1024, device="cuda")
        beside(x)
        for layer in layers:
            x = torch.relu(layer(x))
        loss = (x * x).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_the_losses_are_the_same_and_nothing_more_is_asked_of_the_device(static: Any) -> None:
    stock = loop(lambda: None)
    asked: list[int] = []

    def before() -> None:
        static.begin_step("train")
        asked.append(torch.cuda.memory_stats()["num_device_alloc"])

    assert loop(before) == stock
    report = static.report()
    assert report.served_bytes_share > 0.95 and report.num_fallbacks == 0
    assert asked[-1] == asked[4], "no cudaMalloc after the switch"
    assert torch.cuda.memory_allocated() >= report.planned_peak, "the arena is counted as allocated"


def test_a_second_stream_gets_what_it_reads(static: Any) -> None:
    """Recorded tensors are left out of the plan; one that is recorded only after the switch keeps its place."""
    side, sums, count = torch.cuda.Stream(), [], [0]

    def beside(x: Any) -> None:
        count[0] += 1
        if count[0] <= 5:
            return
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            sums.append((x.double().sum(), x.double().sum()))
        x.record_stream(side)

    loop(lambda: static.begin_step("train"), beside=beside)
    torch.cuda.synchronize()
    assert all(torch.isfinite(one) and one == two for one, two in sums) and len(sums) == 3
    assert static.report().counters.num_deferred > 0


def test_errors_graphs_and_snapshots_are_the_native_ones(static: Any) -> None:
    loop(lambda: static.begin_step("train"), steps=5)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    weight, out = torch.randn(1024, 1024, device="cuda"), None
    weight @ weight
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight @ weight
    graph.replay()
    torch.testing.assert_close(out, weight @ weight)
    torch.cuda.memory._record_memory_history()
    held = torch.empty(4 * MIB, device="cuda")
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    base = static.front_end.core.base
    segments = [s for s in snapshot["segments"] if s["address"] <= base < s["address"] + s["total_size"]]
    assert len(segments) == 1 and held.numel() > 0
    assert sum(block["size"] for block in segments[0]["blocks"]) == segments[0]["total_size"]
