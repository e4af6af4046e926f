"""The CPU rig: what it maps, and that nothing of it remains."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch.distributed as c10d  # noqa: E402

from megamem.testing.cpu import cpu_rig  # noqa: E402

Dist = Callable[[int], Callable[..., list[Any]]]


@pytest.fixture
def rig() -> Iterator[None]:
    with cpu_rig():
        yield


def _owners() -> list[Any]:
    owners = [torch, torch.cuda, torch.cuda.random, torch.cuda.memory, torch.cuda.nvtx, torch.Tensor, torch.nn.Module]
    owners += [torch.optim.Optimizer, torch.accelerator, torch.autograd, torch.UntypedStorage]
    owners += [c10d, c10d.distributed_c10d, c10d.ProcessGroup, torch._dynamo.config]
    try:
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils
    except ImportError:
        return owners
    return [*owners, random, moe_utils]


def _snapshot() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in _owners()]


def _differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> set[str]:
    return {
        name
        for old, new in zip(before, after, strict=True)
        for name in old.keys() | new.keys()
        if name not in old or name not in new or old[name] is not new[name]
    }


def test_everything_is_again_the_object_it_was() -> None:
    before, environment = _snapshot(), dict(os.environ)
    rig = cpu_rig()
    for _ in range(2):  # it can be started again
        rig.start()
        changed = _differences(before, _snapshot())
        assert {"cuda", "type", "Stream", "init_process_group", "is_available", "default_generators"} <= changed
        torch.ones(2, device="cuda", requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
        rig.stop()
        assert _differences(before, _snapshot()) == set()
        assert dict(os.environ) == environment
    assert not torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]


def test_undone_also_after_an_exception_and_when_nested() -> None:
    before = _snapshot()
    with pytest.raises(KeyError), cpu_rig():
        outer = _snapshot()
        with cpu_rig():
            assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert _differences(outer, _snapshot()) == set()
        raise KeyError
    assert _differences(before, _snapshot()) == set()


def test_starting_twice_is_refused() -> None:
    rig = cpu_rig()
    rig.start()
    with pytest.raises(RuntimeError, match="on already"):
        rig.start()
    rig.stop()
    rig.stop()  # harmless


def test_environment_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with cpu_rig():
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda", 1)], ids=str)
@pytest.mark.usefixtures("rig")
def test_devices_become_the_cpu(device: Any) -> None:
    tensor = torch.empty(2, device=device)
    assert tensor.device.type == "cpu"
    for moved in (tensor.to(device), tensor.to(device=device), tensor.new_zeros(2, device=device), tensor.cuda(device)):
        assert moved.device.type == "cpu"
    assert torch.nn.Linear(2, 2, device=device).to(device).weight.device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device(), pin_memory=True).pin_memory().is_pinned()


@pytest.mark.usefixtures("rig")
def test_devices_become_the_cpu_inside_backward() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return torch.full((2,), 2.0, device=torch.cuda.current_device()) * grads[0].to("cuda")

    x = torch.ones(2, device="cuda", requires_grad=True)
    Doubled.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0]
    (grad,) = torch.autograd.grad(Doubled.apply(x).sum(), x)  # type: ignore[no-untyped-call]
    assert grad.tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("rig")
def test_an_int_that_is_no_device_stays_an_int() -> None:
    assert torch.full((2,), 1).tolist() == [1, 1]
    assert torch.ones(2, 3).sum(0).tolist() == [2, 2, 2]
    assert torch.ones(2).to(torch.int64).dtype is torch.int64


@pytest.mark.usefixtures("rig")
def test_streams_events_and_memory() -> None:
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream is torch.accelerator.current_stream()
        stream.wait_stream(torch.cuda.default_stream())
        torch.ones(2).record_stream(stream)
        stream.record_event(end)
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    assert end.query() and start.elapsed_time(end) >= 0
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0
    assert torch.cuda.get_device_properties(0).total_memory == torch.cuda.mem_get_info()[1]


@pytest.mark.usefixtures("rig")
def test_the_cuda_generator_is_the_cpu_generator() -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))
    torch.manual_seed(7)
    assert torch.equal(first, torch.rand(3))


def test_a_gpu_is_hidden_unless_claimed() -> None:
    with cpu_rig():
        assert not torch.cuda.is_available() and torch.cuda.device_count() == 1
        with pytest.raises(RuntimeError, match="under cpu_rig"):
            torch.cuda._lazy_init()  # type: ignore[no-untyped-call]
    with cpu_rig(claim_cuda=True):
        assert torch.cuda.is_available()


@pytest.mark.megatron
@pytest.mark.usefixtures("rig")
def test_megatrons_generators_fork_and_come_back() -> None:
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("branch", 5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with tracker.fork("branch"):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), inside)


def _nccl_groups() -> list[Any]:
    group = c10d.new_group([0, 1], backend="nccl")
    return [c10d.get_backend(), c10d.get_backend(group)]


def test_nccl_becomes_gloo(dist: Dist) -> None:
    assert dist(2)(_nccl_groups) == [["gloo", "gloo"]] * 2


def _emulated_and_real(dtype: torch.dtype, average: bool) -> list[tuple[Any, Any]]:
    """Pairs of an emulated collective's result and the one of this torch's gloo."""
    from megamem.testing import gloo

    group, rank = c10d.group.WORLD, c10d.get_rank()
    assert group is not None
    options = c10d.ReduceScatterOptions()
    options.reduceOp = c10d.ReduceOp.AVG if average else c10d.ReduceOp.SUM
    source = torch.arange(6, dtype=dtype) * (rank + 1)
    halves = list(source.chunk(2))
    sent, got = ([1, 3], [1, 1]) if rank == 0 else ([1, 1], [3, 1])
    parcels = list(source[: sum(sent)].split(sent))
    pairs: list[tuple[Any, Any, int]] = [
        (
            lambda out: gloo._reduce_scatter_base(group, out, source, options),
            lambda out: group._reduce_scatter_base(out, source, options),
            3,
        ),
        (
            lambda out: gloo._reduce_scatter_list(group, [out], [halves], options),
            lambda out: group.reduce_scatter([out], [halves], options),
            3,
        ),
        (
            lambda out: gloo._all_to_all_list(group, list(out.split(got)), parcels),
            lambda out: group.alltoall_base(out, source[: sum(sent)], got, sent, c10d.AllToAllOptions()),
            sum(got),
        ),
    ]
    results = []
    for emulated, real, size in pairs:
        outputs = torch.full((size,), -1, dtype=dtype), torch.full((size,), -1, dtype=dtype)
        emulated(outputs[0]).wait()
        real(outputs[1]).wait()
        results.append(outputs)
    assert torch.equal(source, torch.arange(6, dtype=dtype) * (rank + 1))  # an input is an input
    return results


@pytest.mark.parametrize("average", [False, True], ids=["sum", "avg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_collectives_equal_the_backends_own(dist: Dist, dtype: torch.dtype, average: bool) -> None:
    for pairs in dist(2)(_emulated_and_real, dtype, average):
        for emulated, real in pairs:
            assert torch.equal(emulated, real)
            assert not (emulated == -1).any()
