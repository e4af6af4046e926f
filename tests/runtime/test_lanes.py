"""Lanes on threads: order, results, errors, and ranks that have failed; communicators on gloo ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.errors import PipelineError
from megamem.runtime.pipeline.lanes import Lane, make_lane

Dist = Callable[[int], Callable[..., list[Any]]]
CPU = torch.device("cpu")


def lane(failure: Callable[[], str | None] = lambda: None) -> Lane:
    return make_lane("test", CPU, failure)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "megamem-test"]


def test_functions_run_beside_the_caller_in_the_order_of_posting() -> None:
    own, gate, seen = lane(), threading.Event(), []

    def first() -> int:
        gate.wait(5)
        seen.append("first")
        return 1

    one, two = own.post(first), own.post(lambda: seen.append("second") or torch.is_grad_enabled())
    assert not one.is_done() and not own.is_idle and seen == []
    gate.set()
    assert two.wait() is False and one.wait() == 1 == one.wait()  # no graph is built; a result may be asked for again
    assert seen == ["first", "second"] and own.is_idle
    own.close()
    assert threads() == []


def test_what_was_posted_is_kept_until_it_has_ended_and_no_longer() -> None:
    import weakref

    own, gate = lane(), threading.Event()
    tensor = torch.ones(3)
    held = weakref.ref(tensor)
    own.post(lambda tensor=tensor: gate.wait(5))
    del tensor
    assert held() is not None
    gate.set()
    own.finish()
    own.drop_finished()
    assert held() is None
    own.close()


def test_an_error_comes_out_where_the_result_is_waited_for_and_the_next_function_runs() -> None:
    own = lane()
    failed = own.post(lambda: torch.ones(2) @ torch.ones(3))
    after = own.post(lambda: 7)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        failed.wait()
    assert after.wait() == 7
    own.close()


def test_who_waits_for_a_rank_that_has_failed_is_told_and_the_lane_is_left() -> None:
    found: list[str] = []
    own, gate = lane(lambda: found[0] if found else None), threading.Event()
    pending = own.post(lambda: gate.wait(30))
    threading.Timer(0.1, found.append, ["rank 3 failed in 0S1"]).start()
    began = time.monotonic()
    with pytest.raises(PipelineError, match="rank 3 failed in 0S1"):
        pending.wait()
    own.close()  # does not wait for the thread
    assert time.monotonic() - began < 5 and threads() == ["megamem-test"]
    gate.set()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []


def collectives() -> list[Any]:
    """Each operation of a communicator of the last two ranks of three, and one of all; dtypes and places as used."""
    import torch.distributed as dist

    from megamem.runtime.pipeline.lanes import Communicator

    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    everyone = Communicator((0, 1, 2), rank, CPU, store, "everyone")
    found: list[Any] = []
    for dtype in (torch.bfloat16, torch.float32):
        tensor = torch.full((3, 2), rank + 1.0, dtype=dtype)
        received = tensor.clone()
        everyone.broadcast(received, 2)
        total = tensor.clone()
        everyone.reduce(total, 1)
        found += [received.float().tolist(), total.float().tolist() if rank == 1 else None]
        found += [everyone.gather(tensor).float()[:, 0, 0].tolist(), everyone.scatter_sum(tensor).float().tolist()]
    if rank > 0:
        two = Communicator((1, 2), rank - 1, CPU, store, "two")
        found.append(two.gather(torch.tensor([rank])).tolist())
        two.abort()
    everyone.abort()
    return found


@pytest.mark.megatron
def test_collectives_of_a_communicator(dist: Dist) -> None:
    threes, sixes, part = [[3.0, 3.0]] * 3, [[6.0, 6.0]] * 3, [[6.0, 6.0]]
    for rank, found in enumerate(dist(3)(collectives)):
        one = [threes, sixes if rank == 1 else None, [1.0, 2.0, 3.0], part]
        assert found == [*one, *one, *([[[1], [2]]] if rank else [])]
