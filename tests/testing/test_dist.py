"""Forked ranks: values, failures, time-outs, reuse and clean-up."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.testing.dist import RankError, run_ranks

Dist = Callable[[int], Callable[..., list[Any]]]


def _sum_of_ranks(offset: int) -> tuple[int, float, int]:
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), torch.get_num_threads()


def _pid() -> int:
    return os.getpid()


def _one_rank_raises() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise KeyError("only rank one")
    dist.barrier()


def _die() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _rank_one_waits_for_nobody() -> None:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        dist.recv(torch.empty(1), src=0)


def _keep_groups() -> None:
    """As models do: what refers to a process group is part of a cycle, in a method's lru_cache, or held by a hook."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megamem.testing.models import GptCase, build_gpt, init_parallel, train_steps

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    keeper: list[Any] = [parallel_state.get_tensor_model_parallel_group()]
    keeper.append(keeper)
    RotaryEmbedding(kv_channels=8, rotary_percent=1.0, use_cpu_initialization=True)(4)
    parallel_state.destroy_model_parallel()
    case = GptCase(tp=2)
    init_parallel(case)
    train_steps(build_gpt(case), case, num_microbatches=1)


def _count_communicators() -> int:
    tasks = os.listdir("/proc/self/task")
    names = [open(f"/proc/self/task/{task}/comm", encoding="utf-8").read() for task in tasks]  # noqa: SIM115
    return sum(name.startswith("gloo_tcp") for name in names)


def _leave_a_mess() -> None:
    import torch
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.set_default_dtype(torch.float64)


def _state() -> tuple[bool, int, str, float]:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    groups = len(dist.distributed_c10d._world.pg_map)
    return parallel_state.model_parallel_is_initialized(), groups, str(torch.get_default_dtype()), torch.rand(1).item()


def _print() -> None:
    import torch.distributed as dist

    print("hello from", dist.get_rank())


def _big(tensor: Any) -> Any:
    return tensor * 2


def test_values_come_back_by_rank(dist: Dist) -> None:
    assert dist(3)(_sum_of_ranks, 10) == [(0, 33.0, 1), (1, 33.0, 1), (2, 33.0, 1)]


def test_tensors_travel_both_ways(dist: Dist) -> None:
    import torch

    given = torch.arange(100_000.0).bfloat16()  # more than a pipe holds
    for value in dist(2)(_big, given):
        assert torch.equal(value, given * 2)


def test_what_ranks_print_is_shown_with_the_test(dist: Dist, capsys: pytest.CaptureFixture[str]) -> None:
    dist(2)(_print)
    dist(2)(_print)
    assert capsys.readouterr().out.count("[rank 1] hello from 1\n") == 2


def test_ranks_are_reused_between_cases_and_new_after_a_failure(dist: Dist) -> None:
    first = dist(2)(_pid)
    assert dist(2)(_pid) == first
    with pytest.raises(RankError):
        dist(2)(_one_rank_raises)
    again = dist(2)(_pid)
    assert not set(first) & set(again)
    assert not any(_is_alive(pid) for pid in first)


def test_run_ranks_leaves_no_process() -> None:
    pids = run_ranks(_pid, 2)
    assert len(set(pids)) == 2
    assert not any(_is_alive(pid) for pid in pids)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_exception_names_its_rank_first_and_ends_the_others_promptly(dist: Dist) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 raised") as caught:
        dist(2)(_one_rank_raises)
    assert time.monotonic() - start < 20
    first = caught.value.failures[0]
    assert first.rank == 1
    assert "KeyError: 'only rank one'" in first.details and "_one_rank_raises" in first.details


def test_death_by_signal_is_named(dist: Dist) -> None:
    with pytest.raises(RankError, match="rank 0 was killed by SIGKILL"):
        dist(2)(_die)


def test_a_time_out_says_where_the_rank_is(dist: Dist) -> None:
    with pytest.raises(RankError, match="rank 1 did not finish within 2 s") as caught:
        dist(2)(_rank_one_waits_for_nobody, timeout=2)
    assert [failure.rank for failure in caught.value.failures] == [1]
    assert "_rank_one_waits_for_nobody" in caught.value.failures[0].details


def test_a_function_that_cannot_be_named_is_refused(dist: Dist) -> None:
    with pytest.raises(TypeError, match="module-level"):
        dist(2)(lambda: 1)


@pytest.mark.megatron
def test_nothing_of_one_case_reaches_the_next(dist: Dist) -> None:
    before = dist(2)(_state)
    dist(2)(_leave_a_mess)
    assert dist(2)(_state) == before
    assert before[0][:3] == (False, 1, "torch.float32")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc, which Linux has")
@pytest.mark.megatron
def test_no_communicator_outlives_its_case(dist: Dist) -> None:
    run = dist(2)
    run(_keep_groups)
    before = run(_count_communicators)
    for _ in range(2):
        run(_keep_groups)
    assert run(_count_communicators) == before


def _start_threads(number: int) -> int:
    for _ in range(number):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc, which Linux has")
def test_ranks_with_too_many_threads_are_replaced(dist: Dist) -> None:
    few = dist(2)(_start_threads, 3)
    assert dist(2)(_start_threads, 100) == few
    assert not set(dist(2)(_start_threads, 0)) & set(few)
